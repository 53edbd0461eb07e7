"""Plan of a run: its numbers of updates, rows, tokens and labels, counted before training.

If defenses compare the policy with a reference model, the positions at which they do this are counted as well.
"""

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from datasets import Dataset
from transformers.training_args import OptimizerNames

from ..defenses import Defense, ReferenceDefense
from ..guard.scopes import ALL, LABELS, positions_in_scope, read_marks
from ..guard.terms import wanted_layers
from ..models.callback_state import CheckpointedCallback
from ..trainer import EMGuardTrainer
from .engine import Launch
from .memory import Run


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens and labels in each row, or in each pack of rows.

    Attributes:
        tokens: number of tokens in each row.
        labels: number of tokens in each row that are predicted in training.
    """

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Dataset) -> "Counts":
        """Count the tokens and labels of tokenised rows, packed or not."""
        counts = cls()
        columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
        for row in rows.select_columns(columns):
            ids, labels, documents = row["input_ids"], row["labels"], row.get("seq_lengths") or []
            # Nothing predicts the first token of a row, or of a document in a pack, so its label is not counted.
            firsts = accumulate(documents[:-1], initial=0)
            counts.tokens.append(len(ids))
            counts.labels.append(
                sum(label != -100 for label in labels) - sum(labels[first] != -100 for first in firsts)
            )
        return counts

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.tokens + other.tokens, self.labels + other.labels)

    @property
    def rows(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Plan:
    """Numbers of a run's updates, rows, tokens and labels, counted with the run's trainer before the first step.

    Attributes:
        trainer: trainer of the run. Its model may be on any device, including the meta device.
        launch: facts about the launch, such as the number of ranks.
        steps: number of updates in the run.
        steps_in_epoch: number of updates in an epoch.
        rows: tokens and labels of the training rows; empty for a stream.
        extra: name of a defense → tokens and labels of the rows that it adds to the batches of an epoch.
    """

    trainer: EMGuardTrainer
    launch: Launch
    steps: int
    steps_in_epoch: int
    rows: Counts
    extra: dict[str, Counts]

    @classmethod
    def of(cls, trainer: EMGuardTrainer, launch: Launch) -> "Plan":
        """Set up a trainer as a run does, collate its first batch, and count the run's updates, rows and tokens.

        Raises:
            ValueError, InactiveDefenseError: errors that the run would raise before its first step.
        """
        args, rows = trainer.args, trainer.train_dataset
        if args.resume_from_checkpoint:
            trainer.check_resume(trainer.find_checkpoint(args.resume_from_checkpoint))
        extra = _count_extra_rows(trainer)
        loader = trainer.get_train_dataloader()
        _, steps_in_epoch, *_, steps = trainer.set_initial_training_values(args, loader)
        for callback in trainer.callback_handler.callbacks if not args.resume_from_checkpoint else ():
            if isinstance(callback, CheckpointedCallback):
                callback.check_steps(steps)
        trainer.create_optimizer_and_scheduler(steps)
        batch = next(iter(loader))
        marks = read_marks(trainer.defenses, batch).scopes
        for term in _terms(trainer):
            positions_in_scope(batch, term.tokens, marks)
        if trainer.eval_dataset is not None:
            next(iter(trainer.get_eval_dataloader()))
        counts = Counts.of(rows) if isinstance(rows, Dataset) else Counts()
        return cls(trainer, launch, steps, steps_in_epoch, counts, extra)

    @property
    def terms(self) -> list[ReferenceDefense]:
        """Active defenses that compare the policy with a reference."""
        return _terms(self.trainer)

    @property
    def all_rows(self) -> Counts:
        """Tokens and labels of all rows of an epoch: the training rows, then the rows that defenses add."""
        return sum(self.extra.values(), self.rows)

    @property
    def rows_in_step(self) -> int:
        """Number of training rows in a step, over all ranks and micro-batches."""
        return self.rows_in_batch * self.trainer.args.gradient_accumulation_steps

    @property
    def rows_in_batch(self) -> int:
        """Number of training rows in a micro-batch, over all ranks."""
        return self.trainer.args.per_device_train_batch_size * self.launch.data_ranks

    def in_step(self, in_epoch: int) -> int:
        """Convert a number per epoch, for example of tokens, to the mean number per step."""
        return round(in_epoch * min(1, self.rows_in_step / self.rows.rows))

    def positions(self, scope: str) -> int | None:
        """Return the number of positions in an epoch that belong to a scope (a named set of token positions).

        Args:
            scope: name of a set of positions, as in [`positions_in_scope`].

        Returns:
            The number, or `None` if it is not known before training.
        """
        if scope in (LABELS, ALL):
            if not self.rows.rows:
                return None
            counts = self.all_rows
            return sum(counts.labels) if scope == LABELS else sum(counts.tokens) - counts.rows
        marking = [defense.name for defense in self.trainer.defenses if scope in defense.scopes]
        extra = [self.extra[name] for name in marking if name in self.extra]
        return sum(sum(counts.labels) for counts in extra) if extra else None

    def marked_tokens(self, defense: Defense) -> int | None:
        """Return the number of tokens that a defense marks in the training rows, or `None`.

        A defense marks tokens to tell them apart from others, for example those of rows that it added before
        packing. The result is `None` for a stream, for a defense without marks, and for a defense whose added rows are
        counted in `extra`.
        """
        rows = self.trainer.train_dataset
        if not defense.scopes or defense.name in self.extra or not isinstance(rows, Dataset):
            return None
        collate = self.trainer.loading(rows).collator
        marks = (defense.read_batch(collate([row])).scopes for row in rows)
        return sum(int(mask.sum()) for scopes in marks for mask in scopes.values())

    def cached_numbers(self) -> int:
        """Return how many numbers a cache of the reference model's hidden states would hold for an epoch's rows."""
        scopes, run = {term.tokens for term in self.terms}, self.largest_batch()
        # A scope is a set of positions. `ALL` (all positions that predict a real token) contains `LABELS` (all that
        # predict a label), and `LABELS` contains every scope that a defense marks. The cache stores a position's
        # states once, so if `ALL` (or else `LABELS`) is in use, it is counted alone.
        counted = {ALL} if ALL in scopes else {LABELS} if LABELS in scopes else scopes
        positions = sum(self.positions(scope) or 0 for scope in counted)
        hidden_size = self.trainer.model.config.get_text_config().hidden_size
        return positions * (run.has_divergence + run.layers) * hidden_size

    def largest_batch(self) -> Run:
        """Return the sizes of the run's largest micro-batch, together with the settings that affect memory."""
        trainer, args, terms, counts = self.trainer, self.trainer.args, self.terms, self.all_rows
        rows, multiple = args.per_device_train_batch_size + self._extra_in_batch(), args.pad_to_multiple_of or 1
        length = math.ceil(max(counts.tokens, default=args.max_length or 0) / multiple) * multiple
        labels = max(counts.labels, default=length)
        reference: Any = "none"
        if trainer.reference is not None:
            reference = "adapters off" if trainer.reference.shares_weights else "model"
        return Run(
            rows=rows,
            length=length,
            kept=rows * (length - 1 if any(term.tokens == ALL for term in terms) else labels),
            micro_batches=args.gradient_accumulation_steps,
            compute_itemsize=2 if trainer.accelerator.mixed_precision == "bf16" else trainer.model.dtype.itemsize,
            optimizer=OptimizerNames(args.optim).value,
            checkpointing=self._checkpointing(),
            guarded=any(defense.own_loss for defense in trainer.defenses),
            reference=reference,
            cached=bool(args.cache_reference),
            has_divergence=any(term.divergence is not None for term in terms),
            layers=len(wanted_layers(terms, trainer.model)),
        )

    def _checkpointing(self) -> int:
        """Return n if every n-th block has activation checkpointing, by Trainer or by FSDP; 0 if none has."""
        args = self.trainer.args
        if args.activation_checkpointing:
            return (args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
        return int(self.launch.facts.fsdp_checkpointing)

    def _extra_in_batch(self) -> int:
        """Return the largest number of rows that defenses add to a micro-batch of one rank."""
        rows = self.rows.rows
        if self.trainer.args.dataloader_drop_last:
            rows -= rows % self.rows_in_batch
        share = self.trainer.args.per_device_train_batch_size / max(rows, 1)
        return sum(math.ceil(share * counts.rows) for counts in self.extra.values())


def _terms(trainer: EMGuardTrainer) -> list[ReferenceDefense]:
    return [defense for defense in trainer.defenses if isinstance(defense, ReferenceDefense)]


def _count_extra_rows(trainer: EMGuardTrainer) -> dict[str, Counts]:
    """Return a dict: name of a defense → tokens and labels of the rows that it adds to the batches of an epoch."""
    args = trainer.args
    planned = args.num_train_epochs, args.max_steps
    # `loading` lets each defense plan the rows that it adds, for all epochs of the run. Here the rows of one epoch
    # are counted, so the run is set to one epoch until the defenses have planned and returned these rows.
    args.num_train_epochs, args.max_steps = 1, -1
    try:
        trainer.loading(trainer.train_dataset)
        extra = {defense.name: defense.extra_rows() for defense in trainer.defenses}
    finally:
        args.num_train_epochs, args.max_steps = planned
    return {name: Counts.of(rows) for name, rows in extra.items() if rows is not None}
