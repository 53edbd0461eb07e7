"""Scalars whose gradients are computed beforehand, and given to autograd in the backward pass."""

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
    """Connect `value` to `inputs` by gradients that were computed beforehand.

    A loss term that computes its gradient together with its value needs no graph. Its intermediate tensors are freed
    before the backward pass begins, and autograd gets only the finished gradient.

    Args:
        value: scalar, `()`.
        inputs: the tensors that `value` depends on, with `None` in place of a missing tensor (a head may lack a bias).
        gradients: `d value / d input` for each input, in its shape; `None` for an input that needs none.

    Returns:
        `value`, `()`: its backward pass gives `gradient × grad_output` to each input that requires grad.
    """
    return _WithGradient.apply(value.detach(), tuple(gradients), *inputs)
