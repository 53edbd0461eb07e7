"""Rows of a pool among the rows of a training set: the plan of an epoch, and the ways in which it reaches the batches.

A map-style set that is not packed is mixed by the data collator: a sampler hands it the place of every row in the epoch's global
order, and the plan says which rows of the pool follow which place. Whatever is packed or streamed is mixed beforehand
([`mix_rows`]).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from ...evidence import InactiveDefenseError


# Of a batch: which tokens belong to a row of the pool, shaped as `input_ids`. Of a row that was mixed in before: the same, a number
# per token, and whether a row begins there, so that a pack of several says what is in it.
INTERLEAVED = "interleaved"
OF_POOL, BEGINS = 1, 2
# Of a batch: how many rows of the training set and of the pool are in it, `(2,)`.
ROW_COUNTS = "row_counts"
# Of a row on its way to the collator: its [`Place`].
PLACE = "place"


@dataclass(frozen=True)
class MixPlan:
    """Which rows of the pool stand behind which rows of the training set, as a function of seed, epoch and place alone.

    The j-th of S rows stands behind place ⌊(j + ½) · P / S⌋: evenly spread, so that any b places in a row carry at most
    ⌈b · S / P⌉ of them.

    Attributes:
        places: P, the training rows of an epoch.
        rows: S, the rows that an epoch takes from the pool, each once.
        pool: rows in the pool, S or more, best first.
        redraw: whether every epoch goes on in the pool where the last one stopped, beginning again at its end, instead of taking
            the first S each time.
        seed: of the order in which an epoch's rows come.
    """

    places: int
    rows: int
    pool: int
    redraw: bool
    seed: int

    def before(self, place: int) -> int:
        """How many of an epoch's rows stand before a place."""
        return (2 * place * self.rows + self.places - 1) // (2 * self.places)

    def at(self, epoch: int, place: int) -> list[int]:
        """The rows of the pool that stand behind a place."""
        due = range(self.before(place), self.before(place + 1))
        if not due:
            return []
        first = epoch * self.rows if self.redraw else 0
        order = _order(self.rows, self.seed, epoch)
        return [(first + int(order[j])) % self.pool for j in due]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class Place(NamedTuple):
    """Where a row stands.

    Attributes:
        row: its index in the data set.
        epoch: counted from 0.
        place: in the epoch's global order, over all ranks; `None` where the row is repeated to even out the last batches.
    """

    row: int
    epoch: int
    place: int | None


class PlacedRows(torch.utils.data.Dataset):
    """A data set that is asked for places instead of indices, and hands each row out with its place.

    It also knows the epoch, for the sampler: accelerate tells it to the data set in every case, but not to a sampler of two
    ranks that resume.
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
    """An epoch's places, in order.

    It leaves out what an engine would drop and repeats what it would repeat, so that the engine does neither and every place is
    met exactly once.

    Args:
        rows: what the places are of.
        order: the sampler of plain training.
        block: rows that all ranks take at once.
        drop_last: whether an incomplete last block is dropped.
        even: whether it is filled with rows from the beginning.
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


class MixingCollator:
    """Adds the rows that are due to a micro-batch, and says which tokens are theirs.

    Args:
        collator: makes a batch of rows.
        plan: of an epoch; `None` where the rows were mixed before.
        pool: tokenised rows, `input_ids` and `labels`, best first.

    Returns:
        From a call: the batch of `collator`, with [`INTERLEAVED`], boolean and shaped as `input_ids`, and [`ROW_COUNTS`], `(2,)`:
        rows of the training set, repeats left out, and of the pool.

    Raises:
        InactiveDefenseError: from a call: `collator` does not keep the rows as they are, in their order.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], plan: MixPlan | None, pool: Dataset | None
    ):
        self.collator = collator
        self.plan = plan
        self.pool = pool

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        marks: list[list[bool]] = []  # per row, per token
        counts = [0, 0]  # indexed by the mark
        for feature in features:
            row = {key: value for key, value in feature.items() if key not in (PLACE, INTERLEAVED)}
            rows.append(row)
            if self.plan is None or self.pool is None:
                marks.append([bool(mark & OF_POOL) for mark in feature[INTERLEAVED]])
                for mark in feature[INTERLEAVED]:
                    if mark & BEGINS:
                        counts[mark & OF_POOL] += 1
                continue
            marks.append([False] * len(row["input_ids"]))
            epoch, place = feature[PLACE].epoch, feature[PLACE].place
            if place is None:
                continue
            due = [self.pool[i] for i in self.plan.at(epoch, place)]
            rows += due
            marks += [[True] * len(safe["input_ids"]) for safe in due]
            counts[0] += 1
            counts[1] += len(due)
        batch = self.collator(rows)
        batch[INTERLEAVED] = _like(batch["input_ids"], [row["input_ids"] for row in rows], marks)
        batch[ROW_COUNTS] = torch.tensor(counts)
        return batch


def _like(input_ids: torch.Tensor, rows: list[list[int]], marks: list[list[bool]]) -> torch.Tensor:
    """Marks per token, laid out as a collator laid out the rows: padded on the right or the left, or one behind the other."""
    laid_out = torch.zeros_like(input_ids, dtype=torch.bool)
    if len(input_ids) != len(rows):  # padding-free
        rows, marks = [list(chain(*rows))], [list(chain(*marks))]
    for row, mark, line, places in zip(rows, marks, input_ids.tolist(), laid_out, strict=len(input_ids) == len(rows)):
        if line[: len(row)] == row:
            places[: len(row)] = torch.tensor(mark)
        elif line[len(line) - len(row) :] == row:
            places[len(line) - len(row) :] = torch.tensor(mark)
        else:
            break
    else:
        if len(input_ids) == len(rows):
            return laid_out
    raise InactiveDefenseError(
        "the data collator changes, drops or rearranges rows, so nobody can tell which of them were mixed in, and the run is not "
        "defended. Let it keep rows and their order, or leave `data_collator` out."
    )


def mix_rows(rows: Dataset | IterableDataset, pool: Dataset, plan: MixPlan) -> Dataset | IterableDataset:
    """Mix rows of a pool into rows that will be packed or are streamed.

    Args:
        rows: tokenised rows, `input_ids` and `labels`.
        pool: rows of the same form, best first.
        plan: of the rows. A stream that is longer begins it again, as another epoch.

    Returns:
        The same kind of data set, with `input_ids`, `labels` and [`INTERLEAVED`].
    """

    def mix(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        mixed: dict[str, list] = {"input_ids": [], "labels": [], INTERLEAVED: []}

        def add(row: dict[str, Any], kind: int) -> None:
            mixed["input_ids"].append(row["input_ids"])
            mixed["labels"].append(row["labels"])
            mixed[INTERLEAVED].append([kind | BEGINS] + [kind] * (len(row["input_ids"]) - 1))

        for index, ids, labels in zip(indices, batch["input_ids"], batch["labels"], strict=True):
            add({"input_ids": ids, "labels": labels}, 0)
            for i in plan.at(*divmod(index, plan.places)):
                add(pool[i], OF_POOL)
        return mixed

    # Other columns have no values for the pool's rows.
    return rows.select_columns(["input_ids", "labels"]).map(mix, with_indices=True, batched=True)


def planned_rows(places: int, fraction: float) -> int:
    """How many rows of a pool make up a fraction of a mix that holds `places` other rows."""
    return round(places * fraction / (1 - fraction))
