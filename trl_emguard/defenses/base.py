"""What a defense is: one small object with a default of "nothing" for every question that the trainer asks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..config import EMGuardConfig


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    id: str  # arXiv


IN_TRAINING_DEFENSES = Paper("In-Training Defenses against Emergent Misalignment in Language Models", id="2508.06249")


class Defense:
    """An in-training defense.

    The trainer knows no defense by name. It builds the ones that `defense=` lists and asks each: what do you do to the
    training data ([`prepare_dataset`], [`prepare_tokenized`]), and what to the forward pass while the policy trains
    ([`training`], [`policy_pass`])? A defense that adds a term to the loss is a [`ReferenceDefense`].

    To write your own, derive from one of the two, give it a `name`, and call [`register`]:

    ```python
    @register
    class KeyDistance(ReferenceDefense):
        name = "key_distance"

        def layers(self, num_layers):
            return (num_layers // 2,)

        def token_loss(self, policy, reference):
            return (policy[0] - reference[0]).float().square().mean(-1)


    EMGuardTrainer(model, EMGuardConfig(defense="key_distance"), train_dataset=dataset)
    ```

    Args:
        args: the run's configuration. Read your options from it and check them here: this runs before any model is
            loaded.
    """

    name: ClassVar[str] = ""
    papers: ClassVar[tuple[Paper, ...]] = ()
    # Whether the training loss comes from this package's forward instead of SFTTrainer's, since the defense adds to it or
    # wants it split.
    own_loss: ClassVar[bool] = False

    def __init__(self, args: EMGuardConfig):
        del args

    @property
    def active(self) -> bool:
        """False where the options switch the defense off (a coefficient of 0)."""
        return True

    def options(self) -> dict[str, Any]:
        """The options that define the defense, as JSON: what `defense.json` and the model card say of it."""
        return {}

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise `ValueError` if the defense cannot act on a model of this (text) config. Runs before weights load."""
        del config

    def check_policy(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` if the defense cannot act on this model, the policy without wrappers, as it is given."""
        del model

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the defense cannot act with this tokenizer and its chat template. Runs before data is tokenised."""
        del tokenizer

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Change the training data, as the user gave it. Evaluation data is never passed here."""
        return dataset

    def prepare_tokenized(
        self, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset | IterableDataset:
        """Change the tokenised training data (`input_ids` and `labels`, before truncation and packing)."""
        del tokenizer
        return dataset

    def training(self, model: PreTrainedModel) -> AbstractContextManager:
        """What surrounds training as a whole, whatever ends it: the place for hooks, which a compiled model wants to be there
        before it is compiled.

        Args:
            model: the causal language model without wrappers.
        """
        del model
        return nullcontext()

    def policy_pass(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> AbstractContextManager:
        """What surrounds the policy's forward pass in training.

        Never entered for the reference pass, evaluation, generation or saving, and left again before the backward pass. With
        gradient checkpointing the inside of a decoder block runs a second time in the backward pass: hook whole blocks, never
        what is inside of them.

        Args:
            model: the causal language model without wrappers.
            inputs: the collated micro-batch, `(B, T)` tensors, labels included.
        """
        del model, inputs
        return nullcontext()

    def evidence(self) -> dict[str, Any]:
        """What shows so far that the defense acts, as JSON for `defense.json`. That of a [`ReferenceDefense`] is counted by the
        trainer."""
        return {}

    def resume(self, evidence: dict[str, Any]) -> None:
        """Go on from what [`evidence`] said when the checkpoint was written that training resumes from."""
        del evidence


class ReferenceDefense(Defense):
    """A defense that adds `coef · (1/N) Σ_t d(policy, reference)_t` to the loss.

    d is a distance per token. N counts tokens over all micro-batches and ranks of the step: those in scope for `tokens = "all"`,
    and CE's own denominator for `"loss"` and for `"interleaved"`, the part of it that lies in mixed-in rows. Set `divergence` to
    take d from the two next-token distributions, or override [`layers`] and [`token_loss`] to take it from block outputs.
    """

    own_loss = True

    coef: float = 1.0
    tokens: Literal["loss", "all", "interleaved"] = "loss"
    divergence: Literal["reverse", "forward"] | None = None

    @property
    def active(self) -> bool:
        return self.coef != 0

    def layers(self, num_layers: int) -> Sequence[int]:
        """Which block outputs [`token_loss`] wants. Index l is the raw output of block l, 1 … `num_layers`."""
        del num_layers
        return ()

    def token_loss(self, policy: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
        """Distance of each token, `(N,)`, from the states of [`layers`], `(N, H)` each, as a differentiable function of
        `policy`. The trainer takes the gradient here, and with it the evidence that the term acts."""
        raise TypeError(f"{type(self).__name__} must set `divergence`, or override `layers` and `token_loss`.")


def check_coefficient(name: str, value: object) -> float:
    """A finite float ≥ 0.

    Raises:
        ValueError: anything else; the message names the argument, the value and the mend.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} is not a coefficient: give a finite number, 0 (off) or above.")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> Any:
    """One of `choices`.

    Raises:
        ValueError: anything else.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known: give one of {', '.join(map(repr, choices))}.")
    return value


def listed_layers(name: str, spec: object, num_layers: int | None, forms: str) -> list[int]:
    """The blocks in a list of layers, ascending: `"4,8"`, `"[4, 8]"`, `4` or `[4, 8]`. Index l is the raw output of block l, 1 … L.

    Args:
        name: the argument.
        spec: its value.
        num_layers: L; `None` to check the form alone, before the model is known.
        forms: what else the argument may be, for the message.

    Raises:
        ValueError: not of that form, a layer twice, or one outside 1 … L.
    """
    if isinstance(spec, str) and re.fullmatch(r"\s*\[?\s*\d+(\s*,\s*\d+)*\s*\]?\s*", spec):
        layers = [int(number) for number in re.findall(r"\d+", spec)]
    elif isinstance(spec, int) and not isinstance(spec, bool):
        layers = [spec]
    elif isinstance(spec, list | tuple) and spec and all(type(layer) is int for layer in spec):
        layers = list(spec)
    else:
        raise ValueError(f"{name}={spec!r} is not a choice of layers: give {forms}.")
    last = max(layers) if num_layers is None else num_layers
    outside = [layer for layer in layers if not 1 <= layer <= last]
    if outside:
        upper = "L" if num_layers is None else num_layers
        raise ValueError(f"{name}={spec!r}: layer {outside[0]} is out of range: the blocks count from 1 to {upper}.")
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name}={spec!r} names a layer twice: name each once.")
    return sorted(layers)
