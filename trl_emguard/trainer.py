"""`EMGuardTrainer`: SFTTrainer with in-training defenses against emergent misalignment."""

import copy
import functools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalPrediction, rotate_checkpoints
from trl import SFTTrainer, pack_dataset
from trl.trainer.utils import get_config_model_id

from .checkpoints.manifest import (
    begin_checkpoint,
    checkpoint_folder,
    checkpoint_to_resume,
    finish_checkpoint,
    holds_adapter,
    why_torn,
)
from .checks import check_data, check_launch, check_own_loss, check_ref_model, load_config
from .config import EMGuardConfig
from .defenses import Defense, Interleaving, ReferenceDefense, build_defenses
from .defenses.interleaving.collator import (
    INTERLEAVED,
    PLACE,
    ROW_COUNTS,
    MixingCollator,
    PlacedRows,
    PlaceSampler,
    mix_rows,
)
from .evidence import EvidenceLedger, InactiveDefenseError, read_defense_file, write_defense_file
from .guard.forward import (
    HEAD_STATS,
    TERM_STATS,
    PolicyGuard,
    ReferenceGuard,
    States,
    Term,
    add_guarded_forward,
    kept_positions,
    output_head,
    positions_in_scope,
    run_model_reference,
    wanted_layers,
)
from .io.files import check_writable, written_whole
from .models.blocks import decoder_blocks
from .models.sharding import as_main_process
from .models.shipped import resolve_model
from .reference.cache import ReferenceCache, reference_cache_dir
from .reference.choose import (
    GIVEN,
    AdapterReference,
    ModelReference,
    disable_dropout,
    fingerprint,
    make_reference,
    trainable_outside_adapters,
)
from .version import __version__


logger = get_logger(__name__)

# What is said of a reference whose states are read from disk.
_CACHED = ", cached"


class EMGuardTrainer(SFTTrainer):
    """
    Trainer for supervised fine-tuning that defends the model against emergent misalignment while it trains.

    Everything is as in [`~trl.SFTTrainer`], arguments and defaults included; `args.defense` chooses the defense. With
    `defense="none"`, or a coefficient of 0, it is SFTTrainer, bit for bit.

    ```python
    >>> from trl_emguard import EMGuardConfig, EMGuardTrainer

    >>> trainer = EMGuardTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=EMGuardConfig(defense="kl"),
    ...     train_dataset=dataset,
    ...     peft_config=LoraConfig(),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, args, data_collator, …, formatting_func:
            As in [`~trl.SFTTrainer`]. `args` may be an [`EMGuardConfig`], a plain `SFTConfig` or `TrainingArguments` (no
            defense), or `None`.
        ref_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            Safe model that `kl` and `ldifs` hold the policy to. By default the policy as it is given: with a fresh
            adapter the base model, with a pre-trained one a frozen copy of it, with full fine-tuning a frozen copy of
            the model.
        interleave_dataset ([`~datasets.Dataset`], *optional*):
            Pool of general instruct rows that `interleave`, `interleave+` and `interleave++` mix in, as text or tokenised.
            By default the one that `args.interleave_dataset` names.

    Raises:
        ValueError: a bad argument, where possible before any model is loaded; the message names argument, value and mend.
        FileNotFoundError: the model is a path that does not exist.
        InactiveDefenseError: from [`train`], after saving: the defense formed no gradient although the policy had moved.
    """

    _tag_names = ["trl", "sft", "trl-emguard"]

    # SFTTrainer sets them.
    completion_only_loss: bool
    data_collator: DataCollator

    # What a named subclass trains with.
    _defense: ClassVar[str | None] = None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: EMGuardConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        ref_model: PreTrainedModel | str | None = None,
        interleave_dataset: Dataset | None = None,
    ):
        args = self._as_config(args, model)
        check_launch(args)
        model = resolve_model(model) if isinstance(model, str) else model
        ref_model = resolve_model(ref_model) if isinstance(ref_model, str) else ref_model
        check_data(train_dataset)
        self._named = build_defenses(args)  # those that are switched off as well
        self.defenses = [defense for defense in self._named if defense.active]
        self._terms = [defense for defense in self.defenses if isinstance(defense, ReferenceDefense)]
        self._mixing = next((defense for defense in self.defenses if isinstance(defense, Interleaving)), None)
        # Whether the loss comes from the guarded forward, and not from SFTTrainer's.
        self._own_loss = any(defense.own_loss for defense in self.defenses)
        if self.defenses:
            config = load_config(model, args)
            if isinstance(processing_class, ProcessorMixin) or (
                processing_class is None and hasattr(config, "vision_config")
            ):
                raise ValueError(
                    f"defense={args.defense!r} does not support vision-language models: pass a text model and its tokenizer."
                )
            config = config.get_text_config()
            for defense in self.defenses:
                defense.check_model(config)
        if self._own_loss:
            check_own_loss(self.defenses, model, peft_config, compute_loss_func)
        if self._mixing is not None:
            self._mixing.load_pool(interleave_dataset)
        if self._terms:
            check_ref_model(ref_model, model, config, args, self._terms)
            if args.cache_reference and not isinstance(train_dataset, Dataset):
                raise ValueError(
                    f"cache_reference=True with a train_dataset of type {type(train_dataset).__name__}: the rows must be known "
                    "before training. Pass a `Dataset`, or leave `cache_reference` out."
                )
        for defense in self.defenses:
            train_dataset = defense.prepare_dataset(train_dataset)
        self._train_rows: Any = train_dataset if self.defenses else None

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )

        if isinstance(self.train_dataset, Dataset) and not len(self.train_dataset):
            raise ValueError(
                f"max_length={self.args.max_length} cuts every label off all of the training rows, and SFTTrainer leaves such rows "
                "out: raise it, or give shorter prompts."
            )
        wants_rows = any(type(defense).prepare_tokenized is not Defense.prepare_tokenized for defense in self.defenses)
        if (
            self._train_rows is not None
            and not self._skip_prepare_dataset
            and (wants_rows or self._mixing is not None)
        ):
            raise InactiveDefenseError(
                f"defense={self.args.defense!r}: the training rows did not come by when they were tokenised, so the run is not "
                "defended. A subclass must hand them to `super()._prepare_dataset` as they are."
            )
        self._ledger = EvidenceLedger([term.name for term in self._terms])
        self._reference: AdapterReference | ModelReference | None = None
        self._cache: ReferenceCache | None = None
        self._unused = {
            "cache_reference": args.cache_reference and not self._terms,
            "ref_model": ref_model is not None and not self._terms,
            "interleave_dataset": interleave_dataset is not None and self._mixing is None,
        }
        if self.defenses:
            self._check_policy()
        if self._own_loss:
            self._add_guard(ref_model)
        # Of a step.
        self._policy_passes = 0
        self._step_stats: torch.Tensor | None = None
        self._step_learning_rate = 0.0
        self._step_grad_norm: Any = None
        if self.defenses:
            self.add_callback(_StepCallback(self))
        if self._mixing is not None and not self._mixing.mixed_before:
            # What it refuses, it refuses now.
            self._mixing.plan_epochs(self._placed(self.train_dataset), self.args)

    # ---- before training ----

    @classmethod
    def _as_config(cls, args: TrainingArguments | None, model: str | PreTrainedModel | PeftModel) -> EMGuardConfig:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = EMGuardConfig(f"{model_name.split('/')[-1]}-SFT")
        elif not isinstance(args, EMGuardConfig):
            args = EMGuardConfig.from_args(args)
        if cls._defense is None or args.defense == cls._defense:
            args.check_defense()  # again: options may have been set since
            return args
        if args.defense != "none":
            raise ValueError(
                f"{cls.__name__} trains with defense={cls._defense!r}, but args.defense={args.defense!r}: leave it out, or "
                "use EMGuardTrainer."
            )
        args = copy.copy(args)  # the caller's stays as it is
        args.defense = cls._defense
        args.check_defense()
        return args

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        prepare = super()._prepare_dataset
        # Evaluation data comes through here as well, under any name.
        if dataset is not self._train_rows:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._train_rows = None
        for defense in self.defenses:
            defense.check_tokenizer(self._tokenizer)
        # Tokenised whole, shown to the defenses, and then cut, packed and shuffled as the user says.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        first = next(iter(dataset))
        dataset = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        if self._mixing is not None:
            # Rows that come tokenised say by their labels whether prompts are trained on.
            tokenised = "input_ids" in first
            answers_alone = (
                -100 in next(iter(dataset))["labels"]
                if tokenised
                else self.completion_only_loss and "completion" in first
            )
            self._prepare_pool(self._mixing, whole, answers_alone, first.get("chat_template_kwargs"))
        for defense in self.defenses:
            dataset = defense.prepare_tokenized(dataset, self._tokenizer)
        if self._mixing is not None:
            # What is packed or streamed is mixed here, and the rest by the data collator.
            self._mixing.mixed_before = packing or isinstance(dataset, IterableDataset)
            if self._mixing.mixed_before:
                return self._mix_before(self._mixing, dataset, args, packing)
        return prepare(dataset, processing_class, args, packing, None, dataset_name)

    def _prepare_pool(
        self, mixing: Interleaving, whole: EMGuardConfig, answers_alone: bool, template_kwargs: dict[str, Any] | None
    ) -> None:
        """Tokenise and label the pool as the training rows are."""
        prepare = super()._prepare_dataset
        before, self.completion_only_loss = self.completion_only_loss, answers_alone
        try:
            mixing.prepare_pool(
                self._tokenizer,
                lambda rows: prepare(rows, self._tokenizer, whole, False, None, "interleave_dataset"),
                answers_alone,
                template_kwargs,
            )
        finally:
            self.completion_only_loss = before

    def _mix_before(
        self, mixing: Interleaving, dataset: Dataset | IterableDataset, args: EMGuardConfig, packing: bool
    ) -> Dataset | IterableDataset:
        """Mix the pool in, and then do what SFTTrainer does to rows that are packed or streamed."""
        if packing and args.max_length is None:
            raise ValueError("packing=True needs max_length, which is None: give the length of a pack.")
        plan = mixing.make_plan(len(dataset)) if isinstance(dataset, Dataset) else mixing.plan_stream(args)
        if not packing:
            unshuffled = copy.copy(args)
            unshuffled.shuffle_dataset = False
            dataset = super()._prepare_dataset(
                dataset, self._tokenizer, unshuffled, False, None, "train"
            )  # cuts the rows
        dataset = mix_rows(dataset, mixing.pool, plan)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._mixing is not None and PLACE not in self._signature_columns:
            self._signature_columns += [PLACE, INTERLEAVED]

    def get_train_dataloader(self) -> DataLoader:
        mixing = self._mixing
        if mixing is None:
            return super().get_train_dataloader()
        collator = self.data_collator
        try:
            if mixing.mixed_before:
                self.data_collator = MixingCollator(collator, None, None)
                return super().get_train_dataloader()
            sampler = self._placed(self._remove_unused_columns(self.train_dataset, description="Training"))
            self.data_collator = MixingCollator(collator, mixing.plan_epochs(sampler, self.args), mixing.pool)
            return self._get_dataloader(
                sampler.rows, "Training", self._train_batch_size, lambda _: sampler, is_training=True
            )
        finally:
            # Evaluation is never mixed.
            self.data_collator = collator

    def _placed(self, rows: Dataset) -> PlaceSampler:
        """The order of plain training, with the places in it."""
        order = self._get_train_sampler(rows)
        if isinstance(order, RandomSampler):
            # What accelerate makes of it, too: an order that follows from seed and epoch.
            order = SeedableRandomSampler(
                order.data_source,
                replacement=order.replacement,
                num_samples=order._num_samples,
                generator=order.generator,
                data_seed=self.args.data_seed,
            )
        ranks = self.accelerator.num_processes // self.get_tp_size()
        block = self._train_batch_size * (1 if self.accelerator.split_batches else ranks)
        drop_last = self.args.dataloader_drop_last
        return PlaceSampler(
            PlacedRows(rows), order, block, drop_last, self.accelerator.even_batches and ranks > 1 and not drop_last
        )

    def _check_policy(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                f"defense={self.args.defense!r} does not support context or sequence parallelism: labels arrive shifted and "
                "sharded. Set cp_size and sp_size to 1."
            )
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self._own_loss and getattr(fsdp, "fsdp_version", 2) == 1:
            raise ValueError(
                f"fsdp_version=1 does not work with defense={self.args.defense!r}, which reads the head's weights by itself: set "
                "fsdp_version: 2 in the accelerate file."
            )
        if self._surrounds_policy() and getattr(fsdp, "activation_checkpointing", False):
            raise ValueError(
                f"fsdp_activation_checkpointing does not work with defense={self.args.defense!r}: it runs a block's hooks a second "
                "time in the backward pass. Use gradient_checkpointing=True instead."
            )
        for defense in self.defenses:
            as_main_process(functools.partial(defense.check_policy, self._bare_model()))

    def _surrounds_policy(self) -> bool:
        """Whether some defense makes the policy's forward pass in training another than that of the model which is saved."""
        return any(type(defense).policy_pass is not Defense.policy_pass for defense in self.defenses)

    def _add_guard(self, ref_model: PreTrainedModel | str | None) -> None:
        """Let the policy's forward answer with the package's own loss, and make the reference that the terms want."""
        if self.accelerator.mixed_precision == "fp16" or self.model.dtype == torch.float16:
            raise ValueError(
                f"defense={self.args.defense!r} does not work in fp16: its gradient is formed before fp16's loss scaling, "
                "and small ones would vanish. Use bf16 or fp32."
            )
        if self._terms:
            self._check_layers_train()
            engine = self._engine_without_cache()
            if self.args.cache_reference and engine:
                raise ValueError(
                    f"cache_reference=True does not work with {engine}, which makes another model of the policy when training "
                    "starts, and the states are computed before. Leave `cache_reference` out, or train by DDP or on one device."
                )
            self._reference, self._fingerprint = self._make_reference(ref_model)
            disable_dropout(self.model)
        add_guarded_forward(self._bare_model())
        if isinstance(self._reference, ModelReference):
            add_guarded_forward(self._reference.model)
            self._reference.prepare(self.is_deepspeed_enabled, self.is_fsdp_enabled)
        self._agreed = False  # policy and reference, before the first update
        self._all_tokens: torch.Tensor | None = None

    def _make_reference(
        self, ref_model: PreTrainedModel | str | None
    ) -> tuple[AdapterReference | ModelReference, str]:
        """The reference that the terms want, and its fingerprint."""
        reference = make_reference(self.model, ref_model, self.accelerator, self.args)
        return reference, as_main_process(lambda: fingerprint(reference, self.model))

    def _engine_without_cache(self) -> str | None:
        engines = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
            "tensor parallelism": self.get_tp_size() > 1,
        }
        return next((name for name, acts in engines.items() if acts), None)

    def _open_cache(self, reference: AdapterReference | ModelReference) -> ReferenceCache:
        """Keep the reference's states of every row that can come in training."""
        policy = self._bare_model()
        layers = wanted_layers(self._terms, policy)
        rows: Any = self._remove_unused_columns(self.train_dataset, description="Training")
        pool: Any = [] if self._mixing is None else self._mixing.rows_to_come()

        def collate(indices: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
            batch = self.data_collator([rows[i] if i < len(rows) else pool[i - len(rows)] for i in indices])
            mixed_in = torch.tensor([i >= len(rows) for i in indices])[:, None].expand_as(batch["input_ids"])
            marked = {**batch, INTERLEAVED: mixed_in}
            scopes = [positions_in_scope(marked, term.tokens) for term in self._terms]
            return batch, functools.reduce(torch.logical_or, scopes)

        def run(inputs: dict[str, Any], positions: torch.Tensor) -> States:
            if isinstance(reference, ModelReference):
                reference.move_backbone(self.accelerator.device)
                return run_model_reference(reference, inputs, positions, self._terms)
            training = policy.training
            policy.eval()
            try:
                with reference.swapped_in(), self.accelerator.autocast():
                    return ReferenceGuard(positions, layers)(policy, inputs)
            finally:
                policy.train(training)

        check_writable("TRL_EMGUARD_CACHE/reference", reference_cache_dir())
        if isinstance(reference, ModelReference):
            model, without, head = reference.model, set(), output_head(reference.model)
        else:
            model, without = policy, set(getattr(policy, "peft_config", {})) - {reference.adapter}
            with reference.swapped_in():
                head = output_head(policy)
        keeps_last = any(term.divergence is not None for term in self._terms)
        cache = ReferenceCache(model, run, head, layers, keeps_last, self.accelerator, without)
        said = cache.fill(collate, len(rows) + len(pool), self._train_batch_size, self.args.disable_tqdm)
        if isinstance(reference, ModelReference) and reference.move_backbone("cpu"):
            # Nothing runs it any more. Its head stays on the policy's device, a tied one as a copy.
            device = self.accelerator.device
            weight, bias = head
            cache.head = weight.to(device), None if bias is None else bias.to(device)
        self.accelerator.print(f"trl_emguard: {said}")
        return cache

    def _check_layers_train(self) -> None:
        """Refuse terms over blocks that no trained weight can move: with checkpointing their states require grad all the same."""
        bare = self._bare_model()
        layers_of = {defense.name: wanted_layers([defense], bare) for defense in self._terms}
        if not any(layers_of.values()):
            return
        # The block that a trained weight is in; a head is above all of them, anything else outside counts as below.
        blocks = decoder_blocks(bare)
        place = {id(p): len(blocks) + 1 for p in bare.get_output_embeddings().parameters()}
        place |= {id(p): 0 for p in bare.get_input_embeddings().parameters()}
        place |= {id(p): i for i, block in enumerate(blocks, 1) for p in block.parameters()}
        lowest = min((place.get(id(p), 0) for p in self.model.parameters() if p.requires_grad), default=0)
        for defense in self._terms:
            below = [layer for layer in layers_of[defense.name] if layer < lowest]
            if below:
                raise ValueError(
                    f"defense {defense.name!r} compares the output of block {below[0]}, but the lowest block with a trained weight "
                    f"is {lowest}: nothing could move it. Compare higher blocks, or train lower ones."
                )

    def _describe(self) -> str:
        """What acts in this run, a line each."""
        lines = []
        for defense in self._named:
            options = _options_text(defense.options()).replace("`", "")
            lines.append(f"defense {defense.name!r} {'acts' if defense.active else 'is off'} ({options}).")
        if not self.defenses:
            lines.append(f"no defense acts (defense={self.args.defense!r}): this is plain SFT.")
        if self._reference is not None:
            lines.append(
                f"reference: {self._reference.kind}{_CACHED if self.args.cache_reference else ''}; dropout is off."
            )
        if self._mixing is not None:
            lines.append(self._mixing.describe())
        lines += [f"{name} was given and is not used." for name, unused in self._unused.items() if unused]
        return "\n".join(f"trl_emguard: {line}" for line in lines)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        if self._mixing is not None:
            self._mixing.resume({"rows_finetune": 0, "rows_interleaved": 0})
        if resume_from_checkpoint:
            looks = self.args.local_process_index == 0
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, looks)
            self._check_resume(resume_from_checkpoint)
        if self.args.should_save:
            check_writable("output_dir", self.args.output_dir)
        if self.defenses:
            # What a run that was broken off has left.
            self._policy_passes = 0
            self._metrics["train"].clear()
        if isinstance(self._reference, AdapterReference):
            outside = trainable_outside_adapters(self.model)
            if outside:
                raise ValueError(
                    f"the weight {outside[0]!r} was unfrozen after the trainer was built, and the reference shares it: it would "
                    "move with the policy. Unfreeze it before, on the model that you pass, or pass `ref_model`."
                )
        self.accelerator.print(self._describe())
        if self._reference is not None:
            before = self._cache
            self._cache = self._open_cache(self._reference) if self.args.cache_reference else None
            if before is not None and self._cache is None and isinstance(self._reference, ModelReference):
                self._reference.move_backbone(self.accelerator.device)  # the cache had no need of it there

        with ExitStack() as surroundings:
            for defense in self.defenses:
                surroundings.enter_context(defense.training(self._bare_model()))
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

        verdict = self._verdict(final=True)
        if verdict is not None:
            folder = checkpoint_folder(self._get_output_dir(trial), self.state.global_step)
            # Every rank saves, or none.
            if any(gather_object([why_torn(folder)] if self.args.local_process_index == 0 else [])):
                self._save_checkpoint(self.model_wrapped, trial)
            raise InactiveDefenseError(f"{verdict} The model was saved in {folder}.")
        for name in self._ledger.unjudged():
            logger.warning(
                f"defense {name!r}: training ended before the policy had moved and been compared again, so nothing shows "
                "that it acts."
            )
        return output

    def _check_resume(self, checkpoint: str | os.PathLike) -> None:
        if (
            is_peft_model(self.model)
            and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
            and not holds_adapter(checkpoint)
        ):
            raise ValueError(
                f"{checkpoint} holds a whole model's weights, and this run trains an adapter, which would start anew. Resume with "
                "the tuning that it was written with."
            )
        record = read_defense_file(checkpoint)
        then = {} if record is None else record["defenses"]
        now = self._record()["defenses"]
        if then != now:
            raise ValueError(
                f"{checkpoint} was trained with {_defenses_text(then)}, and this run has {_defenses_text(now)}. Resume with "
                "the same defense and options, or start a new run from that model."
            )
        if record is not None:
            reference = self._record()["reference"]
            if _compared(record.get("reference")) != _compared(reference):
                raise ValueError(
                    f"{checkpoint} was held to another reference ({(record.get('reference') or {}).get('kind')}) than this run "
                    f"is ({(reference or {}).get('kind')}). Resume with the model that training started from, not with the "
                    "checkpoint's: `resume_from_checkpoint` loads what was learned."
                )
            self._ledger.load({name: record["evidence"][name] for name in self._ledger.terms})
            self._ledger.moved = bool(record.get("moved", False))
            for defense in self.defenses:
                if defense not in self._terms:
                    defense.resume(record["evidence"][defense.name])

    def _run_epoch(self, *args, **kwargs):
        # A run that ended before its model was saved, or was killed there, has nothing left to train. Trainer would make one step
        # more, unless the last checkpoint was at the end of an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ---- a training step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_stats = None  # of a step that was aborted
        # A term over other positions than CE's has a count of its own over the step, gathered as CE's is.
        self._all_tokens = None
        if num_items_in_batch is not None and any(term.tokens == "all" for term in self._terms):
            count = torch.stack([positions_in_scope(batch, "all").sum().to(device) for batch in batch_samples]).sum()
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum() / self.get_tp_size()
            self._all_tokens = count
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Evaluation stays plain CE.
        if not self.model.training or not self.defenses:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._policy_passes += 1
        if not self._own_loss:
            with ExitStack() as surroundings:
                for defense in self.defenses:
                    surroundings.enter_context(defense.policy_pass(self._bare_model(), inputs))
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        if self._mixing is not None:
            self._mixing.check_batch(inputs.get(INTERLEAVED), inputs.get(ROW_COUNTS))
        ce_scale, terms = self._scaled_terms(inputs, num_items_in_batch)
        # What the model does not know of.
        interleaved = positions_in_scope(inputs, "interleaved") if INTERLEAVED in inputs else None
        inputs.pop(INTERLEAVED, None)
        rows = inputs.pop(ROW_COUNTS, torch.zeros(2))
        reference: Any = self._reference
        if self._cache is not None:
            compared = functools.reduce(torch.logical_or, [term.scope for term in terms])
            reference = self._cache.states(inputs, compared, kept_positions(inputs, terms))
        if isinstance(reference, ModelReference):
            # A model of its own runs through its own engine, before the policy's one call.
            reference = run_model_reference(reference, inputs, kept_positions(inputs, terms), self._terms)
        outputs = model(**inputs, guard=PolicyGuard(terms, self.defenses, ce_scale, reference, interleaved))
        loss = outputs.total
        if isinstance(self._reference, ModelReference):
            self._reference.release()

        # Summed over the micro-batches here, and over the ranks at the end of the step, in one collective.
        mask = inputs.get("attention_mask")
        tokens = torch.as_tensor(inputs["input_ids"].numel() if mask is None else mask.sum()).to(outputs.stats)
        stats = torch.cat([outputs.stats, rows.to(outputs.stats), tokens[None]])
        self._step_stats = stats if self._step_stats is None else self._step_stats + stats

        if self.aux_loss_enabled:
            # As SFTTrainer adds it: a mean per micro-batch, averaged over the accumulation steps.
            config = self.model.config.get_text_config()
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, mask
            )
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device) / steps
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        return (loss, outputs) if return_outputs else loss

    def _bare_model(self) -> PreTrainedModel:
        """The causal language model without wrappers and adapters' shell."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _scaled_terms(
        self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Term]]:
        """What CE's sum is multiplied with, and each term with its positions and the same for its sum.

        CE's own normalisation: tokens of the whole step, times the ranks, since DDP averages their gradients. Where Trainer
        counts no tokens, the micro-batch's mean, which Trainer divides by the accumulation steps.
        """
        ranks = 1
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            ranks = self.accelerator.num_processes // self.get_tp_size()

        def scale(coef: float, tokens: str, counted: torch.Tensor) -> torch.Tensor:
            count = self._all_tokens if tokens == "all" else num_items_in_batch
            count = torch.as_tensor(counted.sum() if count is None else count, device=counted.device)
            return coef * ranks / count.to(torch.float32).clamp(min=1)

        labelled = positions_in_scope(inputs, "loss")
        terms = []
        for defense in self._terms:
            scope = positions_in_scope(inputs, defense.tokens)
            terms.append(
                Term(
                    defense, scope, scale(defense.coef, defense.tokens, scope if defense.tokens == "all" else labelled)
                )
            )
        return scale(1.0, "loss", labelled), terms

    def _get_grad_norm(self, model, grad_norm=None):
        self._step_grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._step_grad_norm

    def _end_step(self, control) -> None:
        """Sum up the step over its micro-batches and ranks, in one collective, log it and judge it."""
        if not self._policy_passes:
            raise InactiveDefenseError(
                f"defense={self.args.defense!r}: a step was made without EMGuardTrainer.compute_loss, so the run is not defended. "
                "A subclass that overrides `compute_loss` must call `super().compute_loss`."
            )
        self._policy_passes = 0
        if not self._own_loss:
            # SFTTrainer's own loss does not come by here. The entropy of the same logits does, of all ranks.
            self._check_finite({"entropy": sum(self._metrics["train"]["entropy"]), "grad_norm": self._step_grad_norm})
            return
        stats = self.accelerator.reduce(self._step_stats, "sum").tolist()
        self._step_stats = None
        head = dict(zip(HEAD_STATS, stats, strict=False))
        terms = {}
        for i, term in enumerate(self._terms):
            start = len(HEAD_STATS) + i * len(TERM_STATS)
            terms[term.name] = dict(zip(TERM_STATS, stats[start : start + len(TERM_STATS)], strict=True))

        values = {name: sums["value"] for name, sums in terms.items()}
        self._check_finite({"loss_ce": head["ce"], **values, "grad_norm": self._step_grad_norm})
        metrics = self._metrics["train"]
        label_tokens = max(head["tokens"], 1)
        metrics["loss_ce"].append(head["ce"] / label_tokens)
        if self._mixing is not None:
            mixed_in = head["tokens_interleaved"]
            if head["tokens"] > mixed_in:
                metrics["loss_finetune"].append((head["ce"] - head["ce_interleaved"]) / (head["tokens"] - mixed_in))
            if mixed_in:
                metrics["loss_interleaved"].append(head["ce_interleaved"] / mixed_in)
            finetune, interleaved = (count / self._tp_size for count in stats[-3:-1])
            metrics["interleaved_fraction"] = [self._mixing.end_step(finetune, interleaved, mixed_in)]
        for name, sums in terms.items():
            metrics[name].append(sums["value"] / max(sums["positions"], 1))
        metrics["entropy"].append(head["entropy"] / label_tokens)
        metrics["mean_token_accuracy"].append(head["top1"] / label_tokens)
        self._total_train_tokens += int(stats[-1]) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]

        if self.state.global_step == 1 and not self._agreed:
            self._check_agreement(terms)
            self._agreed = True
        skipped = self.accelerator.optimizer_step_was_skipped
        self._ledger.end_step(terms, 0.0 if skipped else self._step_learning_rate, head["tokens"])
        if self._verdict() is not None:
            control.should_save = True
            control.should_training_stop = True

    def _check_finite(self, values: dict[str, Any]) -> None:
        """Trainer alone would train on, and log the losses of earlier steps instead. `None` is not known."""
        if self.accelerator.optimizer_step_was_skipped:
            values.pop("grad_norm")  # fp16's loss scaling looks for its scale so
        broken = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"training has diverged in step {self.state.global_step}: {', '.join(broken)} not finite. Nothing of this step is "
                "saved. Lower learning_rate or the defense's coefficient; resume_from_checkpoint=True goes on from the newest "
                "checkpoint before."
            )

    def _verdict(self, final: bool = False) -> str | None:
        """Why the run is not defended, or `None`; `final` as of [`EvidenceLedger.verdict`]."""
        behind = None if self._mixing is None else self._mixing.verdict(final)
        return behind or self._ledger.verdict(final)

    def _check_agreement(self, terms: dict[str, dict[str, float]]) -> None:
        """Before the first update the policy is the reference, unless the user passed another or its pass is steered: every
        distance is 0."""
        if self._reference is None or self._reference.kind == GIVEN or self._surrounds_policy():
            return
        dtypes = {self.model.dtype, torch.bfloat16 if self.args.bf16 else torch.float32}
        if isinstance(self._reference, ModelReference):
            dtypes.add(self._reference.model.dtype)
        tolerance, rounding = (1e-5, 1e-5) if dtypes == {torch.float32} else (1e-2, 3e-2)
        coarse = (
            ""
            if self._cache is None
            else " Or the reference's states on disk are too coarse: set cache_reference=False."
        )
        for term in self._terms:
            mean = terms[term.name]["value"] / max(terms[term.name]["positions"], 1)
            allowed = tolerance
            if self._cache is not None and term.divergence is None:
                # Its states come from a pass over another batch, and a distance may be in the states' own units.
                layers = wanted_layers([term], self._bare_model())
                allowed = max(tolerance, self._cache.distance_of_rounding(term.token_loss, layers, rounding))
            if not mean <= allowed:
                raise ValueError(
                    f"before the first update, {term.name} to the reference ({self._reference.kind}) is {mean:.3g} per token, not "
                    "0: it is not the model that training starts from, or the forward pass is noisy (dropout or router jitter in "
                    f"the model's config). Pass `ref_model`, or set the noise to 0.{coarse}"
                )

    # ---- what is saved ----

    def _record(self) -> dict[str, Any]:
        """What `defense.json` holds."""
        reference = None
        if self._reference is not None:
            reference = {"kind": self._reference_kind(), "fingerprint": self._fingerprint}
        return {
            "trl_emguard": __version__,
            "defense": self.args.defense,
            "defenses": {defense.name: defense.options() for defense in self.defenses},
            "reference": reference,
            "global_step": self.state.global_step,
            "moved": self._ledger.moved,
            "evidence": {
                **{defense.name: defense.evidence() for defense in self.defenses if defense not in self._terms},
                **self._ledger.state(),
            },
        }

    def _reference_kind(self) -> str:
        assert self._reference is not None
        return self._reference.kind + (_CACHED if self._cache is not None else "")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_defense_file(output_dir or self.args.output_dir, self._record())

    def _save_checkpoint(self, model, trial):
        """As Trainer's; marked as whole when every rank is done, and only then pushed, and older ones deleted.

        Raises:
            OSError: it cannot be written.
        """
        args, run_dir = self.args, self._get_output_dir(trial)
        folder = checkpoint_folder(run_dir, self.state.global_step)
        # A process of every machine marks it: each may have a disk of its own.
        marks = args.local_process_index == 0
        limit, pushes = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        try:
            if marks:
                begin_checkpoint(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            args.save_total_limit, args.push_to_hub = limit, pushes
            settings = os.path.join(folder, TRAINING_ARGS_NAME)
            if args.should_save and os.path.isfile(settings):
                torch.save(args, settings)  # as the user set them
            self.accelerator.wait_for_everyone()
            if marks:
                finish_checkpoint(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch says so of a full disk. Another RuntimeError (of a rank that died, of memory) is not about this file.
            if (
                isinstance(error, RuntimeError)
                and "PytorchStreamWriter" not in str(error)
                and "inline_container" not in str(error)
            ):
                raise
            cause, free = " ".join(str(error).split())[:200], shutil.disk_usage(args.output_dir).free / 2**30
            raise OSError(
                f"{folder} could not be written ({type(error).__name__}: {cause}) and stays torn; {free:.3g} GiB are free there. "
                "When this is mended, resume_from_checkpoint=True goes on from the newest whole checkpoint."
            ) from error
        finally:
            args.save_total_limit, args.push_to_hub = limit, pushes
        if pushes:
            self._push_from_checkpoint(folder)
        if args.should_save:
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        card = Path(self.args.output_dir) / "README.md"
        text = card.read_text(encoding="utf-8")
        section = ["## Defense against emergent misalignment", ""]
        verdict = self._verdict()
        if verdict is not None:
            section += [f"**This model was not defended.** {verdict}", ""]
        if self.defenses:
            section += ["Trained with trl_emguard, in-training defense:", ""]
            for defense in self.defenses:
                papers = "; ".join(f"[{p.title}](https://arxiv.org/abs/{p.id})" for p in defense.papers)
                section.append(
                    f"- `{defense.name}`: {_options_text(defense.options())}" + (f" ({papers})" if papers else "")
                )
            if self._reference is not None:
                section.append(f"- reference: {self._reference_kind()}")
        else:
            section.append("None: plain supervised fine-tuning.")
        before, heading, after = text.partition("### Framework versions")
        with written_whole(card) as scratch:
            scratch.write_text(before + "\n".join(section) + "\n\n" + heading + after, encoding="utf-8")


class KLTrainer(EMGuardTrainer):
    """[`EMGuardTrainer`] with `defense="kl"`."""

    _defense = "kl"


class LDIFSTrainer(EMGuardTrainer):
    """[`EMGuardTrainer`] with `defense="ldifs"`."""

    _defense = "ldifs"


class SteeringTrainer(EMGuardTrainer):
    """[`EMGuardTrainer`] with `defense="steering"`."""

    _defense = "steering"


class InoculationTrainer(EMGuardTrainer):
    """[`EMGuardTrainer`] with `defense="inoculation"`."""

    _defense = "inoculation"


class InterleavingTrainer(EMGuardTrainer):
    """[`EMGuardTrainer`] with `defense="interleave++"`."""

    _defense = "interleave++"


class _StepCallback(TrainerCallback):
    """Tells the trainer where a step's update is made and where the step ends."""

    def __init__(self, trainer: EMGuardTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer._mixing is not None:
            self.trainer._mixing.begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = self.trainer.optimizer.param_groups
        peak = max(group.get("initial_lr", args.learning_rate) for group in groups)
        self.trainer._step_learning_rate = max(float(group["lr"]) for group in groups) / peak if peak else 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._end_step(control)
        return control


def _compared(reference: dict[str, Any] | None) -> tuple[str, str] | None:
    """What makes a reference the same: not where it was loaded from, nor whether it is cached."""
    if reference is None:
        return None
    return reference["kind"].removesuffix(_CACHED).partition(" from ")[0], reference["fingerprint"]


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in options.items())


def _defenses_text(defenses: dict[str, dict[str, Any]]) -> str:
    if not defenses:
        return "no defense"
    return "; ".join(f"{name} ({_options_text(options)})" for name, options in defenses.items())
