"""`DefendedTrainer`: a mixin that lets TRL trainers train with defenses."""

import functools
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from .checkpoints.resume import checkpoint_folder
from .checkpoints.whole import WholeCheckpoints
from .checks import Engine, check_engine, load_config
from .defenses import Defense, Step, TermDefense, build_defenses
from .defenses.registry import options_text
from .defenses.schedule import ScheduleCallback
from .evidence import DEFENSE_FILE, PATIENCE, InactiveDefenseError, moves, read_defense_file, write_defense_file
from .guard.forward import Gate
from .guard.loss import PassGuard
from .guard.scopes import MARKS, read_marks
from .guard.sums import Sums, stacked
from .host import StepCallback, check_model, check_old_passes, check_optimizer, engine_facts, fit_ddp, read_arguments
from .io.files import check_writable
from .models.adapters import bare_model
from .models.sharding import as_main_process
from .record import add_to_card, as_read, run_identity, step_of_weights, why_other
from .version import __version__


logger = get_logger(__name__)

# `Defense` hooks on rows and batches. A defense that overrides one of them needs a trainer class that calls them all.
ROW_HOOKS = ("prepare_rows", "prepare_tokenized", "add_rows", "train_loader", "read_batch")


class DefendedTrainer(WholeCheckpoints):
    """Mixin for TRL trainers that compute the loss by the policy's own `forward` (SFT, DPO, KTO, GRPO).

    The mixin builds the defenses that `args.defense` names. It enters their context managers around training, and
    around every forward pass of the policy that forms a gradient. After each step it checks that the defenses have an
    effect. It writes `defense.json` beside every saved model. The loss stays that of the TRL trainer.

    The config class must inherit [`DefenseArguments`], then a TRL config, and call `check_defense` in `__post_init__`.

    ```python
    >>> class DefendedDPOTrainer(DefendedTrainer, DPOTrainer): ...
    ```

    Raises:
        TypeError: the config does not inherit [`DefenseArguments`], or the mixin stands behind the TRL trainer.
        ValueError: a defense needs a loss or hooks on rows that this trainer does not have, or surrounds the policy in
            a trainer that also needs the policy's likelihoods without it (RLOO, KTO's default, some of GRPO).
        InactiveDefenseError: from [`train`], after saving: the run turned out not to be defended.
    """

    forms_own_loss: ClassVar[bool] = False  # true if the class, not TRL, forms the loss for defenses with `own_loss`
    prepares_rows: ClassVar[bool] = False  # true if the class calls all `ROW_HOOKS`
    compares_weights: ClassVar[bool] = True  # true if resuming compares weights, which a dry run does not have
    _is_over = False  # true once training has ended: then `Defense.verdict` is called with `final=True`
    _has_begun = False  # true from the first `train()` on
    _has_card = False  # true once this trainer has written a model card
    _chosen_step: int | None = None  # step whose weights a callback has put back at the end of training, if one has

    defenses: list[Defense]  # active defenses

    def __init__(self, *args: Any, **kwargs: Any):
        config, model, has_adapter = read_arguments(super().__init__, args, kwargs)
        if not hasattr(self, "defenses"):
            self._choose_defenses(config)
            if model is not None:
                check_model(self.defenses, has_adapter, load_config(model, config))
        if self.defenses and model is not None:
            fit_ddp(config, load_config(model, config))
        super().__init__(*args, **kwargs)
        self._has_moved = False  # True once [`moves`] judged an update large enough to change the policy visibly
        self._policy_passes = 0
        self._sums = Sums()
        self._learning_rate = 0.0  # learning rate of the latest update, divided by the peak learning rate
        self._grad_norm: Any = None
        self._steps_made = 0  # optimizer steps of this `train()` call, without those before a resume
        self._still_steps = 0  # number of steps in a row, up to the latest, whose gradient norm was 0
        self._begin_with: dict[str, dict[str, Any]] = {}
        # Facts that identify the run, for resuming. They may hold a hash of weights, so they are collected before
        # FSDP2 shards these, and on all ranks, to gather ZeRO-3's shards. All ranks get the main process's result.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._identity = as_main_process(lambda: run_identity(self.model, self.train_dataset, seed))
        if self.defenses:
            check_engine(self.defenses, self.args, self.engine_facts())
            check_optimizer(self.optimizer, self.model)  # Trainer makes its own optimizer only later, in `train`
            if model is None:  # `read_arguments` found no model, so these checks run only now, with the model loaded
                check_model(self.defenses, is_peft_model(self.model), self.model.config)
            for defense in self.defenses:
                as_main_process(functools.partial(defense.check_policy, self._bare_model()))
            self._gate = Gate(self._bare_model())
            weakref.finalize(self, self._gate.remove).atexit = False
            self.add_callback(StepCallback(self))
            self.add_callback(ScheduleCallback(self.defenses, self._metrics["train"]))

    def _choose_defenses(self, args: Any, **inputs: Any) -> None:
        """Build the config's defenses before anything is loaded. Refuse an active one that this class cannot run."""
        for defense in args.check_defense():
            overridden = [hook for hook in ROW_HOOKS if getattr(defense, hook) is not getattr(Defense, hook)]
            if (defense.own_loss and not self.forms_own_loss) or (overridden and not self.prepares_rows):
                raise ValueError(
                    f"defense={defense.name!r} does not work with {type(self).__name__}: it changes "
                    f"{'the loss' if defense.own_loss else 'the training rows'}, which this trainer makes itself."
                )
            if defense.surrounds_policy():
                check_old_passes(type(self), args)
        self._named, self.defenses = build_defenses(args, **inputs)
        read = {name for defense in self.defenses for name in defense.inputs}
        self._unused = [name for name, value in inputs.items() if value is not None and name not in read]

    def engine_facts(self) -> Engine:
        """Return facts about the engine that runs this trainer. A dry run returns those of its launch."""
        return engine_facts(self)

    def _bare_model(self) -> PreTrainedModel:
        """Return the causal language model without the PEFT wrapper, its adapters still in place."""
        return bare_model(self.model)

    # ---- training ----

    def describe(self) -> list[str]:
        """Return lines to print before training: defenses (on or off, options), their own lines, unused arguments."""
        lines = [
            f"defense {d.name!r} {'acts' if d in self.defenses else 'is off'} ({options_text(d.options())})."
            for d in self._named
        ]
        if not self.defenses:
            lines.append(f"no defense acts (defense={self.args.defense!r}): this is plain {self._name or 'training'}.")
        lines += [line for defense in self.defenses for line in defense.describe()]
        return lines + [f"{name} was given and is not used." for name in self._unused]

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._begin_with, self._is_over, self._chosen_step, self._has_card = {}, False, None, False
        trial = kwargs.get("trial", args[0] if args else None)
        of_config = None if self._has_begun or trial is not None else self.args.resume_from_checkpoint
        # `False` and an empty string start the run anew. A shell variable that is not set gives an empty string.
        asked, self._has_begun = of_config if resume_from_checkpoint is None else resume_from_checkpoint, True
        checkpoint = self.find_checkpoint(asked) if asked else None
        if checkpoint is not None:
            self.check_resume(checkpoint)
        if self.args.should_save:
            check_writable("output_dir", self.args.output_dir)
        if self.defenses:
            # An earlier `train()` call, if interrupted, may have left an unfinished step's pass count and metrics.
            self._policy_passes = 0
            self._metrics["train"].clear()
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "join_trainer"):  # true for `DriftCallback`, which logs its values through this dict
                callback.join_trainer(self._metrics["train"], self.callback_handler.callbacks)
        self.accelerator.print("\n".join(f"trl_emguard: {line}" for line in self.describe()))
        self._before_training()
        with ExitStack() as surroundings:
            for context in self._around_training():
                surroundings.enter_context(context)
            output = super().train(checkpoint, *args, **kwargs)
        self._conclude(trial)
        return output

    def _around_training(self) -> list[AbstractContextManager]:
        """Return the context managers to enter around training. They are exited even if training fails."""
        return [defense.training(self._bare_model()) for defense in self.defenses]

    def _before_training(self) -> None:
        """Warn of weights that will not be saved. Called after the lines of [`describe`] are printed."""
        unsaved = self.why_unsaved()
        if unsaved is not None:
            logger.warning(unsaved)

    def _finalize_training(self, *args, **kwargs):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "choose_weights"):  # true for `DriftCallback`, which may put back earlier weights
                step = callback.choose_weights(self.args, self.state, self.model)
                self._chosen_step = self._chosen_step if step is None else step
        return super()._finalize_training(*args, **kwargs)

    def _conclude(self, trial: Any) -> None:
        """Check the finished run. If it was not defended, save the model and raise [`InactiveDefenseError`]."""
        self._is_over = True
        if (verdict := self._verdict()) is not None:
            folder = checkpoint_folder(self._get_output_dir(trial), self.state.global_step)
            self.create_model_card()  # states the verdict
            if not self.has_whole_checkpoint(trial):
                self._save_checkpoint(self.model_wrapped, trial)
            elif self.args.push_to_hub:
                self._push_from_checkpoint(folder)
            self._finish_current_push()
            raise InactiveDefenseError(f"{verdict} The model was saved in {folder}.")
        for defense in self.defenses:
            if isinstance(defense, TermDefense) and defense.proof.is_unjudged:
                logger.warning(
                    f"defense {defense.name!r}: training ended before the policy had moved and been compared again, "
                    "so nothing shows that it acts."
                )

    def check_resume(self, checkpoint: Any) -> None:
        """Refuse a checkpoint of another run or with other defenses; otherwise restore the defenses' state from it.

        Args:
            checkpoint: folder of a whole checkpoint.

        Raises:
            ValueError: this run has another defense, option, reference, model, seed or rows.
        """
        record = read_defense_file(checkpoint)
        why = why_other(record, self._record(), self.defenses, self.compares_weights, is_on_all_ranks=True)
        if why is not None:
            raise ValueError(f"{checkpoint} {why}")
        if record is None:
            return
        for defense in self.defenses:
            defense.load(checkpoint)
            defense.continue_from(record["defenses"][defense.name])
        self._has_moved = bool(record.get("moved", False))
        self._begin_with = {defense.name: record["evidence"][defense.name] for defense in self.defenses}

    def why_foreign(self, checkpoint: str) -> str | None:
        try:
            return why_other(read_defense_file(checkpoint), self._record(), self.defenses, self.compares_weights)
        except ValueError as error:
            return str(error)

    # ---- a training step ----

    def compute_loss(self, model, inputs, *args, **kwargs):
        # Evaluation runs without defenses, and so does training if no defense is active.
        if not self.model.training or not self.defenses:
            return super().compute_loss(model, inputs, *args, **kwargs)
        marks = read_marks(self.defenses, inputs)
        guard = PassGuard(self.defenses, {**inputs, MARKS: marks})
        with self._gate.armed(guard):
            output = super().compute_loss(model, inputs, *args, **kwargs)
        loss = output[0] if isinstance(output, tuple) else output
        if not guard.passes:
            raise InactiveDefenseError(
                f"defense={self.args.defense!r}: {type(self).__name__}.compute_loss made no pass of the policy, so "
                "the run is not defended."
            )
        if marks.counts:
            self._sums.add(list(marks.counts), stacked(marks.counts, loss.detach().float()))
        self._count_in_backward(loss)
        return output

    def _count_in_backward(self, loss: torch.Tensor, then: Callable[[torch.Tensor], None] | None = None) -> None:
        """Count a pass of the policy once a gradient flows back into its loss.

        A subclass may call `compute_loss` only to log the loss, and train on another loss. Such a pass does not count.

        Args:
            loss: loss that was computed from the pass.
            then: function to call when the gradient arrives, with a boolean tensor, `()`: True if it is not 0.
        """

        def count(gradient: torch.Tensor) -> None:
            self._policy_passes += 1
            if then is not None:
                then(gradient.detach() != 0)

        if loss.requires_grad:
            loss.register_hook(count)

    def _get_grad_norm(self, model, grad_norm=None):
        self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    def _note_update(self) -> None:
        """Store the learning rate divided by its peak. Drop a non-finite gradient norm if all gradients are finite."""
        if self._grad_norm is not None and not math.isfinite(self._grad_norm):
            # DeepSpeed has freed the gradients of a step that it skips, so nothing shows that they were repaired.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if gradients and all(bool(gradient.isfinite().all()) for gradient in gradients):
                self._grad_norm = None  # a callback has removed or repaired the bad gradients
        groups = self.optimizer.param_groups
        peak = max(group.get("initial_lr", self.args.learning_rate) for group in groups)
        self._learning_rate = max(float(group["lr"]) for group in groups) / peak if peak else 0.0

    def _begin(self) -> None:
        self._steps_made = self._still_steps = 0
        for defense in self.defenses:
            defense.begin(self._begin_with.get(defense.name, {}))
        self._record()  # result unused: the call refuses options and evidence that a checkpoint could not hold

    def _end_step(self, control: Any) -> None:
        """Check after a step that it was defended, and stop training if a defense has no effect."""
        if not self._policy_passes:
            classes = (c for c in type(self).__mro__ if "compute_loss" in vars(c))
            owner = next(c.__name__ for c in classes if c.__module__.startswith("trl_emguard"))
            raise InactiveDefenseError(
                f"defense={self.args.defense!r}: a step was made without {owner}.compute_loss: no gradient "
                "flowed back into its loss, so the run is not defended. A subclass that overrides `compute_loss` must "
                "train on what `super().compute_loss` returns."
            )
        self._policy_passes = 0
        self._take_in_step()
        self._steps_made += 1
        if self._verdict() is not None:
            control.should_save = control.should_training_stop = True

    def _take_in_step(self) -> None:
        """Refuse a non-finite entropy or gradient norm. Give defenses the step's statistics, summed over ranks."""
        entropy = self._metrics["train"].get("entropy")
        self._check_finite({"entropy": sum(entropy) if entropy else None, "grad_norm": self._grad_norm})
        self._hand_over({} if self._sums.is_empty else self._sums.reduce(self.accelerator, self.get_tp_size()))

    def _hand_over(self, sums: dict[str, float]) -> None:
        """Give the step's sums to defenses, log their metrics, and note if the update visibly changed the policy."""
        self._check_trains(sums.get("tokens", 1))
        step, metrics = Step(sums, self._has_moved), self._metrics["train"]
        for defense in self.defenses:
            for name, value in defense.end_step(step).items():
                metrics[name] = [value] if name in defense.running_metrics else [*metrics[name], value]
        rate = 0.0 if self.accelerator.optimizer_step_was_skipped else self._learning_rate
        self._has_moved = self._has_moved or moves(rate, sums.get("tokens", 1))

    def _check_finite(self, values: dict[str, Any]) -> None:
        """Raise an error for values neither finite nor `None`. Trainer hides NaN: it logs means of earlier losses."""
        # The loss scaling of fp16 skips steps with a non-finite norm until it has found its scale. In bf16, DeepSpeed
        # skips such steps too, but there is no scale to find, so all later steps could be skipped as well.
        if self.accelerator.optimizer_step_was_skipped and self.engine_facts().is_fp16:
            values.pop("grad_norm")
        broken = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"training has diverged in step {self.state.global_step}: {', '.join(broken)} not finite. Nothing of "
                "this step is saved. Start anew with a lower learning_rate, or with a lower coefficient of the "
                "defense: a run that resumes keeps both."
            )

    def _check_trains(self, label_tokens: float) -> None:
        """Raise an error if the gradient norm stays 0 for `PATIENCE` steps: the loss depends on no trained weight."""
        # Sound runs may have a norm of 0: GRPO if all rewards are alike, and optimizers that update during backward.
        in_backward = any(word in f"{self.args.optim}".lower() for word in ("layerwise", "lomo"))
        made = label_tokens and not in_backward and self._grad_norm is not None
        is_still = made and not self.accelerator.optimizer_step_was_skipped and float(self._grad_norm) == 0
        trained = sum(p.requires_grad for p in self.model.parameters()) if is_still else 0
        self._still_steps = self._still_steps + 1 if is_still and (self.forms_own_loss or not trained) else 0
        if self._still_steps >= PATIENCE:
            raise InactiveDefenseError(
                f"defense={self.args.defense!r}: the gradient norm was 0 in {self._still_steps} steps in a row, so "
                f"nothing trains ({trained} weights have requires_grad=True). PEFT freezes an adapter that it loads "
                "for inference: load it with `is_trainable=True`, or unfreeze the weights that are to be trained."
            )

    def _verdict(self, final: bool = False) -> str | None:
        """Return why the run is not defended, or `None`."""
        return next((why for d in self.defenses if (why := d.verdict(final or self._is_over))), None)

    # ---- saving ----

    def _record(self) -> dict[str, Any]:
        """Return the content of `defense.json`."""
        return {
            "trl_emguard": __version__,
            "defense": self.args.defense,
            "defenses": {d.name: as_read(d, "options", d.options()) for d in self.defenses},
            "reference": None,
            "run": self._identity,
            "global_step": step_of_weights(self.args, self.state, self._is_over, self._chosen_step),
            "moved": self._has_moved,
            "evidence": {d.name: as_read(d, "evidence", d.evidence()) for d in self.defenses},
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        own = Path(self.args.output_dir).resolve()
        if not (_internal_call or self._has_card) and Path(output_dir or own).resolve() == own:
            self.create_model_card()  # otherwise the folder could keep the card of an earlier run
        if self.args.should_save:
            # An interrupted save must not leave new weights beside the record of an earlier run.
            Path(output_dir or own, DEFENSE_FILE).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            for defense in self.defenses if _internal_call and output_dir else ():  # only for a checkpoint
                defense.save(str(output_dir))  # data for resuming, which other saved models do not need
            write_defense_file(output_dir or self.args.output_dir, self._record())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer pushes `output_dir`, into which it copies the checkpoint's weights, but not the record beside them.
        # It does neither while the last push still runs. Trainer sets `push_in_progress` on the main process alone.
        push = getattr(self, "push_in_progress", None)
        copies = self.args.hub_strategy != "end" and (self.args.hub_always_push or push is None or push.is_done())
        record = read_defense_file(checkpoint_folder) if copies and self.is_world_process_zero() else None
        if record is not None:
            write_defense_file(self.args.output_dir, record)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        self._has_card = True
        own_name = Path(self.args.hub_model_id or self.args.output_dir).name
        super().create_model_card(model_name or own_name, dataset_name, tags)
        if self.is_world_process_zero():
            add_to_card(self.args.output_dir, self.defenses, self._verdict(), self._record()["reference"])
