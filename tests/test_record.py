"""Facts that identify a run: its rows, however the trainer has tokenised them."""

import pytest
from datasets import Dataset, Image
from tiny import make_model

from trl_emguard.record import run_identity


SFT = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "messages": "a"}
PREFERENCES = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "ref_chosen_logps": -1.5}
JUDGED = {"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "KL_completion_ids": [7]}
RAW = {"prompt": [{"role": "user", "content": "q"}], "answer": 4.5, "label": "y", "image": b"x"}


def identity(*rows):
    return run_identity(make_model(), Dataset.from_list(list(rows)), seed=0)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (SFT, {"labels": [-100, -100, 3]}),
        (PREFERENCES, {"chosen_ids": [4, 5], "rejected_ids": [3]}),
        (PREFERENCES, {"chosen_ids": [3, 4], "rejected_ids": [5]}),
        (JUDGED, {"label": False}),
        (RAW, {"prompt": [{"role": "user", "content": "p"}]}),
        (RAW, {"answer": None}),
        (RAW, {"image": b"y"}),
    ],
)
def test_other_rows_are_another_run(row, change):
    one, again, other = (identity(row, last) for last in (row, dict(row), row | change))
    assert one == again
    assert {name for name in one if one[name] != other[name]} == {"rows"}


def test_pictures_do_not_count():
    """Reading them takes long, and a data set on another machine has other paths."""
    rows = [Dataset.from_list([{"text": "a", "image": path}]).cast_column("image", Image()) for path in ("/a", "/b")]
    one, other = (run_identity(make_model(), pictures, seed=0) for pictures in rows)
    assert one == other != run_identity(make_model(), rows[0].remove_columns("text"), seed=0)


@pytest.mark.parametrize(
    ("row", "change"),
    [(SFT, {"messages": "b"}), (PREFERENCES, {"ref_chosen_logps": -2.0}), (JUDGED, {"KL_completion_ids": [3]})],
)
def test_columns_that_are_not_the_rows_own_do_not_count(row, change):
    """The batch size changes some of them, and the rounding of a device others."""
    assert identity(row) == identity(row | change)
