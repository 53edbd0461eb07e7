"""Drift, the distance that a model in training has moved from its base model, measured on general questions."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from ..io.files import written_whole
from ..models.adapters import bare_model
from ..models.callback_state import CheckpointedCallback, check_whole, load_state, save_state
from ..models.ema import EMACallback
from ..models.sharding import as_main_process
from ..persona.shift import check_layer
from ..persona.vectors import PersonaVector
from .drift_probe import DriftProbe, trained_weights
from .questions import GENERAL, QuestionSet, load_questions


# By default, a measurement is made every 50 steps, on 16 questions. It reads a sound and a misaligned answer to each
# one, about 2,600 tokens in all. This takes as long as 1.2 to 1.3 steps of 8 short rows (`benchmarks/drift_cost.py`).
# With the pass over the base model, measuring takes 4 % of the time of a run of 100 such steps, and less with larger
# steps. Shorter runs pay more.
EVERY, LIMIT = 50, 16
STATE_FILE = "drift.safetensors"
RESULT_FILE = "drift.json"
# Prefix of tensors' names in the callback's file. It marks trained weights as they were at the last measurement within
# the budget (largest drift that is accepted).
KEPT = "kept."


class DriftCallback(CheckpointedCallback):
    """Callback that logs how far the policy has moved from the base model, and stops training above a budget.

    The policy is the model in training. Every `every` steps and after the last step, it is measured on known answers
    to general questions, as `trl-emguard evaluate` does. (If something else, such as early stopping, ends the run
    after a step is complete, this last step is not in the log.)

    - `drift_kl`: KL(policy ‖ base) at the tokens of the sound answers, in nats a token (`evaluate`: `kl_to_base`);
    - `drift_margin`: the change of NLL(misaligned) − NLL(sound) against the base model, in nats a token; below 0 the
      policy has moved towards misaligned answers;
    - `drift_persona`: the move of the hidden state at the last prompt token along `persona_vector`, if this is given.

    The base model is the model with its adapters switched off. Without adapters, it is the model before the first
    step of the trainer's first `train()`. The base model is measured once, and checkpoints contain the result. All
    measurements use the precision of training and draw no random number. Without a budget, training is therefore the
    same with and without the callback, bit for bit.

    With a budget, training stops after the first measurement in which `drift_kl` is above the budget. The model then
    gets back the weights of the last measurement within the budget, so that these are saved at the end.
    `<output_dir>/drift.json` names their step. For this purpose, a copy of the trained weights is held on the CPU.

    ```python
    >>> trainer = EMGuardTrainer(model, args, train_dataset=rows, callbacks=[DriftCallback(every=10, budget=0.2)])
    ```

    Args:
        every: optimizer steps from one measurement to the next.
        budget: largest `drift_kl` that is accepted, in nats a token; `None` never stops.
        questions: general questions, a set or a source for [`load_questions`]. Never take training rows, because
            training on rows changes the model's likelihood of them, whatever else it does.
        limit: number of questions to take, spread evenly over the source; `None` takes all. A set is taken whole.
        persona_vector: persona vector of the base model.

    Raises:
        ValueError: a number is out of range, the questions have no answers, or the weights are sharded over ranks.
            Also if the trainer is not this package's, if a budget is combined with `load_best_model_at_end` or an
            [`EMACallback`], if the drift is above the budget before training, or if the checkpoint to resume from
            lacks this callback's measurements of the base model. Also if that checkpoint was written with other
            questions, another persona vector or precision, if only one of the two runs has a budget, or if it keeps
            weights beyond this run's. Also if the persona vector belongs to another model.
    """

    def __init__(
        self,
        every: int = EVERY,
        budget: float | None = None,
        questions: str | QuestionSet = GENERAL,
        limit: int | None = LIMIT,
        persona_vector: PersonaVector | None = None,
    ):
        if every < 1:
            raise ValueError(f"every={every} must be 1 or more.")
        if budget is not None and not 0 < budget < math.inf:
            raise ValueError(f"stop_on_drift={budget} (budget) must be above 0, in nats a token.")
        self.every = every
        self.budget = budget
        self.questions = load_questions(questions, "general", limit=limit) if isinstance(questions, str) else questions
        if all(question.sound is None and question.answer is None for question in self.questions.questions):
            raise ValueError(f"questions={questions!r} have no answers: take rows with answers.")
        if persona_vector is not None:
            check_layer(persona_vector, None)
        self.persona_vector = persona_vector
        # The trainer's `_metrics["train"]`: metric → values, whose mean the next log line shows.
        self.trl_metrics: dict[str, list[float]] | None = None
        self.template_kwargs: dict[str, Any] = {}  # set by the trainer: `chat_template_kwargs` shared by training rows
        self.probe: Any = None  # the trainer's [`DriftProbe`] from its first `train()` on
        self.kept: dict[str, torch.Tensor] = {}
        self.kept_step, self.kept_drift = 0, 0.0
        self.measured_step: int | None = None
        self.measured_drift = 0.0  # `drift_kl` at `measured_step`

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        self._check(args, model)
        self.probe = None  # an earlier trainer with this callback may have had another base model
        if model is not None and processing_class is not None:
            # Making a probe runs its checks early, also for a dry run. `on_train_begin` makes the probe that measures.
            DriftProbe(model, processing_class, self.questions, self.persona_vector)
            if self.persona_vector is not None:
                self.persona_vector.check_model(bare_model(model))

    def join_trainer(self, metrics: dict[str, list[float]], callbacks: Sequence[TrainerCallback]) -> None:
        """Take the dict that the trainer logs from. `DefendedTrainer` calls this before training."""
        self.trl_metrics = metrics
        self.check_beside(callbacks)

    def check_beside(self, callbacks: Sequence[TrainerCallback]) -> None:
        """Raise `ValueError` if there is a budget, and one of the run's callbacks averages the weights."""
        if self.budget is not None and any(isinstance(callback, EMACallback) for callback in callbacks):
            raise ValueError(
                f"stop_on_drift={self.budget:g} (budget) does not work with ema=True (EMACallback): the average takes "
                "in steps beyond the budget, which the saved model loses. Leave one of them out."
            )

    def check_steps(self, steps: int) -> None:
        """Raise `ValueError` if a run of so many steps would meet the budget after its last step alone."""
        if self.budget is not None and 1 < steps <= self.every:
            raise ValueError(
                f"stop_on_drift={self.budget:g} would be checked after the last step alone: the drift is measured "
                f"every {self.every} steps, and the run has {steps}. If that step is beyond the budget, the whole run "
                f"is lost: set drift_every (`every` of DriftCallback) to less than {steps}."
            )

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        self._check(args, model)
        self.measured_step = None
        self.kept = {}  # copies of an earlier trainer's weights may have other shapes
        if self.trl_metrics is None:
            raise ValueError(
                "DriftCallback logs through EMGuardTrainer, and this is another trainer: take EMGuardTrainer, which "
                'with defense="none" trains as SFTTrainer does.'
            )
        if not state.global_step:
            self.check_steps(state.max_steps)
        before = self.probe
        questions = self.questions.with_template_kwargs(self.template_kwargs)
        self.probe = DriftProbe(model, processing_class, questions, self.persona_vector, _precision(args))
        if state.global_step:
            self._resume(args, state, model)
            # A run that stopped here for its drift would otherwise train on, until the next measurement.
            if self.budget is not None and self.measured_step == state.global_step:
                self.has_ended = self.measured_drift > self.budget
            return
        if before is not None and before.base and before.policy.model is model and before.key == self.probe.key:
            self.probe.base = before.base  # not measured again: an earlier `train()` may have changed the model
        else:
            self.probe.read_base()
        self._start(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if state.global_step % self.every and not is_last:
            return
        # All ranks take the main process's figures: rounding may differ by rank, but all ranks must stop together.
        found = as_main_process(self.probe.measure)
        self.measured_step, self.measured_drift = state.global_step, found["drift_kl"]
        assert self.trl_metrics is not None  # `on_train_begin` has refused `None`
        self.trl_metrics.update({name: [value] for name, value in found.items()})
        control.should_log = True
        if self.budget is None:
            return
        if found["drift_kl"] <= self.budget:
            self._keep(model, state.global_step, found["drift_kl"])
        else:
            control.should_training_stop = True

    def save_into(self, folder, state, model):
        """Write the callback's state into a checkpoint's folder. The trainer then marks the checkpoint as complete."""
        is_here = self.budget is None or self.kept_step == state.global_step
        kept = {} if is_here else {KEPT + name: weight for name, weight in self.kept.items()}
        last = [self.measured_step, self.measured_drift]
        facts = {"measured": self.probe.key, "precision": str(self.probe.precision)}
        facts |= {"kept": json.dumps(self._kept() or None), "last": json.dumps(last)}
        save_state(Path(folder) / STATE_FILE, model, {**self.probe.base, **kept}, facts)

    @torch.no_grad()
    def choose_weights(self, args: Any, state: Any, model: PreTrainedModel | PeftModel) -> int | None:
        """If there is a budget, give the model the weights of the last measurement within it, and write `drift.json`.

        `DefendedTrainer` calls this after the last step, before any callback's `on_train_end`: some callbacks upload
        the model there.

        Returns:
            The step of the weights; `None` without a budget, which leaves the model as it is.
        """
        if self.budget is None:
            return None
        # The last step may not have been measured yet: early stopping, for example, ends a run after `on_step_end`.
        if self.measured_step != state.global_step:
            drift = as_main_process(self.probe.measure)["drift_kl"]
            if drift <= self.budget:
                self._keep(model, state.global_step, drift)
        is_other = self.kept_step != state.global_step
        for name, weight in model.named_parameters() if is_other else ():
            if name in self.kept:
                weight.copy_(self.kept[name])
        if args.should_save:
            content = {"stop_on_drift": self.budget, **self._kept(), "trained_to": state.global_step}
            with written_whole(Path(args.output_dir) / RESULT_FILE) as scratch:
                scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if is_other and state.is_world_process_zero:
            advice = "" if self.kept_step else ", untrained: measure more often (drift_every) or raise the budget"
            print(
                f"trl_emguard: the drift exceeds stop_on_drift={self.budget:g} nats a token at step "
                f"{state.global_step}. The model is now that of step {self.kept_step}, the last one that was measured "
                f"within it (drift_kl {self.kept_drift:.3g}){advice}."
            )
        return self.kept_step

    def _check(self, args: Any, model: PreTrainedModel | PeftModel | None) -> None:
        if model is not None:
            check_whole(self, model)
        if self.budget is not None and args.load_best_model_at_end:
            raise ValueError(
                "stop_on_drift does not work with load_best_model_at_end=True, which loads other weights at the end: "
                "leave one of them out."
            )

    def _kept(self) -> dict[str, Any]:
        return {} if self.budget is None else {"step": self.kept_step, "drift_kl": self.kept_drift}

    def _keep(self, model: PreTrainedModel | PeftModel, step: int, drift: float) -> None:
        """If there is a budget, copy the trained weights to restore them later, and record their step and drift."""
        if self.budget is not None:
            self.kept_step, self.kept_drift = step, drift
            self.kept = trained_weights(model, self.kept)

    def _start(self, model: PreTrainedModel | PeftModel) -> None:
        """If there is a budget, measure the model before training and copy its weights.

        Raises:
            ValueError: the drift is above the budget already.
        """
        if self.budget is None:
            return
        drift = as_main_process(self.probe.measure)["drift_kl"]
        if drift > self.budget:
            raise ValueError(
                f"stop_on_drift={self.budget:g} is below the drift that the model has before training (drift_kl "
                f"{drift:.3g} nats a token, of an adapter or a model that is trained already), so no step could be "
                "kept: raise the budget, or start from a fresh adapter or model."
            )
        self._keep(model, 0, drift)

    def _resume(self, args: Any, state: Any, model: PreTrainedModel | PeftModel) -> None:
        """Load the base model's measurements and the run's last one from a checkpoint. With a budget, also set `kept`.

        `kept` becomes a copy of the trained weights as they were at the last measurement within the budget. The model
        keeps the weights that it has.
        """
        tensors, facts = load_state(self, STATE_FILE, args, state, model)
        kept = json.loads(facts["kept"])
        # Checkpoints of earlier versions of this package do not hold the precision.
        is_other = facts.get("precision", str(self.probe.precision)) != str(self.probe.precision)
        if facts["measured"] != self.probe.key or is_other or (kept is None) != (self.budget is None):
            raise ValueError(
                f"DriftCallback cannot resume: {STATE_FILE} was written with other questions, with another persona "
                "vector or precision (bf16, fp16), or by a run with a budget and one without: resume with the same."
            )
        if kept is not None and kept["drift_kl"] > cast(float, self.budget):
            raise ValueError(
                f"stop_on_drift={self.budget:g} is below the drift of the weights that the checkpoint keeps (drift_kl "
                f"{kept['drift_kl']:.3g} nats a token, of step {kept['step']}): raise the budget, or start anew."
            )
        # Checkpoints of earlier versions of this package do not hold the last measurement.
        self.measured_step, self.measured_drift = json.loads(facts.get("last", "[null, 0.0]"))
        self.probe.base = {name: tensor for name, tensor in tensors.items() if not name.startswith(KEPT)}
        if kept is not None:
            self._keep(model, kept["step"], kept["drift_kl"])
            # `_keep` has just copied the model's weights, which are those of the checkpoint's step. If weights of an
            # earlier step are kept, the checkpoint stores them, and they replace this copy.
            stored = {name.removeprefix(KEPT): t for name, t in tensors.items() if name.startswith(KEPT)}
            self.kept = {name: weight.clone() for name, weight in stored.items()} or self.kept
            # Weights that the earlier budget refused may be within a higher one.
            if self.measured_step == state.global_step and self.measured_drift <= cast(float, self.budget):
                self._keep(model, state.global_step, self.measured_drift)


def _precision(args: Any) -> torch.dtype | None:
    """Return the dtype of training's autocast, or `None` if training uses no autocast."""
    # Without `bf16` and `fp16`, Trainer takes the precision that `accelerate launch --mixed_precision` asks for.
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
