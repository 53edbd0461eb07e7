"""Mixing of general instruction rows (a pool) into training rows: in the collator, before packing, or in a stream."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info

from ...data.columns import laid_out_like, numbers_per_token
from ...data.places import PLACE, Loading
from .plan import MixPlan, StreamMixPlan


# Key of a batch: mask of the tokens that belong to rows of the pool, in the shape of `input_ids`. If [`mix_rows`] has
# mixed the rows (before packing, or in a stream), each row has a column of this name with a number per token. Bits of
# this number are OF_POOL, set in rows of the pool, and BEGINS, set at the first token of any row. With BEGINS, the
# rows inside of a pack can be counted.
INTERLEAVED = "interleaved"
OF_POOL, BEGINS = 1, 2
# Key of a batch: number of its rows that come from the training set, and number from the pool, `(2,)`.
ROW_COUNTS = "row_counts"


class MixingCollator:
    """Collator that adds rows of the pool to a micro-batch as the plan says, and marks their tokens.

    Args:
        collator: collator that makes a batch from rows.
        plan: plan of an epoch; `None` if the pool's rows were mixed in before.
        pool: tokenised rows of the pool, `input_ids` and `labels`, best first; `None` if `plan` is `None`.

    Returns:
        From a call: the batch of `collator`, with two more keys. [`INTERLEAVED`] is boolean, in the shape of
        `input_ids`. [`ROW_COUNTS`], `(2,)`, has the number of rows of the training set and of the pool. With a `plan`,
        rows that are only repeated to fill the last batch do not count.

    Raises:
        InactiveDefenseError: from a call: `collator` changes, drops or reorders rows.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], plan: MixPlan | None, pool: Dataset | None
    ):
        self.collator = collator
        self.plan = plan
        self.pool = pool

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        marks: list[list[bool]] = []  # for each token of each row, whether it belongs to the pool
        counts = [0, 0]  # number of rows in this batch: from the training set, and from the pool
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
            if "seq_lengths" in row:
                due = [{**safe, "seq_lengths": [len(safe["input_ids"])]} for safe in due]
            rows += due
            marks += [[True] * len(safe["input_ids"]) for safe in due]
            counts[0] += 1
            counts[1] += len(due)
        batch = self.collator(rows)
        batch[INTERLEAVED] = laid_out_like(batch["input_ids"], [row["input_ids"] for row in rows], marks)
        batch[ROW_COUNTS] = torch.tensor(counts)
        return batch


class Passes:
    """Counts of rows that each loader worker has read from a stream, in all passes (a short stream is read again).

    The counts are in memory that is shared with the loader's worker processes, because these may end after each pass.

    Args:
        shards: number of shards of the stream. At most this many workers of all ranks get rows.

    Attributes:
        part, parts: index of this process's part of the shards, and number of parts, as in [`Loading`].
        before, at: `(shards,)` each, number of rows that each worker has read: `before` in the passes before the
            current one, `at` in all passes up to now.
        resumed: `(1,)`, number of rows that the run had been trained on when it was resumed.
    """

    def __init__(self, shards: int):
        self.before, self.at = (torch.zeros(shards, dtype=torch.long).share_memory_() for _ in range(2))
        self.resumed = torch.zeros(1, dtype=torch.long).share_memory_()
        self.part, self.parts = 0, 1

    def reset(self, loading: Loading) -> None:
        """Set all counts to 0, and store which part of the stream this process reads, and how many parts there are.

        Rows that checks or an earlier training has read must not count in a new training.
        """
        state, self.parts = PartialState(), loading.parts if loading.parts <= len(self.at) else 1
        self.part = state.process_index * self.parts // state.num_processes
        for counts in (self.before, self.at, self.resumed):
            counts.zero_()

    def read(self, indices: list[int], plan: StreamMixPlan) -> tuple[list[int], StreamMixPlan]:
        """Count training rows that this loader worker has just read. Return their places, and the worker's plan.

        A place is a row's index among all rows that this worker has read, over all passes through the stream. The
        worker's plan is `plan` with the worker's number and the number of workers, both over all parts of the stream.

        Args:
            indices: index of each of these rows among the rows that this process reads in its current pass.
            plan: plan of the whole run.
        """
        info = get_worker_info()
        shards = -(-len(self.at) // self.parts)  # the largest number of shards in a part
        worker, of_part = (0, 1) if info is None else (info.id, min(info.num_workers, shards))
        workers = of_part * self.parts
        if indices[0] == 0:
            # Index 0 begins a new pass through the stream. A resumed Trainer first reads and skips rows that it was
            # trained on before, but at most one pass of them. If it was trained on more than one pass, this worker
            # has now read fewer rows (`at`) than its share (`done`) of `resumed`, a number for all workers together.
            # The second pass then continues the count from `done`, otherwise from `at`.
            done = -(-int(self.resumed) // workers) if self.at[worker] else 0
            self.before[worker] = max(int(self.at[worker]), done)
        before = int(self.before[worker])
        self.at[worker] = before + indices[-1] + 1
        of_worker = replace(plan, worker=self.part * of_part + worker, workers=workers)
        return [before + index for index in indices], of_worker


def mix_rows(
    rows: Dataset | IterableDataset,
    pool: Dataset,
    plan: MixPlan,
    passes: Passes | None = None,
    token_columns: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """Mix rows of a pool into rows that will be packed or are streamed.

    Args:
        rows: tokenised rows, `input_ids` and `labels`.
        pool: rows of the same form, best first.
        plan: plan that says which rows of `pool` follow each of `rows`.
        passes: counts of the rows read from a stream; `plan` must then be a [`StreamMixPlan`]. `None` for other rows.
        token_columns: columns of other defenses, with a number per token. The numbers are 0 in the pool's rows.

    Returns:
        The same kind of data set, with `input_ids`, `labels`, [`INTERLEAVED`] and `token_columns`.
    """

    kept = ["input_ids", "labels", *token_columns]

    def mix(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        places, part = (indices, plan) if passes is None else passes.read(indices, cast(StreamMixPlan, plan))
        mixed: dict[str, list] = {name: [] for name in (*kept, INTERLEAVED)}

        def add(row: dict[str, Any], kind: int) -> None:
            mixed["input_ids"].append(row["input_ids"])
            mixed["labels"].append(row["labels"])
            mixed[INTERLEAVED].append([kind | BEGINS] + [kind] * (len(row["input_ids"]) - 1))
            for name in token_columns:
                mixed[name].append(numbers_per_token(row, name))

        for place, *values in zip(places, *(batch[name] for name in kept), strict=True):
            add(dict(zip(kept, values, strict=True)), 0)
            for i in part.at(0, place):
                add(pool[i], OF_POOL)
        return mixed

    # Other columns are dropped, since the pool's rows have no values for them.
    return rows.select_columns(kept).map(mix, with_indices=True, batched=True)
