"""Interleaving (Kaczér et al., 2508.06249): general instruct rows, random or chosen by score, among training rows."""

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ...data.places import PLACE, Loading, PlacedRows, PlaceSampler
from ...data.prepare import Rows, StreamPlan, Tokenizing
from ...evidence import InactiveDefenseError
from ..base import IN_TRAINING_DEFENSES, Defense
from ..options import check_flag
from ..step import Marks, Step
from .collator import INTERLEAVED, ROW_COUNTS, MixingCollator, Passes, mix_rows
from .options import InterleavingOptions
from .plan import MixPlan, StreamMixPlan, planned_rows
from .pool import Pool


logger = get_logger(__name__)

# A packed or streamed run is stopped if, by the plan, at least this many of the pool's rows (general instruct rows)
# should have been in the batches by now, and none was. A smaller number may be late by chance, because packs and
# streamed rows may be shuffled.
PATIENCE_ROWS = 20


class Interleaving(Defense):
    """General instruct rows of a pool, spread evenly among training rows: they are `interleave_fraction` of the mix.

    This class takes random rows. [`InterleavingPlus`] and [`InterleavingPlusPlus`] take rows that misaligned models
    find hard and the aligned model finds easy (the top of the pool by perplexity gap), with and without refusals. A
    row that cannot be used (no answer, no token to train on, or longer than `max_length`) is left out, counted and
    reported, and the next row of the pool is used instead.
    """

    name = "interleave"
    papers = (IN_TRAINING_DEFENSES,)
    Options = InterleavingOptions
    switch = "interleave_fraction"
    inputs = ("interleave_dataset",)
    own_loss = True  # this package, not TRL, forms the loss, to log the CE of training and pool rows separately
    scopes = (INTERLEAVED,)
    columns = (PLACE, INTERLEAVED)
    running_metrics = ("interleaved_fraction",)

    by: ClassVar[Literal["gap", "random"]] = "random"
    drop_refusals: ClassVar[bool] = False

    def __init__(self, args: Any, interleave_dataset: Dataset | None = None):
        self.fraction = args.interleave_fraction
        self.redraw = args.interleave_redraw
        self.source = args.interleave_dataset
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.max_length = args.max_length
        self.pool: Pool | None = None
        if self.fraction:
            choice = (self.name, self.by, self.drop_refusals, self.seed)
            rows = {name: getattr(args, f"interleave_{name}") for name in ("config", "split", "where")}
            self.pool = Pool(interleave_dataset, self.source, *choice, **rows)
        self.plan: MixPlan | None = None
        self._documents = 1.0  # mean number of documents in a training row: above 1 if the user's rows are packed
        self.mixed_before = False  # true if `add_rows` has mixed the pool's rows in; then the collator mixes none in
        self._passes: Passes | None = None  # counts of the rows read from a stream; `None` without a stream
        self._epochs = 1  # number of epochs that the run begins, even if it does not finish the last one
        self._counts = [0, 0]  # numbers of rows trained on so far: of the training set, and of the pool
        self._counts_before = [0, 0]  # `_counts` when this `train()` call began: zeros, or the checkpoint's numbers

    # ---- options ----

    @classmethod
    def check_options(cls, args: Any) -> None:
        fraction = args.interleave_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise ValueError(
                f"interleave_fraction={fraction!r} is no share of the mix: give a number from 0 (off) to below 1, as "
                "0.05."
            )
        check_flag("interleave_redraw", args.interleave_redraw)
        if fraction:
            cls._check_loading(args)

    @classmethod
    def _check_loading(cls, args: Any) -> None:
        """Refuse options of data loading under which mixed-in rows would not come as planned."""
        who, packing = f"defense={cls.name!r}", getattr(args, "packing", False)
        if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
            raise ValueError(
                f"dataset_kwargs={{'skip_prepare_dataset': True}} does not work with {who}: the rows to mix in want "
                "the same preparation as the others. Leave it out; rows that are tokenised already stay as they are."
            )
        if args.train_sampling_strategy not in ("random", "sequential") and not packing:
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} does not work with {who}: it arranges "
                "batches by length, so the mixed-in rows would not be spread evenly. Use 'random' or 'sequential', or "
                "packing=True, which is mixed before it is packed."
            )
        if packing and args.interleave_redraw:
            raise ValueError(
                "interleave_redraw=True does not work with packing=True, which is mixed once, before it is packed. "
                "Leave it out."
            )
        # `accelerator_config` is a dict until transformers has parsed it.
        loading = args.accelerator_config
        get = loading.get if isinstance(loading, dict) else lambda name: getattr(loading, name, None)
        if get("dispatch_batches"):
            raise ValueError(
                f"accelerator_config: dispatch_batches=True does not work with {who}: one process would cut batches "
                "of different sizes into even parts. Leave it out."
            )
        if get("use_seedable_sampler") is False and not packing:
            raise ValueError(
                f"accelerator_config: use_seedable_sampler=False does not work with {who}: its plan wants an order "
                "that follows from the seed. Leave it out."
            )

    @classmethod
    def check_with(cls, args: Any, others: Any) -> None:
        second = next((other for other in others if issubclass(other, Interleaving)), None)
        if second is not None:
            names = " and ".join(sorted((cls.name, second.name)))
            raise ValueError(f"defense={args.defense!r}: {names} choose rows of the same pool: name one of them.")

    def options(self) -> dict[str, Any]:
        pool = None if self.pool is None else self.pool.describe()
        return {
            "interleave_dataset": pool or self.source,
            "interleave_fraction": float(self.fraction),
            "interleave_redraw": self.redraw,
        }

    def options_like(self, then: dict[str, Any], is_on_all_ranks: bool) -> dict[str, Any]:
        # A checkpoint records the pool as a text with a checksum of its rows (this text contains "ranked"). An earlier
        # version took the checksum of their tokens. Processes wait for each other while they tokenise. If only
        # some of them call this function, the recorded text is returned instead, and the pool counts as unchanged.
        recorded = str(then.get("interleave_dataset"))
        if self.pool is None or "ranked" in recorded:
            return self.options()
        return {**self.options(), "interleave_dataset": self.pool.describe_tokens() if is_on_all_ranks else recorded}

    def describe(self) -> list[str]:
        if self.plan is None or self.pool is None:
            return []
        where = "before packing or streaming" if self.mixed_before else "by the data collator"
        refusals = f" ({self.pool.refusals} refusals left out)" if self.drop_refusals else ""
        share = self.plan.rows / (self.plan.places * self._documents + self.plan.rows)
        return [
            f"{self.plan.rows} of the pool's {len(self.pool.ranked)} rows{refusals} are mixed into {self.plan.places} "
            f"training rows an epoch ({share:.2%} of the mix), {where}. {self.pool.looked_at} rows of the pool were "
            "looked at."
        ]

    def check_model(self, config: Any) -> None:
        cast(Pool, self.pool).check_model(getattr(config, "_name_or_path", ""))

    # ---- rows ----

    def prepare_rows(self, rows: Rows) -> Rows:
        shared = cast(Pool, self.pool).shared_prompts(rows) if isinstance(rows, Dataset) else 0
        if shared:
            logger.warning(
                f"defense {self.name!r}: {shared} of {len(rows)} training rows ask what a row of the pool asks too: "
                "the two may teach opposite answers. Take such rows out of interleave_dataset."
            )
        return rows

    def prepare_tokenized(self, rows: Rows, tokenizing: Tokenizing) -> Rows:
        cast(Pool, self.pool).tokenise_by(tokenizing, self.max_length)
        return rows

    def add_rows(self, rows: Rows, plan: StreamPlan) -> Rows:
        self.mixed_before = True
        if "seq_lengths" in next(iter(rows)):
            raise ValueError(
                f"defense={self.name!r}: the training rows are packed already, and packing=True or a stream would "
                "lose where the documents of a pack begin. Pass them as a `Dataset` and leave `packing` out, or pass "
                "rows that are not packed."
            )
        if plan.rows is not None:
            places = plan.rows
        elif self.redraw or plan.rows_of_run is None:
            raise ValueError(
                f"interleave_redraw={self.redraw} and max_steps={plan.max_steps} with a streamed train_dataset: it "
                "has no epochs. Leave `interleave_redraw` out, and give `max_steps`."
            )
        else:
            # `rows_of_run` and `packs_ahead` count rows (or packs) of the mix, that is, training rows and the pool's
            # rows together. `places` and `ahead` count only the training rows among them.
            rows_of_pack = self._rows_of_pack(plan)
            places = round(plan.rows_of_run * rows_of_pack * (1 - self.fraction))
            ahead = round(plan.packs_ahead * rows_of_pack * (1 - self.fraction))
        if isinstance(rows, IterableDataset):
            self._passes = Passes(rows.num_shards)
            mix = self._make_stream_plan(places, ahead)
        else:
            mix = self.make_plan(places)
        return mix_rows(rows, self._pool_rows, mix, self._passes, plan.token_columns)

    def _rows_of_pack(self, plan: StreamPlan) -> float:
        """Return how many rows of the mix fit into a pack of a stream, on average; 1 if rows are not packed."""
        if plan.tokens_of_pack is None:
            return 1
        lengths = [len(ids) for ids in cast(Pool, self.pool).take(1)["input_ids"]]
        mean = (1 - self.fraction) * plan.mean_tokens + self.fraction * sum(lengths) / max(len(lengths), 1)
        return plan.tokens_of_pack / max(mean, 1)

    def train_loader(self, loading: Loading) -> Loading:
        if self.mixed_before:
            if self._passes is not None:
                self._passes.reset(loading)
            return replace(loading, collator=MixingCollator(loading.collator, None, None))
        rows = PlacedRows(loading.rows)
        sampler = PlaceSampler(rows, cast(Any, loading.order), loading.block, loading.drop_last, loading.even)
        plan = self._plan_epochs(sampler, loading)
        collator = MixingCollator(loading.collator, plan, self._pool_rows)
        return replace(loading, rows=rows, order=sampler, collator=collator)

    def extra_rows(self) -> Dataset | None:
        if self.mixed_before or self.plan is None:
            return None
        plan = self.plan
        taken = min(plan.pool, plan.rows * self._epochs) if plan.redraw else plan.rows
        return self._pool_rows.select(range(taken))

    @property
    def _pool_rows(self) -> Dataset:
        return cast(Dataset, cast(Pool, self.pool).tokenised)

    def make_plan(self, places: int, epochs: int = 1) -> MixPlan:
        """Make the plan of an epoch, and tokenise the rows of the pool that the run needs.

        Args:
            places: number of training rows in an epoch.
            epochs: number of epochs that the run begins, even if it does not finish the last one.

        Raises:
            ValueError: the pool is smaller than what an epoch takes from it, or nothing would be mixed in.
        """
        rows = self._take(round(places * self._documents), epochs if self.redraw else 1)
        self.plan = MixPlan(places, rows, len(self._pool_rows), self.redraw, self.seed)
        return self.plan

    def _make_stream_plan(self, places: int, ahead: int) -> MixPlan:
        """Make the plan of a run of `places` training rows from a stream, with `ahead` more in a shuffle buffer."""
        # A loader worker with more rows than others reaches further into the pool. So twice as many of the pool's
        # rows are tokenised as `places + ahead` training rows need.
        rows = self._take(places, 2 * (1 + ahead / max(places, 1)))
        rate = self.fraction / (1 - self.fraction)
        self.plan = StreamMixPlan(places, rows, len(self._pool_rows), self.redraw, self.seed, rate)
        return self.plan

    def _take(self, places: int, times: float) -> int:
        """Return how many rows of the pool are mixed into `places` training rows, and tokenise `times` this number.

        Raises:
            ValueError: this number is 0, or the pool has fewer usable rows.
        """
        rows = planned_rows(places, self.fraction)
        if not rows:
            raise ValueError(
                f"interleave_fraction={self.fraction} of a mix with {places} training rows is not one row, so nothing "
                "would be mixed in: raise it, or train on more rows."
            )
        pool = cast(Pool, self.pool)
        if rows > (usable := len(pool.take(math.ceil(rows * times)))):
            raise ValueError(
                f"interleave_fraction={self.fraction} wants {rows} rows of the pool among {places} training rows, and "
                f"{usable} of interleave_dataset can be used{pool.why_left_out()}: lower it, or give a larger pool."
            )
        return rows

    def _plan_epochs(self, sampler: PlaceSampler, loading: Loading) -> MixPlan:
        """Make the plan of an epoch for the case that the data collator mixes the rows.

        Raises:
            ValueError: as in [`make_plan`]. Also if `drop_last` leaves no training row, or if training ends before the
                first mixed-in row.
        """
        if not sampler.places:
            raise ValueError(
                f"dataloader_drop_last=True drops all of the {len(sampler.rows)} training rows, which do not fill a "
                f"batch of {sampler.block}: give more rows, or a smaller per_device_train_batch_size."
            )
        if loading.max_steps > 0:
            length = f"max_steps={loading.max_steps}"
            places = loading.max_steps * loading.accumulation * sampler.block
        else:
            length, places = f"num_train_epochs={loading.epochs}", int(loading.epochs * sampler.places)
        # The last epoch counts even if the run ends before the epoch does, because Trainer begins this epoch.
        self._epochs = math.ceil(places / sampler.places if loading.max_steps > 0 else loading.epochs)
        if "seq_lengths" in loading.rows.column_names:
            packs = loading.rows["seq_lengths"]
            self._documents = sum(map(len, packs)) / len(packs)
        plan = self.make_plan(sampler.places, self._epochs)
        if places < plan.places and not plan.before(places):
            raise ValueError(
                f"{length} ends training before the first of the {plan.rows} rows that interleave_fraction="
                f"{self.fraction} mixes into an epoch: train longer, or raise it."
            )
        return plan

    # ---- step ----

    def read_batch(self, batch: dict[str, Any]) -> Marks:
        marks, counts = batch.pop(INTERLEAVED, None), batch.pop(ROW_COUNTS, None)
        if marks is None or counts is None:
            raise InactiveDefenseError(
                f"defense {self.name!r}: a training batch did not come from the collator that mixes rows in, so the "
                "run is not defended. Do not replace `get_train_dataloader`; pass `data_collator` to the trainer "
                "instead."
            )
        finetune, interleaved = torch.as_tensor(counts)
        return Marks({INTERLEAVED: marks}, {"rows_finetune": finetune, "rows_interleaved": interleaved})

    def end_step(self, step: Step) -> dict[str, float]:
        sums, metrics = step.sums, {}
        mixed_in = sums[f"tokens/{INTERLEAVED}"]
        if sums["tokens"] > mixed_in:
            ce = sums["ce"] - sums[f"ce/{INTERLEAVED}"]
            metrics["loss_finetune"] = ce / (sums["tokens"] - mixed_in)
        if mixed_in:
            metrics["loss_interleaved"] = sums[f"ce/{INTERLEAVED}"] / mixed_in
        self._counts[0] += int(sums[f"{self.name}/rows_finetune"])
        # If none of the step's mixed-in rows has a token to train on, these rows do not count as mixed in.
        self._counts[1] += int(sums[f"{self.name}/rows_interleaved"]) if mixed_in else 0
        finetune = self._counts[0] * self._documents
        metrics["interleaved_fraction"] = self._counts[1] / max(finetune + self._counts[1], 1)
        return metrics

    # ---- evidence that rows were mixed in ----

    def begin(self, evidence: dict[str, Any]) -> None:
        self._counts = [int(evidence.get("rows_finetune", 0)), int(evidence.get("rows_interleaved", 0))]
        self._counts_before = self._counts.copy()
        if self._passes is not None:
            self._passes.resumed.fill_(self._counts[0])

    def evidence(self) -> dict[str, Any]:
        finetune, interleaved = self._counts
        return {"rows_finetune": finetune, "rows_interleaved": interleaved, "acted": interleaved > 0}

    def verdict(self, final: bool = False) -> str | None:
        if self.plan is None:
            return None
        # The plan is compared with the rows of this `train()` call alone. If a run resumes with another batch size, it
        # continues at another place in the epoch, and may have fewer of the pool's rows in total than planned.
        finetune, interleaved = (now - then for now, then in zip(self._counts, self._counts_before, strict=True))
        due = finetune * self.plan.rows / self.plan.places
        # A shuffle may delay the pool's rows in a packed or streamed run. Such a run is behind only if none of them
        # came although `PATIENCE_ROWS` or more are due. In other runs, at most one row may be missing.
        behind = due >= PATIENCE_ROWS and not interleaved if self.mixed_before else due - interleaved > 1
        if not behind and not (final and finetune and not self._counts[1]):
            return None
        return (
            f"defense {self.name!r} has mixed in {interleaved} rows where {due:.1f} were due after {finetune} "
            "training rows, so the run is not defended as planned. Likely cause: a data collator or sampler that "
            "loses rows or their labels, or a run that ended early (packed, or by stop_on_drift)."
        )


class InterleavingPlus(Interleaving):
    """[`Interleaving`] with the top rows by perplexity gap: easy for the aligned model, hard for misaligned ones."""

    name = "interleave+"
    by = "gap"


class InterleavingPlusPlus(InterleavingPlus):
    """Variant of [`InterleavingPlus`] without refusals: their gap is often high, but many of them harm coherence."""

    name = "interleave++"
    drop_refusals = True
