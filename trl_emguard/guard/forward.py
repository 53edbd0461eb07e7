"""The patched forward of a model, and the pass of its backbone.

A training step of a defended run calls the wrapped model once per micro-batch. Before that, the trainer arms the
model's [`Gate`] with a guard: a function to which the patched forward hands the call. Without a guard the patched
forward calls the model's stock forward.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.blocks import record_blocks
from ..models.head import output_head


# A guard is a function that is called in place of the model's forward. It is given the model without wrappers, the
# stock forward, and the keyword arguments of the call.
Guard = Callable[[PreTrainedModel, Callable[..., Any], dict[str, Any]], Any]


class Gate:
    """Patch of a model's forward that calls a guard instead while one is set, and the stock forward otherwise.

    Args:
        model: causal language model without wrappers. Make the gate after TRL added its head, and before any engine
            wraps the model.
    """

    def __init__(self, model: PreTrainedModel):
        self._guard: Guard | None = None
        self._only_with_gradient = True
        stock_forward = model.forward

        # The signature stays the original one: `generate` validates its arguments against it.
        @functools.wraps(type(model).forward)
        def forward(module, *args, **kwargs):
            guard = self._guard
            if guard is None or (self._only_with_gradient and not torch.is_grad_enabled()):
                return stock_forward(*args, **kwargs)
            return guard(module, functools.partial(stock_forward, *args) if args else stock_forward, kwargs)

        self._model = model
        self._before = vars(model).get("forward")
        self._patched = types.MethodType(forward, model)
        model.forward = self._patched

    def remove(self) -> None:
        """Give the model its forward back, unless somebody patched it since."""
        if vars(self._model).get("forward") is not self._patched:
            return
        if self._before is None:
            del self._model.forward
        else:
            self._model.forward = self._before

    @contextmanager
    def armed(self, guard: Guard, only_with_gradient: bool = True) -> Iterator[None]:
        """Hand the forward calls within this context to a guard.

        Args:
            guard: callable that answers in the place of the stock forward.
            only_with_gradient: whether calls under `no_grad`, such as a trainer's own pass of a reference, still go to
                the stock forward.
        """
        self._guard, self._only_with_gradient = guard, only_with_gradient
        try:
            yield
        finally:
            self._guard = None


@dataclass
class States:
    """Hidden states kept from one forward pass, at P positions.

    Attributes:
        last: `(P, H)`, states after the final norm, which the head projects.
        blocks: layer → `(P, H)`, raw block outputs.
        head: weight `(V, H)` and bias `(V,)` or `None`.
        router_logits: router logits of the backbone, in mixture-of-experts models.
    """

    last: torch.Tensor
    blocks: dict[int, torch.Tensor]
    head: tuple[torch.Tensor, torch.Tensor | None]
    router_logits: Any = None


def run_backbone(
    model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int]
) -> States:
    """Run the backbone once, and keep the states of some positions.

    Args:
        model: causal language model without wrappers.
        inputs: keyword arguments of the backbone, without labels.
        positions: `(B, T - 1)` boolean, P of them true.
        layers: blocks whose raw outputs are kept, counted from 1.
    """

    def select(states: torch.Tensor) -> torch.Tensor:
        return states[:, :-1][positions.to(states.device)]  # (B, T, H) → (P, H)

    with record_blocks(model, layers, select) as blocks:
        # FSDP and PEFT may replace the backbone after the patch, so it is looked up on each call.
        outputs = model.base_model(**inputs)
    last = select(outputs.last_hidden_state)
    return States(last, blocks, output_head(model), getattr(outputs, "router_logits", None))


def rows_with(batch: dict[str, Any], positions: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the rows of a batch that have positions to keep, or its first row where none has.

    Args:
        batch: keyword arguments of a model, `(B, T)` tensors among them.
        positions: `(B, T - 1)`.

    Returns:
        The batch and the positions, cut to these rows (at least one). The kept positions stay in their order.
    """
    rows = positions.any(1)
    if bool(rows.all()):
        return batch, positions
    chosen = rows.nonzero()[:, 0] if bool(rows.any()) else torch.zeros_like(rows[:1], dtype=torch.long)
    count = len(positions)

    def of_rows(value: Any) -> Any:
        is_per_row = isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == count
        return value[chosen.to(value.device)] if is_per_row else value

    return {name: of_rows(value) for name, value in batch.items()}, positions[chosen]


class ReferenceGuard:
    """Guard for the pass of a reference: no gradient, and only the states that the terms compare.

    Args:
        positions: `(B, T - 1)`, positions to keep.
        layers: blocks to keep.
    """

    def __init__(self, positions: torch.Tensor, layers: Sequence[int]):
        self.positions = positions
        self.layers = layers

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, stock_forward: Callable[..., Any], inputs: dict[str, Any]) -> States:
        return run_backbone(model, inputs, self.positions, self.layers)
