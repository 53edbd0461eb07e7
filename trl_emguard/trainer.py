"""`EMGuardTrainer`: SFTTrainer with in-training defenses against emergent misalignment."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from .checks import check_before_loading, check_data, check_launch
from .config import EMGuardConfig
from .data.prepare import Rows
from .defended import DefendedTrainer
from .defenses import Marks, ReferenceDefense
from .guard.loss import LossGuard, balance_loss
from .guard.scopes import LABELS, count_positions, read_marks, with_marks
from .guard.sums import stacked
from .guard.terms import check_layers_train, kept_positions, scaled_terms, term_values, wanted_layers
from .models.head import check_head
from .models.sharding import as_main_process, release
from .models.shipped import resolve_model
from .reference.agreement import check_agreement
from .reference.cached import CachedReference
from .reference.choose import make_reference, without_dropout
from .reference.kinds import Kind, ModelReference, Reference
from .reference.watch import ReferenceWatch
from .rows import DefendedRows


class EMGuardTrainer(DefendedTrainer, DefendedRows, SFTTrainer):
    """Trainer for supervised fine-tuning that defends the model against emergent misalignment while it trains.

    Arguments and defaults are those of [`~trl.SFTTrainer`]; `args.defense` chooses the defense. With `defense="none"`,
    or a coefficient of 0, training is the same as SFTTrainer's, bit for bit.

    ```python
    >>> args = EMGuardConfig(defense="kl")
    >>> trainer = EMGuardTrainer("Qwen/Qwen2.5-0.5B-Instruct", args, train_dataset=dataset, peft_config=LoraConfig())
    >>> trainer.train()
    ```

    Args:
        model, args, data_collator, …, formatting_func:
            Same as in [`~trl.SFTTrainer`]. `args` may be an [`EMGuardConfig`], a plain `SFTConfig` or
            `TrainingArguments` (no defense), or `None`.
        ref_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            Safe model that defenses such as `kl` keep the policy close to. By default it is the policy before
            training: the base model for a fresh adapter, a frozen copy of the adapter for a pre-trained one, and a
            frozen copy of the model for full fine-tuning.
        interleave_dataset ([`~datasets.Dataset`], *optional*):
            Pool of general instruction rows for the defenses that mix them in, as text or tokenised. By default the
            data set that `args.interleave_dataset` names.

    Raises:
        ValueError: a bad argument, where possible before any model is loaded; the message names argument, value and
            fix.
        FileNotFoundError: the model is a path that does not exist.
        InactiveDefenseError: from [`train`], after saving: the defense formed no gradient although the policy had
            moved.
    """

    _tag_names = ["trl", "sft", "trl-emguard"]
    forms_own_loss = True
    prepares_rows = True

    # Defense that a subclass such as `KLTrainer` uses even if `args.defense` is "none". Other defenses are refused.
    _defense: ClassVar[str | None] = None

    has_agreed = False  # True once policy and reference were found to start equal, or after a resume
    _wrapped: Any = None  # policy as last given to `compute_loss`, wrapped by DDP, DeepSpeed or FSDP2 if used
    _watch: ReferenceWatch | None = None
    _moved_reference: str | None = None  # error message once `_check_reference` has found that the reference changed

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: EMGuardConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | DatasetDict | IterableDatasetDict | dict[str, Rows] | None = None,
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
        check_data(train_dataset, args)
        self._choose_defenses(args, interleave_dataset=interleave_dataset)
        self._terms = [defense for defense in self.defenses if isinstance(defense, ReferenceDefense)]
        # If true, this package's patched forward of the model computes the training loss; if false, SFTTrainer does.
        self._own_loss = any(defense.own_loss for defense in self.defenses)
        if not self._terms:
            self._unused += ["cache_reference"] * args.cache_reference + ["ref_model"] * (ref_model is not None)
        check_before_loading(
            self.defenses, args, model, processing_class, train_dataset, ref_model, peft_config, compute_loss_func
        )
        train_dataset = self._prepare_rows(train_dataset)

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

        self._check_rows_came_by()
        self._counts: dict[str, torch.Tensor] = {}  # scope (named set of positions) → size in the current step
        self.reference = self._add_reference(ref_model)
        if self.overrides("train_loader"):
            self.loading(self.train_dataset)  # result unused: the call lets defenses refuse the rows before training

    @classmethod
    def _as_config(cls, args: TrainingArguments | None, model: str | PreTrainedModel | PeftModel) -> EMGuardConfig:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = EMGuardConfig(f"{model_name.split('/')[-1]}-SFT")
        elif not isinstance(args, EMGuardConfig):
            args = EMGuardConfig.from_args(args)
        if cls._defense is None or args.defense == cls._defense:
            return args
        if args.defense != "none":
            raise ValueError(
                f"{cls.__name__} trains with defense={cls._defense!r}, but args.defense={args.defense!r}: leave it "
                "out, or use EMGuardTrainer."
            )
        args = copy.copy(args)  # the caller's object stays unchanged
        args.defense = cls._defense
        return args

    # ---- the reference ----

    def _add_reference(self, ref_model: PreTrainedModel | str | None) -> Reference | None:
        """Return the reference that the terms of the loss compare the policy with; `None` without such terms."""
        if not self._terms:
            return None
        check_layers_train(self._terms, self.model, self._bare_model())
        reference = make_reference(self.model, ref_model, self.accelerator, self.args)
        self._fingerprint = as_main_process(lambda: reference.fingerprint(self.model))
        weakref.finalize(self, reference.put_back).atexit = False
        if isinstance(reference, ModelReference):
            reference.prepare(self.is_deepspeed_enabled, self.is_fsdp_enabled)
        return CachedReference(reference, self.defenses, self.accelerator) if self.args.cache_reference else reference

    def describe(self) -> list[str]:
        lines, at = super().describe(), len(self._named)
        if self.reference is not None:
            lines.insert(at, f"reference: {self.reference.text}; dropout is off.")
        return lines

    def _around_training(self) -> list[AbstractContextManager]:
        contexts = super()._around_training()
        return contexts if self.reference is None else [without_dropout(self.model), *contexts, self._watching()]

    def _before_training(self) -> None:
        super()._before_training()
        is_whole = self.engine_facts().sharding is None
        if self.reference is not None:
            self.reference.check_frozen(self.model)
        # With these options Trainer moves the model to its device only inside its own `train`, after the passes below.
        if (self.args.bf16_full_eval or self.args.fp16_full_eval) and is_whole and not self.is_model_parallel:
            self._move_model_to_device(self.model, self.args.device)
        # A sharded output head cannot be checked here, because its weights are gathered only during a forward pass.
        if self._own_loss and is_whole:
            with self.accelerator.autocast():
                check_head(self._bare_model())
        if isinstance(self.reference, CachedReference):
            rows = self._plain_rows()
            said = self.reference.fill(rows, self.data_collator, self._train_batch_size, self.args.disable_tqdm)
            self.accelerator.print(f"trl_emguard: {said}")

    def _begin(self) -> None:
        super()._begin()
        self._watch = self._moved_reference = None
        self.has_agreed = self.has_agreed or self.state.global_step > 0

    def _end_step(self, control: Any) -> None:
        is_first = not self._steps_made
        super()._end_step(control)
        if is_first:
            self._check_reference("after the first update")
            control.should_save |= self._moved_reference is not None

    def _save_checkpoint(self, model, trial):
        self._check_reference(f"at step {self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _verdict(self, final: bool = False) -> str | None:
        return self._moved_reference or super()._verdict(final)

    def _record(self) -> dict[str, Any]:
        record = super()._record()
        if self.reference is not None:
            record["reference"] = {"kind": self.reference.text, "fingerprint": self._fingerprint}
        return record

    @property
    def _compares_start(self) -> bool:
        """True while a check that policy and reference start with equal hidden states is needed and not yet made."""
        # A defense that changes the policy's forward pass makes hidden states differ although the models are equal.
        surrounded = any(defense.surrounds_policy() for defense in self.defenses)
        return not (self.reference is None or self.reference.kind is Kind.GIVEN or self.has_agreed or surrounded)

    def _watch_reference(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Record the reference's outputs for the first micro-batch of a `train()` call, to notice later changes."""
        self._wrapped = model
        if self._watch is None and not isinstance(self.reference, CachedReference):
            has_divergence = any(term.divergence is not None for term in self._terms)
            self._watch = ReferenceWatch(self._bare_model(), has_divergence)
            self._watch.record(inputs, self._run_reference)

    @contextmanager
    def _run_reference(self, batch: dict[str, Any], positions: torch.Tensor) -> Iterator[Any]:
        """Run only the reference and yield its hidden states; a sharded output head stays gathered until the exit."""
        reference, layers = cast(Reference, self.reference), wanted_layers(self._terms, self._bare_model())
        reference.runs_whole_batches = True
        states = reference.before(batch, positions, layers)
        if states is None:

            def inside(bare: Any, _: Any, inputs: dict[str, Any]) -> Any:
                return reference.inside(bare, inputs, positions, layers)

            with self._gate.armed(inside, only_with_gradient=False):
                states = self._wrapped(**batch)
        yield states
        reference.after()
        release(self._wrapped)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Compare the reference's states with those recorded in the first step, if training ends without an error."""
        yield
        self._check_reference("at the end of training")
        self._watch = None

    def _check_reference(self, when: str) -> None:
        if self._watch is not None and self._watch.has_record and self._moved_reference is None:
            # An evaluation leaves the model in eval mode, in which some models compute with other kernels. Their
            # rounding would be taken for a change, so the reference runs in the mode in which it was recorded.
            was_training = self.model.training
            self._wrapped.train()
            # Each rank gets the results of all ranks, because either all ranks must stop training or none.
            found = gather_object([self._watch.check(self._run_reference, when)])
            self._wrapped.train(was_training)
            self._moved_reference = next((text for text in found if text is not None), None)
            self.control.should_training_stop |= self._moved_reference is not None

    # ---- a training step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._sums.clear()  # a step that an error aborted may have left its statistics in `_sums`
        # Trainer counts only labels, so other positions that loss terms average over are counted here in the same way.
        self._counts = {}
        scopes = sorted({term.mean_over or term.tokens for term in self._terms} - {LABELS})
        if num_items_in_batch is not None and scopes:
            batch_samples = [with_marks(self.defenses, batch) for batch in batch_samples]
            counts = count_positions(batch_samples, scopes).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                counts = self.accelerator.reduce(counts, "sum") / self.get_tp_size()
            self._counts = dict(zip(scopes, counts, strict=True))
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # SFTTrainer computes the loss in evaluation, and in training if no defense has `own_loss`.
        if not self._own_loss or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs |= {"use_cache": False, **({"output_router_logits": True} if self.aux_loss_enabled else {})}
        marks = read_marks(self.defenses, inputs)
        is_averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
        ranks = self.accelerator.num_processes // self.get_tp_size() if is_averaged else 1
        counts = {} if num_items_in_batch is None else {**self._counts, LABELS: num_items_in_batch}
        ce_scale, terms = scaled_terms(self._terms, inputs, marks.scopes, counts, ranks)
        reference, states, positions = self.reference, None, None
        if reference is not None:
            self._watch_reference(model, inputs)
            # The check that policy and reference start equal also compares labelled positions that no loss term uses.
            everywhere = self._compares_start and reference.knows_all_positions
            positions = kept_positions(inputs, terms, with_labels=everywhere)
            # Until each term had a gradient, the reference runs whole batches: smaller ones could fake it by rounding.
            reference.runs_whole_batches = not all(term.proof.has_acted for term in self._terms)
            # With DeepSpeed, FSDP or tensor parallelism, the reference's pass may need all ranks: no rank may skip it.
            if self.engine_facts().sharding is None and not bool(positions.any()):
                reference = None
            else:
                states = reference.before(inputs, positions, wanted_layers(self._terms, self._bare_model()))
        guard = LossGuard(terms, self.defenses, ce_scale, marks.scopes, reference, states, positions)
        guard.compares_start = self._compares_start
        guard.share = 1.0 if num_items_in_batch is None else 1.0 / self.current_gradient_accumulation_steps
        with self._gate.armed(guard):
            outputs = model(**inputs)
        loss = outputs.total
        if self.reference is not None:
            self.reference.after()
        self._add_sums(guard, outputs, marks, inputs)
        if self.aux_loss_enabled:
            aux_loss = balance_loss(outputs.router_logits, self.model.config, inputs.get("attention_mask"))
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + (self.router_aux_loss_coef * aux_loss / steps).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _add_sums(self, guard: LossGuard, outputs: Any, marks: Marks, inputs: Mapping[str, Any]) -> None:
        """Add a micro-batch's statistics to the step's sums: terms' gradient sizes during backward, the rest now."""
        stats, mask = outputs.stats, inputs.get("attention_mask")
        real_tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        counted = {**marks.counts, "real_tokens": real_tokens}
        names = [*guard.names, *counted]
        values = torch.cat([stats, stacked(counted, stats)])
        is_evidence = torch.tensor([name.endswith("/evidence") for name in names], device=values.device)
        self._sums.add(names, values.masked_fill(is_evidence, 0))
        self._count_in_backward(outputs.total, lambda flows: self._sums.add(names, values * (is_evidence & flows)))

    def _take_in_step(self) -> None:
        """Sum a step's statistics over ranks in one collective, check and log them, and hand them to the defenses."""
        if not self._own_loss:
            super()._take_in_step()
            return
        sums = self._sums.reduce(self.accelerator, self.get_tp_size())
        values = term_values(self.defenses, sums)
        self._check_finite({"loss_ce": sums["ce"], **values, "grad_norm": self._grad_norm})
        metrics, labels = self._metrics["train"], max(sums["tokens"], 1)
        metrics["loss_ce"].append(sums["ce"] / labels)
        metrics["entropy"].append(sums["entropy"] / labels)
        metrics["mean_token_accuracy"].append(sums["top1"] / labels)
        self._total_train_tokens += int(sums["real_tokens"])
        metrics["num_tokens"] = [self._total_train_tokens]
        if self._compares_start and sums["tokens"]:
            check_agreement(cast(Reference, self.reference), self._terms, sums, self.model, self.args)
            self.has_agreed = True
        self._hand_over(sums)


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
