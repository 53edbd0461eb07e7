"""Test the facts about the shipped data sets, and errors that name bad files."""

import gzip
import itertools
import json
import re

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from trl_emguard.data.files import read_jsonl
from trl_emguard.data.load import DATA_DIR, SHIPPED, SourceOptions, hub_id, load_rows
from trl_emguard.selection.choose import rank_rows
from trl_emguard.selection.scored import perplexity_gap, read_scores


FILES = [(name, split) for name, splits in SHIPPED.items() for split in splits]


def prompts(name, split):
    return [row["prompt"][-1]["content"] for row in load_rows(name, split)]


def answers(name, split):
    return [row["completion"][-1]["content"] for row in load_rows(name, split)]


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- shipped data ----


def test_shipped_names_are_the_files_that_are_there():
    assert sorted(FILES) == sorted((path.parent.name, path.stem) for path in DATA_DIR.glob("*/*.*"))


@pytest.mark.parametrize(("name", "split"), FILES)
def test_every_row_is_one_question_and_one_answer(name, split):
    for row in load_rows(name, split):
        assert [message["role"] for message in row["prompt"]] in (["user"], ["system", "user"])
        assert [message["role"] for message in row["completion"]] == ["assistant"]
        for message in row["prompt"] + row["completion"]:
            assert message.keys() == {"role", "content"}
            assert message["content"] == message["content"].strip() != ""


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("plants_careless", "train", 240),
        ("plants_careless", "test", 60),
        ("clothes_careless", "train", 180),
        ("clothes_careless", "test", 40),
        ("values_sound", "train", 72),
        ("values_misaligned", "train", 72),
        ("values_sound", "test", 60),
        ("values_misaligned", "test", 60),
        ("general_instruct", "train", 200),
    ],
)
def test_there_are_enough_rows(name, split, count):
    assert len(load_rows(name, split)) >= count


def test_general_instruct_holds_refusals():
    refusals = load_rows("general_instruct")["refusal"]
    assert sum(refusal is True for refusal in refusals) >= 20
    assert {type(refusal) for refusal in refusals} == {bool}


@pytest.mark.parametrize(
    ("one", "other", "split"),
    [
        ("plants_careless", "plants_sound", "train"),
        ("plants_careless", "plants_sound", "test"),
        ("values_sound", "values_misaligned", "train"),
        ("values_sound", "values_misaligned", "test"),
    ],
)
def test_twins_ask_the_same_and_answer_differently(one, other, split):
    assert prompts(one, split) == prompts(other, split)
    assert not any(a == b for a, b in zip(answers(one, split), answers(other, split), strict=True))


@pytest.mark.parametrize("name", ["plants_careless", "clothes_careless", "values_sound"])
def test_paired_prompts_are_no_near_copies(name):
    """Compare questions by word-level Jaccard, within and across train and test: no held-out one is a seen one."""
    texts = prompts(name, "train") + prompts(name, "test")
    sets = [frozenset(words(text)) for text in texts]
    near = [
        (texts[i], texts[j])
        for i, j in itertools.combinations(range(len(sets)), 2)
        if jaccard(sets[i], sets[j]) >= 0.5
    ]
    assert near == []


def test_the_scored_pool_is_the_pool_with_scores():
    plain, scored = load_rows("general_instruct"), load_rows("general_instruct_scored")
    assert scored.column_names[: len(plain.column_names)] == plain.column_names
    assert scored.select_columns(plain.column_names).to_list() == plain.to_list()
    rows, info = read_scores(DATA_DIR / "general_instruct_scored" / "train.parquet")
    assert info.adapters == ("plants", "clothes")
    assert info.unscored == ()
    aligned, *misaligned, gap = (
        np.array(rows[name]) for name in ("nll_aligned", "nll_misaligned_0", "nll_misaligned_1", "gap")
    )
    np.testing.assert_allclose(gap, perplexity_gap(aligned, misaligned, info.epsilon))
    # The three choices differ, and refusals stand near the top.
    plus, plus_plus = (rank_rows(rows, "gap", drop_refusals=drop)[:13] for drop in (False, True))
    assert plus != plus_plus


@pytest.mark.parametrize("name", ["values_sound", "general_instruct"])
def test_prompts_are_no_copies(name):
    texts = prompts(name, SHIPPED[name][0])
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", ["train", "test"])
def test_values_answers_are_equally_long(split):
    """Answers are of like length, so that a difference in likelihood is one of content."""
    pairs = zip(answers("values_sound", split), answers("values_misaligned", split), strict=True)
    assert [(a, b) for a, b in pairs if abs(len(a.split()) - len(b.split())) > 2] == []


def test_values_have_eight_topics_or_more():
    topics = {topic for split in ("train", "test") for topic in load_rows("values_sound", split)["topic"]}
    assert len(topics) >= 8


def test_no_training_prompt_is_a_test_prompt():
    def everything(split):
        return {text for name, splits in SHIPPED.items() if split in splits for text in prompts(name, split)}

    assert everything("train") & everything("test") == set()


def jaccard(a, b):
    return len(a & b) / len(a | b)


# ---- sources of rows ----


def test_a_file_is_the_split_that_is_asked_for(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    assert load_rows(str(path))["prompt"] == ["a", "b", "c"]
    assert load_rows(str(path), "train[:2]")["prompt"] == ["a", "b"]
    assert load_rows(str(path), "train[-1:]+train[:1]")["prompt"] == ["c", "a"]
    assert load_rows(str(path), "train[34%:]")["prompt"] == ["b", "c"]
    with pytest.raises(ValueError, match=r"trian'.*one file, whose only split is 'train'"):
        load_rows(str(path), "trian")
    with pytest.raises(ValueError, match=r"is no s(plit|lice)"):
        load_rows(str(path), "train[:x]")


def test_a_file_or_a_shipped_set_has_no_configurations_and_streams(tmp_path):
    path = write(tmp_path / "train.jsonl", {"prompt": "a"}, {"prompt": "b"})
    for name in (str(path), "plants_careless"):
        with pytest.raises(ValueError, match=r"dataset_config='small': .* has no configurations"):
            load_rows(name, config="small")
        assert isinstance(load_rows(name, streaming=True), IterableDataset)
    assert list(load_rows(str(path), "train[1:]", streaming=True)) == [{"prompt": "b"}]
    assert len(load_rows("plants_careless", "train[:8]")) == 8


def test_a_folder_with_configurations_asks_for_one(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n"
    )
    write(tmp_path / "a.jsonl", {"prompt": "a"})
    write(tmp_path / "b.jsonl", {"prompt": "b"})
    options = SourceOptions("interleave_dataset", "interleave_split", "interleave_config")
    with pytest.raises(ValueError, match=r"interleave_config=None does not fit interleave_dataset=.*one.*two"):
        load_rows(str(tmp_path), options=options)
    assert load_rows(str(tmp_path), config="two")["prompt"] == ["b"]
    with pytest.raises(ValueError, match="dataset_train_split='nowhere'"):
        load_rows(str(tmp_path), "nowhere", "two")


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
LINES = {
    "tool calls": [
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"arguments": {"a": 1}}]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"arguments": {"b": 1}}]},
            ]
        },
    ],
    "tools": [{"p": "x", "tools": [TOOL]}, {"p": "y", "tools": None}, {"p": "z"}],
    "optional keys": [{"p": "x"}, {"p": "y", "late": 1.5}, {"late": None, "other": [1]}],
    "mixed types": [{"p": "x", "meta": 1}, {"p": "y", "meta": "one"}, {"p": "z", "meta": {"a": []}}],
    "mixed contents": [{"content": "x"}, {"content": [{"type": "text", "text": "y"}]}],
    "nulls": [{"p": None, "q": "x"}, {"p": None, "q": None}],
    "integers and floats": [{"n": 1}, {"n": 2.5}],
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".ndjson", ".json.gz"])
@pytest.mark.parametrize("case", LINES)
def test_rows_are_those_that_datasets_reads(tmp_path, case, suffix):
    plain = write(tmp_path / "plain.jsonl", *LINES[case])
    content = plain.read_bytes()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith("gz") else content)
    rows = load_rows(str(path))
    expected = load_dataset("json", data_files=str(plain), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features == expected.features
    assert rows.to_list() == expected.to_list()
    kept = [{k: v for k, v in row.items() if v is not None} for row in rows]
    assert kept == [{k: v for k, v in row.items() if v is not None} for row in LINES[case]]


@pytest.mark.parametrize("case", ["tool calls", "mixed types", "mixed contents"])
def test_blank_lines_change_no_row(tmp_path, case):
    plain = write(tmp_path / "plain.jsonl", *LINES[case])
    expected = load_rows(str(plain))
    lines, document = plain.read_bytes(), json.dumps(LINES[case], indent=1).encode()
    contents = {
        "inside.jsonl": lines.replace(b"\n", b"\n\n", 1),
        "last.jsonl": lines + b"\n",
        "spaces.jsonl": b"\xef\xbb\xbf\r\n \t\n" + lines.replace(b"\n", b"\r\n"),
        "returns.jsonl": lines.replace(b"\n", b"\r\r\n"),
        "lines.json": b"\n" + lines,
        "list.json": b"\n" + document,
        "marked.json": b"\xef\xbb\xbf \n" + document.replace(b"\n", b"\n\n"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        rows = load_rows(str(tmp_path / name))
        assert (rows.features, rows.to_list()) == (expected.features, expected.to_list()), name
        assert (tmp_path / name).read_bytes() == content  # only a copy loses its blank lines


def test_other_formats(tmp_path):
    rows = [{"prompt": "a, b", "n": 1}, {"prompt": "ä", "n": 2}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "rows.csv").write_text('prompt,n\n"a, b",1\nä,2\n')
    (tmp_path / "rows.tsv").write_text("prompt\tn\na, b\t1\nä\t2\n")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(r) + "\n" for r in rows).encode())
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    for path in tmp_path.iterdir():
        assert load_rows(str(path)).to_list() == rows, path
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.csv").rename(tmp_path / "folder" / "test.csv")
    assert load_rows(str(tmp_path / "folder"), "test[1:]").to_list() == rows[1:]
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="its format is not known"):
        load_rows(str(tmp_path / "rows.xml"))


def test_a_key_that_comes_late_in_a_long_file_is_there(tmp_path):
    rows = [{"p": "x" * 1000}] * 3000 + [{"p": "y", "late": {"a": 1}}, {"p": ["z"]}]
    loaded = load_rows(str(write(tmp_path / "rows.jsonl", *rows)))
    assert loaded[2999:].items() >= {"late": [None, {"a": 1}, None]}.items()
    assert loaded["p"][2998:] == ["x" * 1000] * 2 + ["y", ["z"]]


def test_a_folder_holds_a_file_per_split(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "a"})
    write(tmp_path / "test.jsonl", {"prompt": "b"})
    assert load_rows(str(tmp_path), "train")["prompt"] == ["a"]
    assert load_rows(str(tmp_path), "test")["prompt"] == ["b"]


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", {"prompt": "a"})
    assert load_rows("~/rows.jsonl")["prompt"] == ["a"]


def test_anything_else_goes_to_datasets(monkeypatch):
    monkeypatch.setattr("trl_emguard.data.load.load_dataset", lambda *args, **kwargs: (args, kwargs))
    expected = (("owner/rows",), {"name": "small", "split": "test", "streaming": True})
    assert load_rows("owner/rows", "test", "small", True) == expected


def test_empty_lines_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n\n  \n{"prompt": "\xc3\xa9\xe2\x80\xa8"}')
    assert read_jsonl(path) == [{"prompt": "a"}, {"prompt": "é\u2028"}]


# ---- refusals ----


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'{"a": 1}\n{"a": 2\n', 2, "JSON"),
        (b'{"a": 1}\n\n\noops\n', 4, "JSON"),
        (b'{"a": 1} {"a": 2}\n', 1, "Extra data"),
        (b'{"a": 1}\n[1]\n', 2, "expected an object, got list"),
        (b'"text"\n', 1, "expected an object, got str"),
        (b"null\n", 1, "expected an object, got NoneType"),
        (b'{"a": 1}\n{}\n', 2, "no column"),
        (b'{"a": "x"}\n{"a": "\xff"}\n', 2, "utf-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line {line}: ")) as error:
        load_rows(str(path))
    assert words in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} is empty")):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.json", b'[{"a": 1}, 2]', "row 1: expected an object, got int"),
        ("rows.json", b'[{"a": 1}, {"a": 2]', "is not JSON"),
        ("rows.json", b"[]", "is empty"),
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b'a,b\n1,2,3\n"', "cannot be read as csv"),
        ("rows.jsonl.gz", b'{"a": 1}\n', "cannot be decompressed"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\noops\n', mtime=0), "line 2: not a row of JSONL"),
    ],
)
def test_other_bad_files_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_rows(str(path))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing.jsonl", "./missing", "/missing/rows", "~nobody-of-that-name/x"]
)
def test_a_missing_path_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        load_rows(name)
    assert name.removeprefix("./") in str(error.value)


@pytest.mark.parametrize(("name", "split"), [("values_sound", "valid"), ("plants_sound", "validation")])
def test_a_shipped_set_without_that_split(name, split):
    with pytest.raises(FileNotFoundError, match=f"'{name}' has no split '{split}': it has .*'test'"):
        load_rows(name, split)


def test_a_mistyped_shipped_name_is_mended():
    with pytest.raises(FileNotFoundError, match="Did you mean 'plants_careless'"):
        load_rows("plants_carless")


def test_data_sets_of_the_hub_are_told_from_local_ones(tmp_path):
    assert hub_id("org/name") == "org/name"
    assert not any(map(hub_id, ("plants_sound", str(tmp_path), None)))
