"""Places: the positions of training rows in the global order of an epoch.

If each row comes with its place, a data collator can decide from the place which other rows to mix in after that row.
The decision is the same for any number of ranks and workers, and after resuming.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import Sampler


# Key under which a row brings its [`Place`] to the collator.
PLACE = "place"

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Loading:
    """Settings by which training rows become batches. A defense may change them.

    Attributes:
        rows: tokenised rows.
        order: sampler of the rows; `None` for a stream.
        collator: function from rows to a batch.
        block: number of rows in a micro-batch, summed over all ranks.
        parts: number of parts that a stream's shards are split into, one for each rank with rows of its own. A stream
            with fewer shards is not split: each rank reads all of it, and keeps its share of every block.
        drop_last: whether rows at the end of an epoch that do not fill a block are dropped.
        even: whether an incomplete last block is filled up with rows from the beginning of the epoch.
        max_steps: number of optimizer steps of the run; 0 or less if `epochs` limits the run.
        epochs: number of epochs of the run.
        accumulation: number of micro-batches in an optimizer step.
    """

    rows: Any
    order: Sampler | None
    collator: Collator
    block: int
    parts: int
    drop_last: bool
    even: bool
    max_steps: int
    epochs: float
    accumulation: int


class Place(NamedTuple):
    """Index of a row and its position in an epoch.

    Attributes:
        row: index of the row in the data set.
        epoch: number of the epoch, counted from 0.
        place: position in the epoch's global order, over all ranks; `None` if the row is repeated to even out the last
            batches.
    """

    row: int
    epoch: int
    place: int | None


class PlacedRows(torch.utils.data.Dataset):
    """Data set that takes a [`Place`] instead of an index, and returns the row together with its place.

    It also stores the epoch for the sampler. accelerate always calls the data set's `set_epoch`, but does not call the
    sampler's when a run on two ranks resumes.
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
    """Sampler that yields the places ([`Place`]) of the rows of an epoch, in order.

    accelerate would drop an incomplete last block of rows, or fill it up with repeated rows. This sampler drops or
    repeats rows itself, so that accelerate has none to drop or repeat and every place comes exactly once.

    Args:
        rows: data set that takes the places.
        order: sampler of the rows' indices.
        block: number of rows in a micro-batch, summed over all ranks.
        drop_last: whether rows at the end of an epoch that do not fill a block are dropped.
        even: whether an incomplete last block is filled up with rows from the beginning of the epoch.
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
