"""Check that the reference does not change: run a batch of the first step again later, and compare the states."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..guard.forward import States
from ..guard.scopes import LABELS, positions_in_scope
from ..models.sharding import gathered
from ..ops import logit_transform


# Largest number of positions to record. At each position the states are recorded and, if a defense compares
# next-token distributions, also the log-probabilities of all tokens.
POSITIONS = 256

# Function from a batch and a mask of positions, `(B, T - 1)`, to a context manager that yields the reference's states
# at these positions. Inside the context, FSDP2's shards of the reference's head are gathered.
Pass = Callable[[dict[str, Any], torch.Tensor], AbstractContextManager[States]]


class ReferenceWatch:
    """Record of a reference's states for one micro-batch. Later states for this batch are compared with it.

    The micro-batch is the first one of a `train()` call.

    Every rank records and compares, since a sharded reference only runs if all ranks take part.

    Args:
        model: causal language model, whose config says how logits follow from states.
        has_divergence: whether a defense compares distributions, so that log-probabilities are recorded as well.

    Attributes:
        noise: largest relative difference between two passes of the reference over the recorded micro-batch. It is
            0 unless kernels of an accelerator add numbers up in another order from call to call.
    """

    def __init__(self, model: PreTrainedModel, has_divergence: bool):
        self._model = model
        self._has_divergence = has_divergence
        self._batch: dict[str, Any] | None = None
        self.noise = 0.0

    @property
    def has_record(self) -> bool:
        return self._batch is not None

    def record(self, batch: Mapping[str, Any], run: Pass) -> None:
        """Keep a micro-batch and the reference's states for it on the CPU. Measure `noise` with a second pass."""
        positions = positions_in_scope(batch, LABELS)
        kept = positions & (positions.flatten().cumsum(0).view_as(positions) <= POSITIONS)
        self._positions = kept.cpu()
        self._batch = {
            name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in batch.items() if name != "labels"
        }
        self._answers = self._ask(run)
        self.noise = self._difference(self._ask(run))

    def check(self, run: Pass, when: str) -> str | None:
        """Return a message with likely causes if the reference has changed since the first step, else `None`.

        Args:
            run: function that runs the reference.
            when: time of the comparison, in words for the message.
        """
        difference = self._difference(self._ask(run))
        if difference <= self.noise:
            return None
        return (
            f"the reference has moved: {when} it differs by {difference:.2g} of its states' length from what it was "
            "in the first step, so the policy is not held to the model that training started from. Something trains "
            "or changes weights that the reference shares: an adapter added or merged after the trainer was built, "
            "weights unfrozen by a callback, or a forward that was replaced by a closure. Change that, or pass a "
            "`ref_model`."
        )

    @torch.no_grad()
    def _ask(self, run: Pass) -> list[torch.Tensor]:
        assert self._batch is not None
        device = self._model.device
        batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in self._batch.items()}
        # `torch.compile` may later run the same batch with another graph, which rounds differently. This pass is
        # therefore run without compiled graphs.
        with torch.compiler.set_stance("force_eager"), run(batch, self._positions.to(device)) as states:
            answers = [states.last, *(states.blocks[layer] for layer in sorted(states.blocks))]
            if self._has_divergence:
                answers.append(self._log_probabilities(states))
            return [answer.detach().to("cpu") for answer in answers]

    def _log_probabilities(self, states: States) -> torch.Tensor:
        weight, bias = states.head
        softcap, scale = logit_transform(self._model.config.get_text_config())
        with gathered(weight, bias):
            logits = torch.nn.functional.linear(states.last.to(weight), weight, bias).float() * (scale or 1.0)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1)

    def _difference(self, answers: Sequence[torch.Tensor]) -> float:
        """Return the largest difference between `answers` and the recorded states and log-probabilities.

        The difference at a position is the norm of the change, divided by the norm of what was recorded there. It is
        infinite if it cannot be computed (NaN).
        """
        largest = 0.0
        for before, after in zip(self._answers, answers, strict=True):
            if not before.numel():
                continue
            length = before.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            difference = ((after.float() - before.float()).norm(dim=-1) / length).max().item()
            largest = max(largest, math.inf if math.isnan(difference) else difference)
        return largest
