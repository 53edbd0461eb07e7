"""Patched forward of a model, and a forward pass of the model's backbone (the model without its output head).

A training step with this package's loss calls the model, in its distributed wrapper, once per micro-batch. Before this
call, the trainer arms the model's [`Gate`] with a guard: a function that the patched forward then calls instead of the
model's stock forward. Without a guard, the patched forward calls the stock forward.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
    """Patch of a model's forward that calls a guard while a guard is set, and otherwise the stock forward.

    Args:
        model: causal language model without wrappers. Make the gate after TRL has added its fused LM head to the
            model, and before an engine (DeepSpeed, FSDP2) wraps the model.
    """

    def __init__(self, model: PreTrainedModel):
        self._guard: Guard | None = None
        self._only_with_gradient = True
        stock_forward = model.forward

        # The patch keeps the signature of the class's forward, because `generate` rejects arguments for the model that
        # the signature does not list.
        @functools.wraps(type(model).forward)
        def forward(module, *args, **kwargs):
            guard = self._guard
            if guard is None or (self._only_with_gradient and not torch.is_grad_enabled()):
                return stock_forward(*args, **kwargs)
            return guard(module, functools.partial(stock_forward, *args) if args else stock_forward, kwargs)

        self._model: PreTrainedModel | None = model
        self._before: Callable[..., Any] | None = vars(model).get("forward")
        self._patched: types.MethodType | None = types.MethodType(forward, model)
        model.forward = self._patched

    def remove(self) -> None:
        """Restore the forward that the model had before this patch, unless other code has patched the model since."""
        model, patched, before = self._model, self._patched, self._before
        # The gate and its patch refer to each other and to the model. Unless these references are dropped, only the
        # garbage collector can free the model.
        self._model = self._patched = self._before = None
        if model is None or vars(model).get("forward") is not patched:
            return
        if before is None:
            del model.forward
        else:
            model.forward = before

    @contextmanager
    def armed(self, guard: Guard, only_with_gradient: bool = True) -> Iterator[None]:
        """Let a guard replace the stock forward inside the `with` block.

        Args:
            guard: function to call instead of the stock forward.
            only_with_gradient: if true, calls under `no_grad` still go to the stock forward. An example is the pass
                that a DPO trainer makes to get its reference's log-probabilities.
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
        last: `(P, H)`, states after the final norm, from which the output head computes logits.
        blocks: number of a block → the block's raw output, `(P, H)`.
        head: the output head's weight `(V, H)`, and its bias `(V,)` or `None`.
        router_logits: router logits of the backbone, in mixture-of-experts models.
    """

    last: torch.Tensor
    blocks: dict[int, torch.Tensor]
    head: tuple[torch.Tensor, torch.Tensor | None]
    router_logits: Any = None


def run_backbone(
    model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int]
) -> States:
    """Run the backbone once, and return its states at the given positions.

    Args:
        model: causal language model without wrappers.
        inputs: keyword arguments of the backbone, without labels.
        positions: `(B, T - 1)` boolean, true at the P positions to keep.
        layers: blocks whose raw outputs are kept, counted from 1.
    """

    def select(states: torch.Tensor) -> torch.Tensor:
        return states[:, :-1][positions.to(states.device)]  # (B, T, H) → (P, H)

    needs_none = model.training and not torch.is_grad_enabled()
    surroundings = _without_checkpointing(model) if needs_none else nullcontext()
    with surroundings, record_blocks(model, layers, select) as blocks:
        # FSDP and PEFT may replace the backbone after the forward is patched, so each call looks up the backbone.
        outputs = model.base_model(**inputs)
    last = select(outputs.last_hidden_state)
    return States(last, blocks, output_head(model), getattr(outputs, "router_logits", None))


@contextmanager
def _without_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Switch activation checkpointing off inside the `with` block.

    It saves nothing in a pass without gradient, and torch warns there that "Gradients will be None".
    """
    name = "gradient_checkpointing"
    modules = [module for module in model.modules() if vars(module).get(name)]
    values = [vars(module)[name] for module in modules]
    try:
        for module in modules:
            setattr(module, name, False)
        yield
    finally:
        for module, value in zip(modules, values, strict=True):
            setattr(module, name, value)


def rows_with(batch: dict[str, Any], positions: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """Return only those rows of a batch that have a position to keep; if there are none, only the first row.

    The reference's pass then skips rows that no loss term looks at. One row always stays, because every rank must run
    the pass if an engine shards the model.

    Args:
        batch: keyword arguments of a model, `(B, T)` tensors among them.
        positions: `(B, T - 1)` boolean, true at the positions to keep.

    Returns:
        The batch and the positions of these rows alone (at least one row). The rows and the kept positions stay in
        their order.
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
    """Function in place of a model's forward: runs its backbone without gradient, and returns chosen hidden states.

    The model is the reference, with which loss terms compare the policy (the model in training).

    Args:
        positions: `(B, T - 1)` boolean, true at the positions to keep.
        layers: blocks whose raw outputs are kept, counted from 1.
    """

    def __init__(self, positions: torch.Tensor, layers: Sequence[int]):
        self.positions = positions
        self.layers = layers

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, stock_forward: Callable[..., Any], inputs: dict[str, Any]) -> States:
        return run_backbone(model, inputs, self.positions, self.layers)
