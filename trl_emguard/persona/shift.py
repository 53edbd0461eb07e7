"""Shift of a model's hidden states along a persona vector: for a trained adapter, and during training."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from ..models.adapters import bare_model, check_adapter_kind
from ..models.batches import eval_mode
from ..models.chat import text_part
from .states import prompt_states
from .traits import SHIPPED_TRAITS, load_trait
from .vectors import PersonaVector


def persona_shift(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    questions: Sequence[str],
    batch_size: int = 20,
) -> list[float]:
    """Return how far an adapter shifts states along a persona vector ("finetuning shift", Chen et al., 2507.21509).

    Args:
        model: model with the adapter active.
        tokenizer: tokenizer with a chat template.
        vector: persona vector of the base model.
        questions: user turns; no system turn is set.
        batch_size: questions in a forward pass.

    Returns:
        For each layer l = 0 … L, the mean of (h(l) − h⁰(l))·v̂(l) over the questions. Here h(l) is the state after
        block l at the last prompt token, h⁰(l) is the same state with adapters off, and v̂ = v/‖v‖.

    Raises:
        ValueError: the vector belongs to another model, the tokenizer has no chat template, or switching the adapter
            off does not give the base model: it is a learned prompt, or its initialisation changed the base weights.
    """
    for name in model.active_adapters:
        check_adapter_kind(name, model.peft_config[name])
    _check(model, tokenizer, vector)
    after = prompt_projections(model, tokenizer, vector, questions, batch_size)
    with model.disable_adapter():
        before = prompt_projections(model, tokenizer, vector, questions, batch_size)
    return [a - b for a, b in zip(after, before, strict=True)]


def prompt_projections(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    questions: Sequence[str],
    batch_size: int = 20,
) -> list[float]:
    """Return for each layer l = 0 … L the projection of the model's state on the vector, averaged over the questions.

    The projection is h(l)·v̂(l). h(l) is the state after block l at the last prompt token, in eval mode, and v̂ = v/‖v‖.
    """
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in questions
    ]
    with eval_mode(model):
        mean = prompt_states(model, prompts, batch_size).double().mean(0)  # (L + 1, H)
    return (mean * torch.nn.functional.normalize(vector.vectors.double(), dim=1)).sum(1).tolist()


class PersonaShiftCallback(TrainerCallback):
    """Callback that logs `persona_shift`: how far training has moved the model's states along a persona vector.

    The shift is 0 when the callback is made, and has the unit of the hidden states. For comparison, ‖v(l)‖ is
    the distance between the mean states of answers that show the trait and of answers that show its opposite. The
    `steering` defense changes no states during the measurement. All measurements use the precision of training. Add
    this callback after a `DriftCallback`, so that it sees which log lines that one asks for.

    ```python
    >>> trainer.add_callback(PersonaShiftCallback(trainer, load_vector("evil.safetensors")))
    ```

    Args:
        trainer: an SFTTrainer, this package's or TRL's own.
        vector: persona vector of the model as it is before training.
        questions: user turns; by default the held-out questions of the vector's trait, if that is a shipped one.
        layer: index of a block; by default the layer that the vector suggests.

    Raises:
        ValueError: the vector belongs to another model, questions or layer are missing, the model is sharded over
            ranks, or its adapter is a learned prompt.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        vector: PersonaVector,
        questions: Sequence[str] | None = None,
        layer: int | None = None,
    ):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "PersonaShiftCallback does not work under DeepSpeed and FSDP: use `trl-emguard persona project` "
                "afterwards."
            )
        if isinstance(trainer.model, PeftModel) and trainer.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "PersonaShiftCallback cannot measure a learned prompt "
                f"({trainer.model.active_peft_config.peft_type}), because it reads the model without it: train an "
                "adapter on weights, such as LoRA, or leave the callback out."
            )
        if questions is None:
            trait = vector.metadata.get("trait")
            if trait not in SHIPPED_TRAITS:
                raise ValueError(
                    f"questions is missing, and the vector's trait ({trait!r}) is not a shipped one: give some user "
                    "turns."
                )
            questions = load_trait(trait).heldout_questions
        self.layer = check_layer(vector, layer)
        self.trainer = trainer
        self.vector = vector
        self.questions = questions
        self.tokenizer = text_part(trainer.processing_class)
        _check(trainer.model, self.tokenizer, vector)
        self.start = self._project()

    def _project(self) -> float:
        with self.trainer.accelerator.autocast():
            return prompt_projections(self.trainer.model, self.tokenizer, self.vector, self.questions)[self.layer]

    def on_step_end(self, args, state, control, **kwargs):
        # TRL's trainers keep the metrics of their next log line in this field. An earlier value is still there if
        # Trainer wrote no line for it: the end of an epoch gets none if the last step of the epoch has one already.
        metrics = self.trainer._metrics["train"]
        metrics.pop("persona_shift", None)
        if control.should_log:
            metrics["persona_shift"] = [self._project() - self.start]

    # With logging_strategy="epoch", Trainer sets `should_log` at the end of an epoch, after the epoch's last call of
    # `on_step_end`. So `on_epoch_end` must measure the shift as well.
    on_epoch_end = on_step_end


def check_layer(vector: PersonaVector, layer: int | None) -> int:
    """Return `layer`, or the layer that the vector suggests if `layer` is `None`, after checking that it can be used.

    Raises:
        ValueError: no layer is given and the vector suggests none, the layer is out of range, or it is the last layer
            and the vector is from another codebase. Such a vector has no direction for the last block's output.
    """
    layer = vector.suggested_layer if layer is None else layer
    if layer is None:
        raise ValueError(
            f"layer is missing, and the vector suggests none: give one from 1 to {vector.num_layers} where there is "
            "such an option, or make a vector that suggests one, with `trl-emguard persona extract`."
        )
    vector.check_layer("layer", layer, layer)
    return layer


def _check(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, vector: PersonaVector) -> None:
    """Refuse a tokenizer without a chat template, and a persona vector that was made with another model."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: set one, or take that of an instruct model.")
    vector.check_model(bare_model(model))
