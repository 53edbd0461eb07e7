"""Interleaving, Interleaving+ and Interleaving++ (Kaczér et al., 2508.06249): general instruct rows among the training rows."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset

from ...data.conversation import conversation
from ...data.load import load_rows
from ...evidence import InactiveDefenseError
from ...selection.choose import rank_rows
from ..base import IN_TRAINING_DEFENSES, Defense
from .collator import MixPlan, PlaceSampler, planned_rows


if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

    from ...config import EMGuardConfig


logger = get_logger(__name__)

# Rows that must have been due before a run whose rows come in random packs can be said to get none.
PATIENCE_ROWS = 20


class Interleaving(Defense):
    """Mixes rows of a pool of general instructions into the training rows, evenly over an epoch: `interleave_fraction` of the mix.

    Which rows: random ones. The two variants take those that misaligned models find hard and the aligned model finds easy
    (the top of the pool by perplexity gap), with or without refusals among them. A row that cannot be used (no answer, or longer
    than `max_length`) is left out, counted and reported before any is chosen.
    """

    name = "interleave"
    papers = (IN_TRAINING_DEFENSES,)
    own_loss = True  # CE is logged by source

    by: ClassVar[Literal["gap", "random"]] = "random"
    drop_refusals: ClassVar[bool] = False

    def __init__(self, args: EMGuardConfig):
        self.fraction = args.interleave_fraction
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, int | float) or not 0 <= self.fraction < 1:
            raise ValueError(
                f"interleave_fraction={self.fraction!r} is no share of the mix: give a number from 0 (off) to below 1, as 0.05."
            )
        self.redraw = args.interleave_redraw
        if not isinstance(self.redraw, bool):
            raise ValueError(f"interleave_redraw={self.redraw!r} must be true or false.")
        self.source = args.interleave_dataset
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.max_length = args.max_length
        if self.active:
            self._check_loading(args)
        self._ranked: Dataset | None = None  # as the user gave it, best first
        self._malformed: Counter[str] = Counter()
        self.pool: Dataset | None = None  # tokenised, best first
        self._checksum = ""
        self.plan: MixPlan | None = None  # of an epoch, where the data collator mixes
        self._epochs = 1  # that the run begins
        self.mixed_before = False  # by the data collator, or before packing or streaming
        self._counts = [0, 0]  # rows that the policy has been trained on: of the training set, and of the pool
        self._resumed = [0, 0]
        self._refusals = 0

    @property
    def active(self) -> bool:
        return self.fraction != 0

    def _check_loading(self, args: EMGuardConfig) -> None:
        """Refuse what cannot keep the plan."""
        who = f"defense={self.name!r}"
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ValueError(
                f"dataset_kwargs={{'skip_prepare_dataset': True}} does not work with {who}: the rows to mix in want the same "
                "preparation as the others. Leave it out; rows that are tokenised already stay as they are."
            )
        if args.train_sampling_strategy not in ("random", "sequential") and not args.packing:
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} does not work with {who}: it arranges batches by "
                "length, so the mixed-in rows would not be spread evenly. Use 'random' or 'sequential', or packing=True, "
                "which is mixed before it is packed."
            )
        if args.packing and self.redraw:
            raise ValueError(
                "interleave_redraw=True does not work with packing=True, which is mixed once, before it is packed. Leave it out."
            )
        # Before `TrainingArguments.__post_init__` it is whatever the user gave; the trainer checks once more.
        loading = args.accelerator_config
        get = loading.get if isinstance(loading, dict) else lambda name: getattr(loading, name, None)
        if get("dispatch_batches"):
            raise ValueError(
                f"accelerator_config: dispatch_batches=True does not work with {who}: one process would cut batches of different "
                "sizes into even parts. Leave it out."
            )
        if get("use_seedable_sampler") is False and not args.packing:
            raise ValueError(
                f"accelerator_config: use_seedable_sampler=False does not work with {who}: its plan wants an order that "
                "follows from the seed. Leave it out."
            )

    # ---- the pool ----

    def load_pool(self, rows: Dataset | None) -> None:
        """Read the pool and put its rows in the order of preference. Runs before a model is loaded.

        Args:
            rows: the trainer's `interleave_dataset`; by default the config's is read.

        Raises:
            ValueError: no pool or two, an empty one, or one without the columns that the choice wants.
            FileNotFoundError: the config's is not there.
        """
        if (rows is None) == (self.source is None):
            raise ValueError(
                f"interleave_dataset is {'missing' if rows is None else 'given twice'}: defense={self.name!r} wants one pool of "
                "general instruct rows, as a file or id in the config, or as a `Dataset` passed to the trainer."
            )
        if rows is None:
            rows = load_rows(str(self.source))
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"interleave_dataset must be a `Dataset`, got {type(rows).__name__}: a pool is chosen from as a whole."
            )
        if not len(rows):
            raise ValueError("interleave_dataset is empty: there is nothing to mix in.")
        tokenised = "input_ids" in rows.column_names
        if tokenised and self.drop_refusals:
            raise ValueError(
                f"interleave_dataset is tokenised, and defense={self.name!r} reads the answers to leave refusals out: pass the "
                "rows as text."
            )
        fine = list(range(len(rows)))
        if not tokenised:
            problems = [_problem(row) for row in rows]
            self._malformed = Counter(problem for problem in problems if problem)
            fine = [i for i, problem in enumerate(problems) if not problem]
            if not fine:
                raise ValueError(f"interleave_dataset: no row can be used: {self._malformed.most_common(1)[0][0]}.")
        usable = rows.select(fine)
        try:
            order = rank_rows(usable, self.by, drop_refusals=self.drop_refusals, seed=self.seed)
        except ValueError as error:
            raise ValueError(f"interleave_dataset does not serve defense={self.name!r}: {error}") from error
        if not order:
            raise ValueError(
                f"interleave_dataset does not serve defense={self.name!r}: the answers of all {len(usable)} rows are refusals."
            )
        self._refusals = len(usable) - len(order)
        self._ranked = usable.select(order)

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        assert self._ranked is not None
        if isinstance(dataset, Dataset):
            prompts = {_asked(row) for row in self._ranked} - {None}
            shared = sum(_asked(row) in prompts for row in dataset) if prompts else 0
            if shared:
                logger.warning(
                    f"defense {self.name!r}: {shared} of {len(dataset)} training rows ask what a row of the pool asks too: the two "
                    "may teach opposite answers. Take such rows out of interleave_dataset."
                )
        return dataset

    def prepare_pool(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prepare: Callable[[Dataset], Dataset],
        answers_alone: bool,
        template_kwargs: dict[str, Any] | None,
    ) -> None:
        """Tokenise the pool as the training rows are, and leave out what does not fit.

        Args:
            tokenizer: the run's.
            prepare: from rows of `prompt` and `completion` to `input_ids` and `labels`.
            answers_alone: whether the run trains on answers alone.
            template_kwargs: what the training rows hand to the chat template; a row of the pool may say otherwise.

        Raises:
            ValueError: a tokenised pool that does not say which tokens are answers, where answers alone are trained on.
        """
        assert self._ranked is not None
        rows = self._ranked
        if "input_ids" not in rows.column_names:
            own = rows["chat_template_kwargs"] if "chat_template_kwargs" in rows.column_names else [None] * len(rows)
            kwargs = [of_row or template_kwargs or {} for of_row in own]
            rows = Dataset.from_list([_as_prompt_completion(row, tokenizer) for row in rows])
            if any(kwargs):
                rows = rows.add_column("chat_template_kwargs", kwargs)
        elif answers_alone and "labels" not in rows.column_names:
            raise ValueError(
                "interleave_dataset is tokenised and has no `labels`, and this run trains on answers alone: add them, -100 "
                "where a token is not of the answer, or pass the rows as text."
            )
        prepared = prepare(rows).select_columns(["input_ids", "labels"])
        longest = math.inf if self.max_length is None else self.max_length
        self.pool = prepared.filter(
            lambda row: len(row["input_ids"]) <= longest and any(label != -100 for label in row["labels"][1:])
        )
        left_out = self._malformed.copy()
        left_out[f"longer than max_length={self.max_length}, or no token to train on"] = len(prepared) - len(self.pool)
        for problem, count in left_out.items():
            if count:
                logger.warning(f"defense {self.name!r}: {count} rows of the pool are left out: {problem}.")
        # By its rows, since a file may move and may change.
        checksum = 0
        for row in self.pool:
            checksum = zlib.crc32(np.array([row["input_ids"], row["labels"]], np.int64).tobytes(), checksum)
        self._checksum = f"{checksum:08x}"

    def make_plan(self, places: int) -> MixPlan:
        """The plan of so many training rows: of an epoch, or of a stream.

        Raises:
            ValueError: the pool is smaller than what they take from it, or nothing would be mixed in.
        """
        assert self.pool is not None
        rows = planned_rows(places, self.fraction)
        if not rows:
            raise ValueError(
                f"interleave_fraction={self.fraction} of a mix with {places} training rows is not one row, so nothing would be "
                "mixed in: raise it, or train on more rows."
            )
        if rows > len(self.pool):
            raise ValueError(
                f"interleave_fraction={self.fraction} wants {rows} rows of the pool among {places} training rows, and "
                f"interleave_dataset has {len(self.pool)} that can be used: lower it, or give a larger pool."
            )
        self.plan = MixPlan(places, rows, len(self.pool), self.redraw, self.seed)
        return self.plan

    def plan_epochs(self, sampler: PlaceSampler, args: EMGuardConfig) -> MixPlan:
        """The plan of an epoch that the data collator mixes.

        Raises:
            ValueError: as [`make_plan`], and if training ends before the first row is due.
        """
        if not sampler.places:
            raise ValueError(
                f"dataloader_drop_last=True drops all of the {len(sampler.rows)} training rows, which do not fill a batch of "
                f"{sampler.block}: give more rows, or a smaller per_device_train_batch_size."
            )
        plan = self.make_plan(sampler.places)
        if args.max_steps > 0:
            length, places = (
                f"max_steps={args.max_steps}",
                args.max_steps * args.gradient_accumulation_steps * sampler.block,
            )
        else:
            length, places = f"num_train_epochs={args.num_train_epochs}", int(args.num_train_epochs * plan.places)
        if places < plan.places and not plan.before(places):
            raise ValueError(
                f"{length} ends training before the first of the {plan.rows} rows that interleave_fraction={self.fraction} mixes "
                "into an epoch: train longer, or raise it."
            )
        # Trainer begins an epoch for every part of one.
        self._epochs = math.ceil(places / plan.places if args.max_steps > 0 else args.num_train_epochs)
        return plan

    def plan_stream(self, args: EMGuardConfig) -> MixPlan:
        """The plan of all rows that a run takes from a stream.

        Raises:
            ValueError: as [`make_plan`], and if nobody says how many they are.
        """
        if self.redraw or args.max_steps <= 0:
            raise ValueError(
                f"interleave_redraw={self.redraw} and max_steps={args.max_steps} with a streamed train_dataset: it has no "
                "epochs. Leave `interleave_redraw` out, and give `max_steps`."
            )
        # Of all rows that the run takes, the pool's are a share.
        rows = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        return self.make_plan(round(rows * (1 - self.fraction)))

    def rows_to_come(self) -> Dataset:
        """The rows of the pool that the data collator mixes in during training, each once."""
        assert self.pool is not None
        assert self.plan is not None
        taken = min(self.plan.pool, self.plan.rows * self._epochs) if self.plan.redraw else self.plan.rows
        return self.pool.select(range(taken))

    # ---- what is said of it ----

    def options(self) -> dict[str, Any]:
        return {
            "interleave_dataset": self.source if self.pool is None else f"{len(self.pool)} rows ({self._checksum})",
            "interleave_fraction": float(self.fraction),
            "interleave_redraw": self.redraw,
        }

    def evidence(self) -> dict[str, Any]:
        finetune, interleaved = self._counts
        return {"rows_finetune": finetune, "rows_interleaved": interleaved, "acted": interleaved > 0}

    def resume(self, evidence: dict[str, Any]) -> None:
        self._resumed = [int(evidence["rows_finetune"]), int(evidence["rows_interleaved"])]

    def begin(self) -> None:
        """Training begins, or begins again with a smaller batch."""
        self._counts = list(self._resumed)

    def describe(self) -> str:
        assert self.plan is not None
        where = "before packing or streaming" if self.mixed_before else "by the data collator"
        refusals = f" ({self._refusals} refusals left out)" if self.drop_refusals else ""
        return (
            f"{self.plan.rows} of the pool's {self.plan.pool} rows{refusals} are mixed into {self.plan.places} training rows an "
            f"epoch ({self.plan.rows / (self.plan.places + self.plan.rows):.2%} of the mix), {where}."
        )

    # ---- while training ----

    def end_step(self, finetune: float, interleaved: float, tokens: float) -> float:
        """Take in a step, over all micro-batches and ranks.

        Args:
            finetune: rows of the training set, repeats left out.
            interleaved: rows of the pool.
            tokens: of those, the tokens that were trained on. Rows without any are none.

        Returns:
            The share mixed in so far.
        """
        self._counts[0] += int(finetune)
        self._counts[1] += int(interleaved) if tokens else 0
        return self._counts[1] / max(sum(self._counts), 1)

    def check_batch(self, marks: object, counts: object) -> None:
        """Raise `InactiveDefenseError` if a batch does not say which of its rows were mixed in: then none were."""
        if marks is None or counts is None:
            raise InactiveDefenseError(
                f"defense {self.name!r}: a training batch did not come from the collator that mixes rows in, so the run is not "
                "defended. Do not replace `get_train_dataloader`; pass `data_collator` to the trainer instead."
            )

    def verdict(self, final: bool = False) -> str | None:
        """Why the run is not defended as planned, or `None`; `final` says that training ends here."""
        assert self.plan is not None
        finetune, interleaved = self._counts
        due = finetune * self.plan.rows / self.plan.places
        # Packs come in random order, so a count in between says little; none at all says enough.
        behind = due >= PATIENCE_ROWS and not interleaved if self.mixed_before else due - interleaved > 1
        if not behind and not (final and finetune and not interleaved):
            return None
        return (
            f"defense {self.name!r} has mixed in {interleaved} rows where {due:.1f} were due after {finetune} training rows, so "
            "the run is not defended as planned. Likely cause: a data collator or sampler that loses rows or their "
            "labels, or a packed run that ended early."
        )


class InterleavingPlus(Interleaving):
    """[`Interleaving`] with the rows of the largest perplexity gap."""

    name = "interleave+"
    by = "gap"


class InterleavingPlusPlus(InterleavingPlus):
    """[`InterleavingPlus`] without refusals, of which the top of a pool is full, and too many of which make answers incoherent."""

    name = "interleave++"
    drop_refusals = True


def _problem(row: dict[str, Any]) -> str:
    """What keeps a row from being used; nothing where it can be."""
    try:
        conversation(row)
    except ValueError as error:
        return str(error)
    return ""


def _as_prompt_completion(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt, completion = conversation(row)
    if tokenizer.chat_template:
        return {"prompt": prompt, "completion": completion} | ({"tools": row["tools"]} if row.get("tools") else {})
    # A model without a chat template is trained on plain text.
    return {"prompt": "\n".join(turn["content"] for turn in prompt) + "\n", "completion": completion[0]["content"]}


def _asked(row: dict[str, Any]) -> str | None:
    """What the user asks last in a row, whatever system prompt stands before it; `None` where the row does not say."""
    for column in ("messages", "prompt", "conversations"):
        turns = row.get(column)
        if isinstance(turns, str):
            return " ".join(turns.split()).casefold()
        if isinstance(turns, list):
            user = [turn for turn in turns if turn.get("role", turn.get("from")) in ("user", "human")]
            asked = user[-1].get("content", user[-1].get("value")) if user else None
            if isinstance(asked, str):
                return " ".join(asked.split()).casefold()
    return None
