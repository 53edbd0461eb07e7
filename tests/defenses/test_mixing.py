"""Test the plan of an epoch: every place comes once, over sizes, ranks, workers and resumption."""

import math

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler

from trl_emguard.data.places import PlacedRows, PlaceSampler
from trl_emguard.defenses.interleaving.collator import (
    INTERLEAVED,
    ROW_COUNTS,
    MixingCollator,
    Passes,
    mix_rows,
)
from trl_emguard.defenses.interleaving.plan import MixPlan, StreamMixPlan, planned_rows
from trl_emguard.evidence import InactiveDefenseError


POOL = 1000  # first id of the pool's rows


def tokenised(count, first=0):
    """Return rows of one to three tokens, each token the number of its row."""
    ids = [[first + i] * (i % 3 + 1) for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [-1] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": ids}


@st.composite
def plans(draw):
    places = draw(st.integers(1, 200))
    rows = max(1, round(places * draw(st.floats(0.01, 2.5))))
    return MixPlan(places, rows, rows + draw(st.integers(0, 20)), draw(st.booleans()), draw(st.integers(0, 5)))


@given(plans(), st.integers(0, 3))
def test_an_epoch_takes_each_planned_row_once(plan, epoch):
    rows = [row for place in range(plan.places) for row in plan.at(epoch, place)]
    assert len(rows) == len(set(rows)) == plan.rows
    first = epoch * plan.rows if plan.redraw else 0
    assert set(rows) == {(first + i) % plan.pool for i in range(plan.rows)}
    assert plan.before(0) == 0
    assert plan.before(plan.places) == plan.rows


@given(plans(), st.integers(1, 40), st.data())
def test_neighbouring_places_carry_no_more_than_their_share(plan, count, data):
    first = data.draw(st.integers(0, plan.places - 1))
    last = min(plan.places, first + count)
    share = (last - first) * plan.rows / plan.places
    assert sum(len(plan.at(0, place)) for place in range(first, last)) <= math.ceil(share)
    # No row falls behind: up to any place, the due rows are there, to half a row.
    assert abs(plan.before(last) - last * plan.rows / plan.places) <= 0.5


def test_the_order_differs_from_epoch_to_epoch_and_with_the_seed():
    def rows(seed, epoch):
        plan = MixPlan(100, 30, 50, False, seed)
        return [row for place in range(100) for row in plan.at(epoch, place)]

    assert rows(0, 0) == rows(0, 0)
    assert sorted(rows(0, 0)) == sorted(rows(0, 1)) == list(range(30))
    assert rows(0, 0) != rows(0, 1)
    assert rows(0, 0) != rows(1, 0)


def loaders(rows, ranks, batch, drop_last, even, seed, workers=0, sequential=False, plan_rows=None):
    """Return the plan, and one loader per rank as Trainer and accelerate make them."""
    made = []
    for rank in range(ranks):
        placed = PlacedRows(rows)
        order = SequentialSampler(rows) if sequential else SeedableRandomSampler(rows, data_seed=seed)
        sampler = PlaceSampler(placed, order, batch * ranks, drop_last, even and ranks > 1 and not drop_last)
        plan = None
        if sampler.places:
            count = max(1, planned_rows(sampler.places, 0.2)) if plan_rows is None else plan_rows
            plan = MixPlan(sampler.places, count, count + 3, False, seed)
        loader = DataLoader(
            placed,
            batch_size=batch,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=MixingCollator(pad, plan, tokenised(0 if plan is None else plan.pool, POOL)),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        made.append(
            prepare_data_loader(
                loader, num_processes=ranks, process_index=rank, even_batches=even, put_on_device=False
            )
        )
    return made, plan


def contents(batch):
    """Return the rows of a batch in order: (number, True for a row of the pool)."""
    ids, marks = batch["input_ids"], batch[INTERLEAVED]
    assert marks.shape == ids.shape
    assert (marks == (ids >= POOL))[ids != -1].all()
    rows = [(int(row[0]), bool(mark[0])) for row, mark in zip(ids, marks, strict=True)]
    assert batch[ROW_COUNTS][1] == sum(mark for _, mark in rows)
    return rows


def epoch_of(prepared, epoch):
    """Return the batches of an epoch per rank, as lists of rows."""
    for loader in prepared:
        loader.set_epoch(epoch)
    return [[(contents(batch), batch[ROW_COUNTS].tolist()) for batch in loader] for loader in prepared]


@settings(max_examples=150)
@given(
    st.integers(1, 40), st.sampled_from([1, 2, 3]), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 3),
    st.booleans(),
)  # fmt: skip
def test_every_planned_row_comes_once_in_every_epoch_on_any_number_of_ranks(
    count, ranks, batch, drop_last, even, seed, sequential
):
    rows = tokenised(count)
    prepared, plan = loaders(rows, ranks, batch, drop_last, even, seed, sequential=sequential)
    if plan is None:  # all rows are dropped, which the trainer refuses
        return
    plain = [
        prepare_data_loader(
            DataLoader(rows.with_format("torch"), batch_size=batch, sampler=order, drop_last=drop_last,
                collate_fn=lambda r: r),
            num_processes=ranks, process_index=rank, even_batches=even, put_on_device=False,
        )
        for rank in range(ranks)
        for order in [SequentialSampler(rows) if sequential else SeedableRandomSampler(rows, data_seed=seed)]
    ]  # fmt: skip
    for epoch in range(2):
        by_rank = epoch_of(prepared, epoch)
        met = [row for batches in by_rank for rows_, _ in batches for row in rows_]
        safe = [number - POOL for number, mark in met if mark]
        assert sorted(safe) == list(range(plan.rows))
        # Batch by batch, the training rows are those of plain training.
        for loader, batches in zip(plain, by_rank, strict=True):
            loader.set_epoch(epoch)
            expected = [[int(row["input_ids"][0]) for row in rows_] for rows_ in loader]
            assert [[number for number, mark in rows_ if not mark] for rows_, _ in batches] == expected
        # Repeats are not counted, and bring no row of the pool.
        counted = sum(counts[0] for batches in by_rank for _, counts in batches)
        assert counted == plan.places
        share = batch * plan.rows / plan.places
        assert max(counts[1] for batches in by_rank for _, counts in batches) <= math.ceil(share)


@settings(max_examples=60)
@given(st.integers(4, 40), st.sampled_from([1, 2]), st.integers(1, 4), st.booleans(), st.data())
def test_resuming_in_the_middle_of_an_epoch_goes_on_with_the_plan(count, ranks, batch, drop_last, data):
    rows = tokenised(count)
    prepared, plan = loaders(rows, ranks, batch, drop_last, True, 1)
    if plan is None:
        return
    epoch_of(prepared, 0)
    whole = epoch_of(prepared, 1)
    skip = data.draw(st.integers(1, len(whole[0])))
    # A new process has fresh loaders, which have not seen epoch 0.
    fresh, _ = loaders(rows, ranks, batch, drop_last, True, 1)
    resumed = epoch_of([skip_first_batches(loader, skip) for loader in fresh], 1)
    assert resumed == [batches[skip:] for batches in whole]
    # The next epoch begins with its planned rows.
    assert epoch_of(fresh, 2) == epoch_of(prepared, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_persistent_workers_see_every_epoch(ranks):
    rows = tokenised(13)
    without, _ = loaders(rows, ranks, 2, False, True, 3)
    with_workers, _ = loaders(rows, ranks, 2, False, True, 3, workers=4 // ranks)
    for epoch in range(3):
        assert epoch_of(with_workers, epoch) == epoch_of(without, epoch)


def test_padding_free_batches_are_marked_token_by_token():
    def flatten(rows):
        ids = [token for row in rows for token in row["input_ids"]]
        return {"input_ids": torch.tensor([[*ids, -1, -1]])}  # padded to a multiple

    rows = PlacedRows(tokenised(4))
    sampler = PlaceSampler(rows, SequentialSampler(rows.rows), 4, False, False)
    collator = MixingCollator(flatten, MixPlan(4, 2, 2, False, 0), tokenised(2, POOL))
    batch = collator(rows.__getitems__(list(sampler)))
    assert (batch[INTERLEAVED] == (batch["input_ids"] >= POOL)).all()
    assert batch[ROW_COUNTS].tolist() == [4, 2]


def test_packs_are_marked_and_counted_row_by_row():
    packs = [
        {"input_ids": [1, POOL, POOL], "labels": [1, POOL, POOL], INTERLEAVED: [2, 3, 1]},
        {"input_ids": [2, 3, POOL, 4, 5], "labels": [2, 3, POOL, 4, 5], INTERLEAVED: [2, 2, 1, 0, 2]},  # cut anywhere
    ]
    batch = MixingCollator(pad, None, None)(packs)
    assert (batch[INTERLEAVED] == (batch["input_ids"] >= POOL))[batch["input_ids"] != -1].all()
    assert batch[ROW_COUNTS].tolist() == [4, 1]


def pad_left(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    return {"input_ids": torch.tensor([[-1] * (longest - len(row["input_ids"])) + row["input_ids"] for row in rows])}


def sort_by_length(rows):
    return pad(sorted(rows, key=lambda row: len(row["input_ids"])))


def lose_the_last(rows):
    return pad(rows[:-1])


def change_tokens(rows):
    return pad([{"input_ids": [token + 1 for token in row["input_ids"]]} for row in rows])


@pytest.mark.parametrize(
    ("inner", "keeps"),
    [(pad, True), (pad_left, True), (sort_by_length, False), (lose_the_last, False), (change_tokens, False)],
)
def test_a_collator_must_keep_rows_and_their_order(inner, keeps):
    rows = PlacedRows(tokenised(3))
    sampler = PlaceSampler(rows, SequentialSampler(rows.rows), 3, False, False)
    collator = MixingCollator(inner, MixPlan(3, 2, 2, False, 0), tokenised(2, POOL))
    features = rows.__getitems__(list(sampler))
    if keeps:
        batch = collator(features)
        assert (batch[INTERLEAVED] == (batch["input_ids"] >= POOL))[batch["input_ids"] != -1].all()
    else:
        with pytest.raises(InactiveDefenseError, match="changes, drops or rearranges rows"):
            collator(features)


@settings(max_examples=25)
@given(st.integers(2, 60), st.floats(0.05, 0.6), st.integers(0, 3))
def test_rows_mixed_beforehand_hold_the_share_evenly(count, fraction, seed):
    planned = planned_rows(count, fraction)
    if not planned:
        return
    mixed = mix_rows(tokenised(count), tokenised(planned + 2, POOL), MixPlan(count, planned, planned + 2, False, seed))
    numbers = [ids[0] for ids in mixed["input_ids"]]
    assert [n for n in numbers if n < POOL] == list(range(count))
    assert sorted(n - POOL for n in numbers if n >= POOL) == list(range(planned))
    for ids, marks in zip(mixed["input_ids"], mixed[INTERLEAVED], strict=True):
        kind = int(ids[0] >= POOL)
        assert marks == [2 + kind] + [kind] * (len(ids) - 1)
    for place in range(count):
        upto = numbers[: numbers.index(place)]
        assert abs(sum(n >= POOL for n in upto) - place * planned / count) <= 1


def stream_of(count, shards=1):
    ids = [[i] for i in range(count)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "text": ["left out"] * count})
    return rows.to_iterable_dataset(num_shards=shards)


def mixed_stream(count, fraction, shards=1):
    """Return a mixed stream and its progress. The plan is shorter than the stream, and the pool larger than needed."""
    passes = Passes(shards)
    plan = StreamMixPlan(9, 1, 400, False, 0, fraction / (1 - fraction))
    return mix_rows(stream_of(count, shards), tokenised(400, POOL), plan, passes), passes


@settings(max_examples=30)
@given(st.integers(1, 60), st.floats(0.05, 0.6), st.integers(1, 4))
def test_a_stream_that_begins_again_goes_on_in_the_pool(count, fraction, times):
    mixed, _ = mixed_stream(count, fraction)
    safe = []
    for done in range(1, times + 1):
        rows = list(mixed)
        assert all(set(row) == {"input_ids", "labels", INTERLEAVED} for row in rows)
        numbers = [row["input_ids"][0] for row in rows]
        assert [n for n in numbers if n < POOL] == list(range(count))
        safe += [n - POOL for n in numbers if n >= POOL]
        assert abs(len(safe) - done * count * fraction / (1 - fraction)) <= 1
    # The pool's first rows come, each once before any comes again.
    assert safe == [i % 400 for i in range(len(safe))]


@pytest.mark.parametrize(("shards", "ranks", "workers"), [(2, 2, 0), (3, 2, 0), (4, 2, 2), (4, 2, 3), (3, 2, 2)])
def test_ranks_that_read_shards_of_their_own_share_the_plan(shards, ranks, workers):
    safe = []
    for rank in range(ranks):
        mixed, passes = mixed_stream(60, 0.2, shards)
        passes.part, passes.parts = rank, ranks
        loader = prepare_data_loader(
            DataLoader(mixed, collate_fn=pad, num_workers=workers), num_processes=ranks, process_index=rank,
            put_on_device=False, dispatch_batches=False,
        )  # fmt: skip
        numbers = [int(batch["input_ids"][0, 0]) for batch in loader]
        assert 20 <= sum(n < POOL for n in numbers) <= 40
        safe += [n - POOL for n in numbers if n >= POOL]
    assert len(set(safe)) == len(safe)
    assert abs(len(safe) - 60 * 0.2 / 0.8) <= shards
    if shards % ranks == 0:  # ranks with equally many rows take the pool's best rows, up to one for each worker
        assert max(safe) < len(safe) + shards


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (1, 3), (2, 2), (3, 2), (2, 3)])
def test_workers_of_a_stream_share_its_plan(shards, workers, persistent):
    mixed, _ = mixed_stream(30, 0.2, shards)
    loader = DataLoader(mixed, collate_fn=pad, num_workers=workers, persistent_workers=persistent)
    safe = []
    for done in range(1, 4):
        numbers = [int(batch["input_ids"][0, 0]) for batch in loader]
        assert sorted(n for n in numbers if n < POOL) == list(range(30))
        safe += [n for n in numbers if n >= POOL]
        # Each worker that has rows keeps the share.
        assert abs(len(safe) - done * 30 * 0.2 / 0.8) <= min(shards, workers)
    assert len(set(safe)) == len(safe)


def test_a_stream_resumed_in_a_later_pass_takes_further_rows():
    mixed, passes = mixed_stream(20, 0.2)
    passes.resumed.fill_(50)  # rows of two passes and a half
    first = [row["input_ids"][0] - POOL for row in mixed if row["input_ids"][0] >= POOL]
    later = [row["input_ids"][0] - POOL for row in mixed if row["input_ids"][0] >= POOL]
    assert first == [0, 1, 2, 3, 4]
    assert later == [13, 14, 15, 16, 17]
