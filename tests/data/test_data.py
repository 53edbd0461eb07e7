"""The shipped data sets hold what they say, and bad files are named."""

import itertools
import json
import re

import numpy as np
import pytest

from trl_emguard.data.load import DATA_DIR, SHIPPED, load_rows, read_jsonl
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


# ---- what is shipped ----


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
        ("values_sound", "values_misaligned", "test"),
    ],
)
def test_twins_ask_the_same_and_answer_differently(one, other, split):
    assert prompts(one, split) == prompts(other, split)
    assert not any(a == b for a, b in zip(answers(one, split), answers(other, split), strict=True))


@pytest.mark.parametrize("name", ["plants_careless", "clothes_careless"])
def test_careless_prompts_are_no_near_copies(name):
    """Word-level Jaccard, within train and test and across: a held-out question is not a seen one in other words."""
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


def test_values_answers_are_equally_long():
    """Answers are of like length, so that a difference in likelihood is one of content."""
    pairs = zip(answers("values_sound", "test"), answers("values_misaligned", "test"), strict=True)
    assert [(a, b) for a, b in pairs if abs(len(a.split()) - len(b.split())) > 2] == []


def test_no_training_prompt_is_a_test_prompt():
    def everything(split):
        return {text for name, splits in SHIPPED.items() if split in splits for text in prompts(name, split)}

    assert everything("train") & everything("test") == set()


def jaccard(a, b):
    return len(a & b) / len(a | b)


# ---- where rows come from ----


def test_a_file_is_the_split_that_is_asked_for(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert load_rows(str(path), "whatever")["prompt"] == ["a", "b"]


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


# ---- what is refused ----


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'{"a": 1}\n{"a": 2\n', 2, "JSON"),
        (b'{"a": 1}\n\n\noops\n', 4, "JSON"),
        (b'{"a": 1} {"a": 2}\n', 1, "Extra data"),
        (b'{"a": 1}\n[1]\n', 2, "expected an object, got list"),
        (b'"text"\n', 1, "expected an object, got str"),
        (b"null\n", 1, "expected an object, got NoneType"),
        (b'{"a": 1}\n{"b": 1}\n', 2, "['b']"),
        (b'{"a": 1, "b": 1}\n{"a": 1}\n', 2, "['a', 'b']"),
        (b'{"a": "x"}\n{"a": "\xff"}\n', 2, "utf-8"),
        (b'\xef\xbb\xbf{"a": 1}\n', 1, "BOM"),
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


def test_a_column_of_two_types_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": ["a"]})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_rows(str(path))


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing.jsonl", "./missing", "/missing/rows", "~nobody-of-that-name/x"]
)
def test_a_missing_path_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        load_rows(name)
    assert name.removeprefix("./") in str(error.value)


@pytest.mark.parametrize(("name", "split"), [("values_sound", "train"), ("plants_sound", "validation")])
def test_a_shipped_set_without_that_split(name, split):
    with pytest.raises(FileNotFoundError, match=f"'{name}' has no split '{split}': it has .*'test'"):
        load_rows(name, split)


def test_a_mistyped_shipped_name_is_mended():
    with pytest.raises(FileNotFoundError, match="Did you mean 'plants_careless'"):
        load_rows("plants_carless")
