"""Places: every training row with its position in the global order of an epoch.

A loader that hands out places lets a data collator know what is due behind a row, whatever the ranks, the workers and
the resumed step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import Sampler


# Key of a row on its way to the collator: its [`Place`].
PLACE = "place"

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Loading:
    """How training rows become batches. A defense may change it.

    Attributes:
        rows: tokenised rows.
        order: sampler of plain training; `None` for a stream.
        collator: function from rows to a batch.
        block: rows that all ranks take at once.
        drop_last: whether an incomplete last block is dropped.
        even: whether an incomplete last block is filled with rows from the beginning.
        max_steps: optimizer steps of the run, 0 or less where epochs decide.
        epochs: epochs of the run.
        accumulation: micro-batches of a step.
    """

    rows: Any
    order: Sampler | None
    collator: Collator
    block: int
    drop_last: bool
    even: bool
    max_steps: int
    epochs: float
    accumulation: int


class Place(NamedTuple):
    """Position of a row.

    Attributes:
        row: its index in the data set.
        epoch: counted from 0.
        place: position in the epoch's global order, over all ranks; `None` where the row is repeated to even out the
            last batches.
    """

    row: int
    epoch: int
    place: int | None


class PlacedRows(torch.utils.data.Dataset):
    """A data set that is asked for places instead of indices, and hands each row out with its place.

    It also knows the epoch, for the sampler: accelerate always tells the data set, but not the sampler of two ranks
    that resume.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> dict[str, Any]:
        return {**self.rows[place.row], PLACE: place}

    def __getitems__(self, places: Sequence[Place]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__([place.row for place in places])
        return [{**row, PLACE: place} for row, place in zip(rows, places, strict=True)]


class PlaceSampler(Sampler[Place]):
    """Sampler of an epoch's places, in order.

    It leaves out what an engine would drop and repeats what an engine would repeat, so that the engine does neither
    and every place is met exactly once.

    Args:
        rows: data set that is asked for the places.
        order: sampler of plain training.
        block: rows that all ranks take at once.
        drop_last: whether an incomplete last block is dropped.
        even: whether an incomplete last block is filled with rows from the beginning.
    """

    def __init__(self, rows: PlacedRows, order: Sampler[int], block: int, drop_last: bool, even: bool):
        self.rows = rows
        self.order = order
        self.block = block
        self.places = len(order) // block * block if drop_last else len(order)  # type: ignore[arg-type]
        self.repeats = -self.places % block if even else 0

    def __len__(self) -> int:
        return self.places + self.repeats

    def __iter__(self) -> Iterator[Place]:
        epoch = self.rows.epoch
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)
        order = list(self.order)
        for place in range(self.places):
            yield Place(order[place], epoch, place)
        for place in range(self.repeats):
            yield Place(order[place % self.places], epoch, None)
