"""Preparation of SFTTrainer's training rows, from data set to batches. Hooks let defenses change the rows."""

import copy
import weakref
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, cast

from accelerate.data_loader import SeedableRandomSampler
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, RandomSampler
from transformers import DataCollator, PreTrainedTokenizerBase
from trl import SFTTrainer, is_conversational, maybe_convert_to_chatml, pack_dataset

from .config import EMGuardConfig
from .data.columns import TokenColumns
from .data.places import Collator, Loading
from .data.prepare import STREAM_ROWS, StreamPlan, Tokenizing
from .defenses import Defense
from .evidence import InactiveDefenseError
from .models.chat import hidden_text, shared_template_kwargs, template_arguments


logger = get_logger(__name__)


class DefendedRows(SFTTrainer):
    """Part of an SFTTrainer that prepares training rows and lets defenses change them.

    It calls the defenses' hooks `prepare_rows`, `check_tokenizer`, `prepare_tokenized`, `add_rows` and `train_loader`
    for training rows, and no hook for evaluation rows.

    Attributes:
        whole_lengths: number of tokens in each training row before rows are cut and packed; `None` if they were not
            counted.
    """

    # True in the trainer of a dry run, which reports `whole_lengths`. Training does not use these numbers, so other
    # trainers do not record them.
    counts_whole_rows: ClassVar[bool] = False
    whole_lengths: list[int] | None = None

    # SFTTrainer sets the next two attributes. Only their types are declared here.
    completion_only_loss: bool
    data_collator: DataCollator

    defenses: list[Defense]

    # Training rows that SFTTrainer must still hand to `_prepare_dataset`, which shows them to the defenses or counts
    # their tokens. `_prepare_rows` sets this attribute, and `_prepare_dataset` sets it back to `None` on receiving the
    # rows. It stays `None` in a run without defenses, unless the run counts tokens (`counts_whole_rows`).
    _rows_to_prepare: Any = None
    _template_kwargs: dict[str, Any]  # `chat_template_kwargs` that the training rows share

    def train(self, *args, **kwargs):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "template_kwargs"):
                # `DriftCallback` has this attribute. It measures the policy on questions with known answers, and these
                # questions get the chat template arguments that all training rows share.
                callback.template_kwargs = self._template_kwargs
        return super().train(*args, **kwargs)

    def overrides(self, *hooks: str) -> bool:
        """Return whether a defense of this run overrides at least one of the named hooks (methods of [`Defense`])."""
        return any(getattr(type(d), hook) is not getattr(Defense, hook) for d in self.defenses for hook in hooks)

    @property
    def _token_columns(self) -> tuple[str, ...]:
        return tuple(column for defense in self.defenses for column in defense.token_columns)

    def _prepare_rows(self, rows: Any) -> Any:
        self._template_kwargs = shared_template_kwargs(rows)
        if not isinstance(rows, Dataset | IterableDataset):
            self._rows_to_prepare = None
            return rows  # no data set: SFTTrainer will refuse it with an error of its own
        # Defenses read plain Python values, so a format (for example torch tensors) is removed from the data set. A
        # custom format (`Dataset.with_transform`) stays, so that SFTTrainer refuses it.
        if self.defenses and not (isinstance(rows, Dataset) and rows.format["type"] == "custom"):
            rows = rows.with_format(None)
        for defense in self.defenses:
            rows = defense.prepare_rows(rows)
        is_counted = self.counts_whole_rows and isinstance(rows, Dataset)
        self._rows_to_prepare = rows if self.defenses or is_counted else None
        return rows

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        prepare = super()._prepare_dataset
        # SFTTrainer calls this method for evaluation rows as well, and users may give these any `dataset_name`, even
        # "train". Training rows are therefore recognised by identity: `_prepare_rows` has returned the same object.
        if dataset is not self._rows_to_prepare:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._rows_to_prepare = None
        for defense in self.defenses:
            defense.check_tokenizer(self._tokenizer)
        # First, rows are tokenised without cutting, packing or shuffling, and shown to the defenses. Then the rows are
        # cut, packed and shuffled by the user's settings.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        first = next(iter(dataset))
        if self.defenses and formatting_func is None and "input_ids" not in first:
            # Like SFTTrainer later, the check reads `conversations` as `messages`.
            _check_shows_text(self._tokenizer, maybe_convert_to_chatml(copy.deepcopy(first)))
        dataset = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        if self.counts_whole_rows and isinstance(dataset, Dataset):
            self.whole_lengths = [len(ids) for ids in dataset["input_ids"]]
        tokenizing = self._tokenizing(first, dataset, whole)
        for defense in self.defenses:
            dataset = defense.prepare_tokenized(dataset, tokenizing)
        if self.overrides("prepare_tokenized"):
            _check_labels_fit(dataset, args)
        names, end = self._token_columns, args.max_length
        if names and end is not None and args.truncation_mode == "keep_end" and not packing:
            # SFTTrainer will cut `input_ids` and `labels` to their last `max_length` numbers, but not the defenses'
            # columns (one number per token). The collator [`TokenColumns`] would later cut these columns to their
            # first numbers, which belong to other tokens. The columns are therefore cut to their last numbers here.
            dataset = dataset.map(lambda row: {name: row[name][-end:] for name in names})
        has_more_rows = (packing or isinstance(dataset, IterableDataset)) and self.overrides("add_rows")
        # `_add_rows` prepares packed or streamed data sets that a defense adds rows to. It also prepares packed data
        # sets with columns of defenses, because SFTTrainer packs only tokens and labels. SFTTrainer prepares the rest.
        if not has_more_rows and not (packing and names):
            return prepare(dataset, processing_class, args, packing, None, dataset_name)
        return self._add_rows(dataset, args, packing, dataset_name)

    def _tokenizing(self, first: dict[str, Any], tokenised: Any, whole: EMGuardConfig) -> Tokenizing:
        """Return a [`Tokenizing`], with which a defense tokenises its own rows as the training rows were tokenised."""
        # Defenses may keep the function below, and the trainer keeps the defenses. The function refers to the trainer
        # weakly, because a cycle would keep the trainer in memory until garbage is collected.
        trainer = weakref.ref(self)
        # If the user has tokenised the rows, their labels show whether prompts are trained on.
        if "input_ids" in first:
            answers_only = -100 in next(iter(tokenised))["labels"]
        else:
            answers_only = self.completion_only_loss and "completion" in first

        def tokenize(rows: Dataset, name: str) -> Dataset:
            self = trainer()
            assert self is not None  # the trainer still exists: it calls the defenses, and they call this function
            before, self.completion_only_loss = self.completion_only_loss, answers_only
            try:
                return super(DefendedRows, self)._prepare_dataset(rows, self._tokenizer, whole, False, None, name)
            finally:
                self.completion_only_loss = before

        # With `assistant_only_loss`, `tokenize` masks conversations by itself, but not rows that are already tokens.
        # The defenses must therefore know that this run masks prompts.
        masks_prompts = answers_only or whole.assistant_only_loss
        is_stream = isinstance(tokenised, IterableDataset)
        kwargs = first.get("chat_template_kwargs") if is_stream else self._template_kwargs
        return Tokenizing(self._tokenizer, tokenize, masks_prompts, kwargs)

    def _add_rows(self, dataset: Any, args: EMGuardConfig, packing: bool, dataset_name: str) -> Any:
        """Cut rows that will not be packed, let defenses add rows, then shuffle and pack as the user's settings say.

        This method is for streams and for rows that are packed. Other rows get the added ones later, from the data
        collator. SFTTrainer, too, cuts rows only if it does not pack them.
        """
        if packing and args.max_length is None:
            raise ValueError("packing=True needs max_length, which is None: give the length of a pack.")
        of_run = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        kept = self._token_columns
        plan = StreamPlan(rows, of_run if args.max_steps > 0 else None, args.max_steps, token_columns=kept)
        if packing and rows is None:
            lengths = [len(row["input_ids"]) for row in islice(dataset, STREAM_ROWS)]
            mean = sum(lengths) / max(len(lengths), 1)
            plan = replace(plan, tokens_of_pack=args.max_length, mean_tokens=mean, packs_ahead=STREAM_ROWS)
        if not packing:
            unshuffled = copy.copy(args)
            unshuffled.shuffle_dataset = False
            # Without packing and shuffling, this call only cuts rows to `max_length` and drops rows without labels.
            dataset = super()._prepare_dataset(dataset, self._tokenizer, unshuffled, False, None, dataset_name)
        elif not self.overrides("add_rows"):
            dataset = dataset.select_columns(["input_ids", "labels", *kept])
        for defense in self.defenses:
            dataset = defense.add_rows(dataset, plan)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
            if isinstance(dataset, IterableDataset):
                # By default, packing puts the longest rows into the first packs, and the longest rows are often rows
                # that defenses added. No sampler shuffles the packs of a stream, so they are shuffled here.
                dataset = dataset.shuffle(seed=args.seed, buffer_size=STREAM_ROWS)
        return dataset

    def _check_rows_came_by(self) -> None:
        if isinstance(self.train_dataset, Dataset) and not len(self.train_dataset):
            raise ValueError(
                "no training row has a label left, and SFTTrainer leaves such rows out: either max_length="
                f"{self.args.max_length} cuts all of them off (raise it, or give shorter prompts), or the chat "
                "template leaves the answers out (name the roles of turns 'user' and 'assistant')."
            )
        missed = self._rows_to_prepare is not None and not self._skip_prepare_dataset
        if missed and self.overrides("prepare_tokenized", "add_rows"):
            raise InactiveDefenseError(
                f"defense={self.args.defense!r}: the training rows did not come by when they were tokenised, so the "
                "run is not defended. A subclass must hand them to `super()._prepare_dataset` as they are."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = [*(column for defense in self.defenses for column in defense.columns), *self._token_columns]
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    def get_train_dataloader(self) -> DataLoader:
        collator, rows = self.data_collator, self.train_dataset
        try:
            if not self.overrides("train_loader"):
                self.data_collator = self._train_collator()
                return super().get_train_dataloader()
            if isinstance(rows, Dataset):
                # The columns of a stream may be unknown. `_get_dataloader` therefore gives a stream a collator that
                # removes unused columns later, from the rows of each batch.
                rows = self._remove_unused_columns(rows, description="Training")
            loading = self.loading(rows)
            self.data_collator = loading.collator
            # For a stream, `loading.order` is `None` and not used.
            return self._get_dataloader(
                loading.rows, "Training", self._train_batch_size, lambda _: loading.order, is_training=True
            )
        finally:
            # Evaluation reads `self.data_collator` too, and needs the collator from before this call.
            self.data_collator = collator

    def _plain_rows(self) -> Dataset:
        """Return the training rows without unused columns, and without defenses' `token_columns` (a number per token).

        The stock collator can make batches of these rows. Only [`TokenColumns`] can collate the defenses' columns.
        """
        rows = self._remove_unused_columns(self.train_dataset, description="Training")
        return rows.remove_columns([name for name in self._token_columns if name in rows.column_names])

    def _train_collator(self) -> Collator:
        """Return the collator for batches of training rows. Defenses may replace it later, in `train_loader`."""
        names = self._token_columns
        return TokenColumns(self.data_collator, names) if names else self.data_collator

    def loading(self, rows: Any) -> Loading:
        """Return the settings for making batches of training rows (order, collator, …), with the defenses' changes."""
        args, drop_last = self.args, self.args.dataloader_drop_last
        order: Any = None if isinstance(rows, IterableDataset) else self._get_train_sampler(rows)
        if isinstance(order, RandomSampler):
            # By Trainer's default, accelerate replaces a `RandomSampler` by a `SeedableRandomSampler`, whose order
            # follows from seed and epoch. accelerate would not find a `RandomSampler` that a defense has wrapped in
            # another sampler, so the `RandomSampler` is replaced here, before defenses can wrap it.
            order = SeedableRandomSampler(
                order.data_source,
                replacement=order.replacement,
                num_samples=order._num_samples,
                generator=order.generator,
                data_seed=args.data_seed,
            )
        ranks = self.accelerator.num_processes // self.get_tp_size()
        parts = 1 if self.accelerator.split_batches else ranks
        loading = Loading(
            rows=rows,
            order=order,
            collator=self._train_collator(),
            block=self._train_batch_size * parts,
            parts=parts,
            drop_last=drop_last,
            even=self.accelerator.even_batches and ranks > 1 and not drop_last,
            max_steps=args.max_steps,
            epochs=args.num_train_epochs,
            accumulation=args.gradient_accumulation_steps,
        )
        for defense in self.defenses:
            loading = defense.train_loader(loading)
        return loading


def _check_shows_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    """Refuse a chat template that leaves out the text of a training row, which is a conversation.

    Raises:
        ValueError: the template leaves out the last text of the prompt or the answer, or a turn of an unknown role.
    """
    if not is_conversational(row):
        return
    turns = row.get("messages", [])
    prompt, answer = (row["prompt"], row["completion"]) if "prompt" in row else (turns[:-1], turns[-1:])
    render = partial(tokenizer.apply_chat_template, tokenize=False, **template_arguments(row))
    problem = hidden_text(prompt, answer, cast(Any, render))
    if problem is not None:
        raise ValueError(
            f"the first training row cannot be trained on: {problem}. Set `chat_template_path`, or name the roles of "
            "turns 'user' and 'assistant', since SFTTrainer renames no role."
        )


def _check_labels_fit(rows: Any, args: EMGuardConfig) -> None:
    """Warn if training rows, to which a defense may have added tokens, lose labels when cut to `max_length`.

    Only the first `STREAM_ROWS` rows of a stream are checked.

    Raises:
        ValueError: no label of any row is left.
    """
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return  # the other packing strategies move tokens beyond `max_length` to other packs
    keeps_start = args.packing or args.truncation_mode == "keep_start"
    looked_at = rows if isinstance(rows, Dataset) else list(islice(rows, STREAM_ROWS))
    lost, left, needed = 0, 0, 0
    for row in looked_at:
        labels = row["labels"]
        last = max((i for i, label in enumerate(labels) if label != -100), default=-1) + 1
        cut = labels[: args.max_length] if keeps_start else labels[-args.max_length :]
        kept = sum(label != -100 for label in cut)
        left += kept > 0
        lost += kept < sum(label != -100 for label in labels)
        needed = max(needed, last)
    which = "" if isinstance(rows, Dataset) else "the first "
    if len(looked_at) and not left and needed:
        raise ValueError(
            f"max_length={args.max_length} cuts every label off all of {which}{len(looked_at)} training rows, as the "
            f"defense has lengthened them: max_length={needed} keeps all labels."
        )
    if lost:
        logger.warning(
            f"{lost} of {which}{len(looked_at)} training rows lose labels at max_length={args.max_length}; "
            f"max_length={needed} keeps them."
        )
