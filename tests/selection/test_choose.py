"""Test choosing from a scored pool: the refusal filter, the order, held-out mode, the file, and the command."""

import json

import numpy as np
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_emguard.data.load import load_rows
from trl_emguard.scripts import main as commands
from trl_emguard.selection.choose import rank_rows, refusal_filter, without_adapter
from trl_emguard.selection.scored import METADATA_KEY, ScoresInfo, perplexity_gap, read_scores, write_scores


INFO = ScoresInfo(
    "tiny", ("medical", "legal", "code"), 1.0, 7, ((6, "the answer is empty"),), "prompt", "response", "abc", "0"
)
REFUSING, HELPING = "I'm sorry, but I cannot.", "Sure: water it."


def scored_pool():
    """Return six rows, of which 1 and 4 refuse."""
    rng = np.random.default_rng(0)
    aligned, *misaligned = rng.uniform(0.5, 3, (4, 6))
    return Dataset.from_dict(
        {
            "prompt": [f"q{i}?" for i in range(6)],
            "response": [REFUSING if i in (1, 4) else HELPING for i in range(6)],
            "nll_aligned": aligned,
            **{f"nll_misaligned_{k}": column for k, column in enumerate(misaligned)},
            "gap": perplexity_gap(aligned, misaligned, 1.0),
        }
    )


@pytest.fixture
def scores(tmp_path):
    write_scores(tmp_path / "scores.parquet", scored_pool(), INFO)
    return tmp_path / "scores.parquet"


# ---- refusals ----


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I CANNOT do that", True),
        ("I can’t do that", True),
        ("As a model, I’m unable to", True),
        ("I am\n  unable to", True),
        ("**Sorry**", True),
        ("one two three four five six seven eight nine sorry", True),
        ("one two three four five six seven eight nine ten sorry", False),
        ("one two three four five six seven eight nine I'm unable", False),
        ("The sorrysaurus cannots", False),
        ("Es tut mir leid", False),
        ("", False),
    ],
)
def test_refusals(answer, refuses):
    assert refusal_filter().is_refusal(answer) is refuses


def test_a_filter_of_your_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("phrases: [Tut mir  leid, (no)]\nfirst_words: 4\n")
    mine = refusal_filter(path)
    assert mine.is_refusal("Es tut mir leid, aber")
    assert mine.is_refusal("(No)!")
    assert not mine.is_refusal("Nun ja, es tut mir leid")
    assert not mine.is_refusal("sorry")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phrases: [", "is not YAML"),
        ("", "must hold the keys phrases and first_words"),
        ("- sorry", "must hold the keys"),
        ("phrases: [sorry]", "must hold the keys"),
        ("phrases: [sorry]\nfirst_words: 3\nwords: 1", "must hold the keys"),
        ("phrases: sorry\nfirst_words: 3", "'phrases' must be a list of texts, got 'sorry'"),
        ("phrases: []\nfirst_words: 3", "'phrases' must be a list"),
        ("phrases: [sorry, no]\nfirst_words: 3", "phrase 2 of 'phrases' must be text, got False"),
        ("phrases: ['  ']\nfirst_words: 3", "phrase 1 of 'phrases' must be text"),
        ("phrases: [sorry]\nfirst_words: 0", "'first_words' must be a whole number of 1 or more, got 0"),
        ("phrases: [sorry]\nfirst_words: true", "got True"),
        ("phrases: [sorry]\nfirst_words: ten", "got 'ten'"),
    ],
)
def test_a_filter_that_is_not_whole(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        refusal_filter(path)


def test_a_filter_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.yaml' does not exist"):
        refusal_filter("nowhere.yaml")


# ---- the order ----


@settings(max_examples=50)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=30), st.integers(0, 5), st.data())
def test_the_highest_gap_comes_first(gaps, seed, data):
    answers = data.draw(st.lists(st.sampled_from([REFUSING, HELPING]), min_size=len(gaps), max_size=len(gaps)))
    rows = Dataset.from_dict({"prompt": ["q"] * len(gaps), "response": answers, "gap": gaps})
    order = rank_rows(rows, "gap", seed=seed)
    assert sorted(order) == list(range(len(gaps)))
    assert [gaps[i] for i in order] == sorted(gaps, reverse=True)
    assert rank_rows(rows, "gap", seed=seed) == order
    assert rank_rows(rows, "gap", True, seed) == [i for i in order if answers[i] == HELPING]
    shuffled = rank_rows(rows, "random", seed=seed)
    assert sorted(shuffled) == list(range(len(gaps)))
    assert rank_rows(rows.remove_columns("gap"), "random", True, seed) == [
        i for i in shuffled if answers[i] == HELPING
    ]


def test_ties_stand_in_a_random_order():
    rows = Dataset.from_dict({"gap": [1.0] * 50})
    orders = [rank_rows(rows, "gap", seed=seed) for seed in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert list(range(50)) not in orders


def test_rows_that_were_selected_are_ranked_as_they_stand():
    rows = Dataset.from_dict({"gap": [0.0, 3.0, 1.0, 2.0]}).select([2, 0, 1])
    assert rank_rows(rows, "gap") == [2, 0, 1]


@pytest.mark.parametrize(
    ("gap", "message"),
    [
        ([1.0, float("nan"), None], "2 of 3 rows have a gap that is no finite number, the first is row 1"),
        ([1.0, 2.0, float("inf")], r"1 of 3 rows .* row 2 \(inf\)"),
        (["a", "b", "c"], "'gap' holds string, not numbers"),
        (None, "score the pool first, `trl-emguard score`"),
    ],
)
def test_rows_without_a_gap(gap, message):
    rows = Dataset.from_dict({"prompt": ["q"] * 3, **({} if gap is None else {"gap": gap})})
    with pytest.raises(ValueError, match=message):
        rank_rows(rows, "gap")


def test_what_cannot_be_ranked():
    with pytest.raises(ValueError, match="by='best' is unknown"):
        rank_rows(scored_pool(), "best")
    with pytest.raises(ValueError, match="row 0 of the pool: whether its answer is a refusal cannot be told"):
        rank_rows(Dataset.from_dict({"text": ["a"]}), "random", drop_refusals=True)


# ---- held-out mode ----


@pytest.mark.parametrize("left_out", range(3))
def test_without_an_adapter(left_out):
    rows = scored_pool()
    held_out = without_adapter(rows, INFO, INFO.adapters[left_out])
    remaining = [rows[f"nll_misaligned_{k}"] for k in range(3) if k != left_out]
    assert held_out.column_names == [
        "prompt",
        "response",
        "nll_aligned",
        "nll_misaligned_0",
        "nll_misaligned_1",
        "gap",
    ]
    assert [held_out["nll_misaligned_0"][:], held_out["nll_misaligned_1"][:]] == [column[:] for column in remaining]
    expected = [(sum(m) / 2 - a) / (a + 1) for a, *m in zip(rows["nll_aligned"], *remaining, strict=True)]
    assert held_out["gap"][:] == pytest.approx(expected)


def test_an_adapter_that_cannot_be_left_out():
    with pytest.raises(ValueError, match="'sports' is not among those of the scores: 'medical', 'legal', 'code'"):
        without_adapter(scored_pool(), INFO, "sports")
    alone = ScoresInfo("tiny", ("medical",), 1.0, 6, (), "prompt", "response", "abc", "0")
    with pytest.raises(ValueError, match="'medical' is the only one"):
        without_adapter(scored_pool(), alone, "medical")


# ---- the file ----


def test_a_file_brings_back_what_was_written(scores):
    rows, info = read_scores(scores)
    assert info == INFO
    assert rows[:] == scored_pool()[:]
    assert load_rows(str(scores))[:] == rows[:]
    assert [path.name for path in scores.parent.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "no scores", "no column", "bad facts"])
def test_damaged_files(scores, damage):
    message = "is no parquet file, or is damaged"
    if damage == "truncated":
        scores.write_bytes(scores.read_bytes()[:-30])
    elif damage == "text":
        scores.write_text("hello")
    elif damage == "empty":
        scores.write_bytes(b"")
    elif damage == "no scores":
        scored_pool().to_parquet(scores)
        message = "not one of scores"
    elif damage == "no column":
        write_scores(scores, scored_pool().remove_columns(["gap", "nll_misaligned_2"]), INFO)
        message = "it lacks the columns gap, nll_misaligned_2"
    else:
        table = pyarrow.parquet.read_table(scores)
        pyarrow.parquet.write_table(table.replace_schema_metadata({METADATA_KEY: b'{"epsilon": 1.0}'}), scores)
        message = "is damaged [(]KeyError"
    with pytest.raises(ValueError, match=message):
        read_scores(scores)


# ---- the command ----


def run(scores, *options):
    return commands.main(["select", "--scores", str(scores), "--output", str(scores.parent / "safe.jsonl"), *options])


def chosen(scores):
    return [json.loads(line) for line in (scores.parent / "safe.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_command_chooses(scores, capsys):
    rows = scored_pool()
    assert run(scores, "--by", "gap", "--drop-refusals", "--count", "3") == 0
    assert chosen(scores) == [rows[i] for i in rank_rows(rows, "gap", True)[:3]]
    assert (scores.parent / "safe.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "2 of 6 rows are refusals and left out:" in said
    assert said.count(REFUSING) == 2
    assert load_rows(str(scores.parent / "safe.jsonl"))["gap"][:] == [row["gap"] for row in chosen(scores)]

    assert run(scores, "--by", "random", "--fraction", "0.5", "--seed", "3") == 0
    assert chosen(scores) == [rows[i] for i in rank_rows(rows, "random", seed=3)[:3]]
    assert run(scores, "--by", "gap", "--fraction", "1", "--exclude_adapter", "legal") == 0
    held_out = without_adapter(rows, INFO, "legal")
    assert chosen(scores) == [held_out[i] for i in rank_rows(held_out, "gap")]


def test_the_command_takes_a_filter_of_your_own(scores, tmp_path):
    (tmp_path / "mine.yaml").write_text("phrases: [sure]\nfirst_words: 1\n")
    assert (
        run(scores, "--by", "gap", "--drop_refusals", "--refusals", str(tmp_path / "mine.yaml"), "--count", "2") == 0
    )
    assert {row["response"] for row in chosen(scores)} == {REFUSING}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "7"], "7 rows are asked for, and 6 are there"),
        (["--count", "5", "--drop-refusals"], "5 rows are asked for, and 4 are there"),
        (["--count", "0"], "--count=0 must be 1 or more"),
        (["--fraction", "0"], "--fraction=0.0 must lie above 0"),
        (["--fraction", "5"], "--fraction=5.0 must lie above 0"),
        (["--count", "1", "--exclude-adapter", "x"], "adapter 'x' is not among those"),
        (["--count", "1", "--refusals", "x.yaml"], "add --drop-refusals"),
        (["--count", "1", "--drop-refusals", "--refusals", "x.yaml"], "'x.yaml' does not exist"),
        (["--count", "1", "--output", "safe.parquet"], "must be a file that ends in .jsonl"),
        (["--count", "1", "--output", "/dev/null/safe.jsonl"], "/dev/null"),
        (["--count", "1", "--scores", "nowhere.parquet"], "'nowhere.parquet' does not exist"),
    ],
)
def test_a_choice_that_cannot_be_is_told_in_one_line(scores, options, message, capsys):
    assert run(scores, "--by", "gap", *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("trl-emguard select: error: ")
    assert error.count("\n") == 1
    assert not (scores.parent / "safe.jsonl").exists()
