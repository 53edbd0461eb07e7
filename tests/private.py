"""Things that torch and accelerate offer under no public name. The tests reach for them here, and nowhere else."""

from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def hooks_of(*modules: torch.nn.Module) -> list[Any]:
    """Return the hooks that are registered on these modules, those on their submodules left out."""
    return [
        hook
        for m in modules
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        for hook in hooks.values()
    ]


def forget_accelerate(with_ranks: bool) -> None:
    """Reset accelerate's state, so that another engine can start. `with_ranks` also forgets rank and world size."""
    for state in (AcceleratorState, GradientState, *([PartialState] if with_ranks else [])):
        state._reset_state()
