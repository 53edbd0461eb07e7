"""What a defense is: one small object with a default of "nothing" for every question that the trainer asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedConfig

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
    training data ([`prepare_dataset`]), and what to the forward pass while the policy trains ([`policy_pass`])? A
    defense that adds a term to the loss is a [`ReferenceDefense`].

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

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Change the training data, as the user gave it. Evaluation data is never passed here."""
        return dataset

    def policy_pass(self, model: torch.nn.Module) -> AbstractContextManager:
        """What surrounds the policy's forward pass in training.

        Never entered for the reference pass, evaluation, generation or saving, and left again before the backward pass. With
        gradient checkpointing the inside of a decoder block runs a second time in the backward pass: hook whole blocks, never
        what is inside of them.

        Args:
            model: the causal language model without wrappers.
        """
        del model
        return nullcontext()


class ReferenceDefense(Defense):
    """A defense that adds `coef · (1/N) Σ_t d(policy, reference)_t` to the loss.

    d is a distance per token, and N the number of tokens in scope over all micro-batches and ranks of the step: CE's own
    denominator for `tokens = "loss"`. Set `divergence` to take d from the two next-token distributions, or override
    [`layers`] and [`token_loss`] to take it from block outputs.
    """

    coef: float = 1.0
    tokens: Literal["loss", "all"] = "loss"
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
