"""Mixin that lets any Trainer mark the checkpoints that it has written completely, and resume only from these."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import rotate_checkpoints

from ..io.files import written_whole
from ..models.adapters import unsaved_weights
from ..models.callback_state import CheckpointedCallback
from ..models.sharding import saving_whole
from .manifest import EARLIER_RUN, OPTIMIZER, begin_checkpoint, checkpoint_files, finish_checkpoint
from .resume import (
    checkpoint_folder,
    checkpoint_to_resume,
    find_flaw_on_all,
    holds_adapter,
    is_of_earlier_run,
    mark_earlier_runs,
    why_other_adapter,
)


if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

logger = get_logger(__name__)


class WholeCheckpoints(Trainer):
    """Mixin that lets any [`~transformers.Trainer`] resume only from checkpoints that were written completely.

    ```python
    >>> class MyTrainer(WholeCheckpoints, Trainer): ...

    >>> trainer = MyTrainer(model, args, train_dataset=rows)
    >>> trainer.train(resume_from_checkpoint=trainer.find_checkpoint(True))
    ```

    The mixin comes before the trainer among the base classes. A checkpoint is marked as whole when every rank has
    written its files. Only then is it pushed to the hub, and only then are older checkpoints deleted. A callback with
    a method `save_into(folder, state, model)` can add files before the checkpoint is marked. Its `on_save` is called
    after the marking. Callbacks of class [`CheckpointedCallback`] are told the checkpoint to resume from, wherever it
    lies. A whole checkpoint of the current step is not written a second time. A run that resumes from the checkpoint
    of its last step makes no further step. Checkpoints of later steps that an earlier run has left in the folder are
    marked before the first step: the newest whole checkpoint and the best model are never one of them. `save_model`
    writes the whole model under FSDP, also where checkpoints hold a shard of each rank.

    Raises:
        TypeError: from the class statement, if a class has the mixin behind the trainer. No method of the mixin would
            be called.
    """

    _saved: tuple[Any, str] = (None, "")  # `self.state` and folder of the checkpoint that was saved last
    resumed_files: frozenset[str] = frozenset()  # names of the files in the checkpoint that `train` resumed from

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = list(cls.__mro__)
        if transformers.Trainer in order and order.index(transformers.Trainer) < order.index(WholeCheckpoints):
            mixins = [base.__name__ for base in cls.__bases__ if issubclass(base, WholeCheckpoints)]
            others = [base.__name__ for base in cls.__bases__ if not issubclass(base, WholeCheckpoints)]
            raise TypeError(
                f"class {cls.__name__}: {mixins[0]} stands behind {others[0]}, so nothing of it would be called. "
                f"Write `class {cls.__name__}({', '.join(mixins + others)})`."
            )

    def find_checkpoint(self, resume_from_checkpoint: str | os.PathLike | bool) -> str:
        """Return the checkpoint to resume from: the named folder, or the newest whole one. Every rank must call this.

        Raises:
            FileNotFoundError: the named folder does not exist.
            ValueError: the named checkpoint is corrupt, there is no whole checkpoint, or a checkpoint does not hold
                the weights that this run trains, or holds an adapter with another config.
        """
        checkpoint = checkpoint_to_resume(
            resume_from_checkpoint,
            self.args.output_dir,
            self._is_first_on_machine(),
            lambda folder: self.why_foreign(folder) or self._why_other_tuning(folder),
        )
        why = self._why_other_tuning(checkpoint)
        if why is not None:
            raise ValueError(f"{checkpoint} {why}")
        unsaved = self.why_unsaved()
        if unsaved is not None and not self.is_deepspeed_enabled:  # DeepSpeed's own files hold all trained weights
            raise ValueError(f"{checkpoint} does not hold all that was trained: {unsaved} Then start anew.")
        if not self.is_deepspeed_enabled and not _holds(checkpoint, OPTIMIZER):
            rate = "" if _holds(checkpoint, SCHEDULER_NAME) else ", and so does the learning rate with its warm-up"
            logger.warning(
                f"{checkpoint} has no optimizer files: the optimizer's state (Adam's moments) begins anew{rate}. The "
                "losses will not be those of an uninterrupted run."
            )
        return checkpoint

    def _why_other_tuning(self, checkpoint: str) -> str | None:
        """Return why a checkpoint's weights do not fit this run's adapter; `None` if they fit, or without adapters."""
        if not is_peft_model(self.model):
            return None
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not sharded and not holds_adapter(checkpoint):
            return (
                "holds a whole model's weights, and this run trains an adapter, which would start anew. Resume with "
                "the tuning that it was written with."
            )
        return why_other_adapter(checkpoint, self.model.peft_config)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load both as Trainer does, and the scheduler also if the optimizer's files are missing.

        The loaded states contain settings, such as the learning rate, which replace those of this run. A warning names
        the settings that differ.
        """
        if checkpoint is None:
            return
        before = self._optimizer_settings()
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.is_deepspeed_enabled and not _holds(checkpoint, OPTIMIZER):
            self._load_scheduler(checkpoint)
        after = self._optimizer_settings()
        other = [f"{name} {after[name]} and not {before[name]}" for name in before if before[name] != after[name]]
        if other:
            logger.warning(
                f"the run goes on with the checkpoint's {', '.join(other)}: a resume keeps the settings of optimizer "
                "and scheduler, as in any Trainer. Start anew to train with others."
            )

    def _optimizer_settings(self) -> dict[str, str]:
        """Return the optimizer's settings that checkpoints hold: name → distinct values of its parameter groups."""
        groups = self.optimizer.param_groups
        found = {name: [g[name] for g in groups if name in g] for name in ("weight_decay", "betas", "eps", "momentum")}
        # Trainer's schedulers multiply these rates, the peaks of the schedule, by a factor that depends on the step.
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        found["learning_rate"] = getattr(scheduler, "base_lrs", [])
        return {name: ", ".join(dict.fromkeys(map(str, values))) for name, values in found.items()}

    def _load_scheduler(self, checkpoint: str) -> None:
        if _holds(checkpoint, SCHEDULER_NAME):
            state = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(state)
            # The optimizer's files would hold the learning rate of the next step as well.
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def why_unsaved(self) -> str | None:
        """Return which trained weights a saved model will lack, with a fix; `None` if it will hold all of them."""
        unsaved = unsaved_weights(self.model)
        if not unsaved:
            return None
        module = unsaved[0].removeprefix("base_model.model.").rpartition(".")[0].removesuffix(".base_layer")
        more = f" (and {len(unsaved) - 1} more)" if len(unsaved) > 1 else ""
        return (
            f"the weight {unsaved[0]!r}{more} is trained and belongs to no adapter. PEFT saves adapters alone, so no "
            "saved model holds what it learns, and no checkpoint but DeepSpeed's. Name its module in the adapter's "
            f"config: modules_to_save=[{module!r}]."
        )

    def why_foreign(self, checkpoint: str) -> str | None:
        """Return why a whole checkpoint belongs to another run; `None` if it may belong to this run.

        Subclasses override this method, which by itself takes every checkpoint for one of this run.
        """
        del checkpoint
        return None

    def has_whole_checkpoint(self, trial: Any = None) -> bool:
        """Return True if the current step has a flawless checkpoint on every machine. Every rank must call this."""
        folder = checkpoint_folder(self._get_output_dir(trial), self.state.global_step)
        flaw = find_flaw_on_all(folder, self._is_first_on_machine())
        return flaw is None and not is_of_earlier_run(folder)

    def _is_first_on_machine(self) -> bool:
        # One process of every machine marks and checks folders, because each machine may have its own disk.
        return self.args.local_process_index == 0

    def _has_saved(self, folder: str, trial: Any) -> bool:
        """Return True if this `train()` call wrote the checkpoint of the current step. Every rank must call this."""
        return self._saved[0] is self.state and self._saved[1] == folder and self.has_whole_checkpoint(trial)

    def _determine_best_metric(self, metrics, trial):
        """Compare an evaluation with the best one so far, and name the step's checkpoint if it is already there.

        Trainer names the best checkpoint only while it saves. With `enable_jit_checkpoint`, a SIGTERM may have the
        step saved before its evaluation, and not again after it.
        """
        is_best = super()._determine_best_metric(metrics, trial)
        folder = checkpoint_folder(self._get_output_dir(trial), self.state.global_step)
        is_tracked = self.state.best_global_step == self.state.global_step
        if is_best and is_tracked and self._has_saved(folder, trial):
            self.state.best_model_checkpoint = folder
            with _write_errors(folder, self.args.output_dir):
                self._write_state(folder)
                self._finish(folder)
        return is_best

    def _write_state(self, folder: str) -> None:
        if self.args.should_save:
            with written_whole(Path(folder) / TRAINER_STATE_NAME) as scratch:
                self.state.save_to_json(str(scratch))

    def _finish(self, folder: str) -> None:
        self.accelerator.wait_for_everyone()
        if self._is_first_on_machine():
            finish_checkpoint(folder)

    def _save_checkpoint(self, model, trial):
        """Save a checkpoint like Trainer, mark it as whole, and only then push it and delete older checkpoints.

        Raises:
            OSError: the checkpoint cannot be written.
        """
        args, run_dir = self.args, self._get_output_dir(trial)
        folder = checkpoint_folder(run_dir, self.state.global_step)
        # With `enable_jit_checkpoint`, the end of a step may save a checkpoint, and a SIGTERM may then save the same
        # step again. Writing begins by emptying the folder, so a kill in the second save would lose a whole
        # checkpoint. `self.state` tells this `train()` call from an earlier one, which may have left the same folder.
        if self._has_saved(folder, trial):
            return
        limit, pushes, best = args.save_total_limit, args.push_to_hub, self.state.best_model_checkpoint
        try:
            # With the user's settings, Trainer may push this checkpoint and delete older ones before this one is
            # marked as whole. Both are therefore switched off while Trainer saves.
            args.save_total_limit, args.push_to_hub = None, False
            with _write_errors(folder, args.output_dir):
                if self._is_first_on_machine():
                    begin_checkpoint(folder)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                args.save_total_limit, args.push_to_hub = limit, pushes
                # Trainer finds the best step's checkpoint by the folder's name. The folder may be of an earlier run.
                if self.state.best_model_checkpoint != best and is_of_earlier_run(self.state.best_model_checkpoint):
                    self.state.best_model_checkpoint = best
                    self._write_state(folder)
                settings = os.path.join(folder, TRAINING_ARGS_NAME)
                # Trainer saved `args` with the limit and the push switched off. `training_args.bin` is therefore
                # written again with the user's values.
                if args.should_save and os.path.isfile(settings):
                    torch.save(args, settings)
                for callback in self.callback_handler.callbacks:
                    if args.should_save and hasattr(callback, "save_into"):
                        callback.save_into(folder, self.state, self.model)
                self._finish(folder)
        finally:
            args.save_total_limit, args.push_to_hub = limit, pushes
        self._saved = (self.state, folder)
        if pushes:
            self._push_from_checkpoint(folder)
        if args.should_save:
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # With accelerate's default for FSDP2, SHARDED_STATE_DICT, Trainer saves only the shards of checkpoints, which
        # it calls this method for as well, and no model.
        is_checkpoint = _internal_call and output_dir
        with nullcontext() if is_checkpoint else saving_whole(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CheckpointedCallback):
                callback.resumes_from, callback.has_ended = resume_from_checkpoint, False
        self.resumed_files = frozenset()
        if resume_from_checkpoint:
            folder = Path(str(resume_from_checkpoint))
            self.resumed_files = frozenset(checkpoint_files(folder))
            if self._is_first_on_machine() and is_of_earlier_run(folder):
                (folder / EARLIER_RUN).unlink(missing_ok=True)  # the user has named it, so it is of this run now
            self.accelerator.print(f"trl_emguard: resumes from {resume_from_checkpoint}.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # After a SIGTERM, this callback saves a checkpoint at the end of the step. It is moved to the end, so that all
        # other callbacks have taken the step into what they save.
        self.callback_handler.callbacks.sort(key=lambda callback: isinstance(callback, JITCheckpointCallback))
        if self._is_first_on_machine():
            mark_earlier_runs(self._get_output_dir(kwargs.get("trial")), self.state.global_step)
        has_ended = any(isinstance(c, CheckpointedCallback) and c.has_ended for c in self.callback_handler.callbacks)
        # A run that resumes from the checkpoint of its last step has nothing left to train, and neither has one that a
        # callback had stopped there. Trainer would still make one more step, unless the checkpoint is from the end of
        # an epoch.
        if self.state.global_step >= self.state.max_steps or has_ended:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


def _holds(checkpoint: str, part: str) -> bool:
    return any(name.startswith(part) for name in checkpoint_files(Path(checkpoint)))


@contextmanager
def _write_errors(folder: str, output_dir: str) -> Iterator[None]:
    """Turn an error of writing to the disk into an `OSError` that says how to continue."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Torch raises RuntimeError for a full disk. Other RuntimeErrors (lack of memory, a rank that died) have
        # nothing to do with the disk, and are raised unchanged.
        of_disk = any(word in str(error) for word in ("PytorchStreamWriter", "inline_container"))
        if isinstance(error, RuntimeError) and not of_disk:
            raise
        cause, free = " ".join(str(error).split())[:200], shutil.disk_usage(output_dir).free / 2**30
        raise OSError(
            f"{folder} could not be written ({type(error).__name__}: {cause}) and stays corrupt; {free:.3g} GiB are "
            "free there. When this is fixed, resume_from_checkpoint=True resumes from the newest whole checkpoint."
        ) from error
