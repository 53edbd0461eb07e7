"""A value whose gradient is already known."""

from collections.abc import Sequence

import torch


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, grad_value):
        return None, None, *(None if g is None else (g * grad_value).to(g.dtype) for g in ctx.gradients)


def with_gradient(
    value: torch.Tensor, inputs: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Connect `value` to `inputs` by gradients that were formed beforehand.

    A term that forms its gradient together with its value needs no graph of its own: its intermediate tensors are gone
    before the backward pass begins, and what it hands to autograd is only the finished gradient.

    Args:
        value: scalar, `()`.
        inputs: the tensors that `value` depends on; `None` where there is none (a head without bias).
        gradients: for each input, `d value / d input` in the input's shape; `None` where none is wanted.

    Returns:
        `value`, `()`: its backward hands `gradient × grad_output` to each input that requires grad.
    """
    return _WithGradient.apply(value.detach(), tuple(gradients), *inputs)
