"""Weights that are spread over ranks, gathered for code that reads them outside their module's forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx


T = TypeVar("T")


def gathered(*parameters: torch.Tensor | None) -> AbstractContextManager[None]:
    """Gather ZeRO-3's shards for reading inside. A collective: every rank must enter it, with the same parameters.

    Args:
        parameters: weights. `None` and weights that are not sharded (an adapter's before training starts) are left as
            they are.
    """
    return maybe_gather_lm_head_ctx(*(p for p in parameters if hasattr(p, "ds_status")))


def sharding_engine(model: nn.Module) -> str | None:
    """Return the engine that spreads a model's weights over ranks, or `None` if every rank has them whole."""
    if any(hasattr(parameter, "ds_status") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
        return "FSDP"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "tensor parallelism"
    return None


def reshard(model: nn.Module) -> None:
    """Take apart what FSDP2 keeps whole until a backward pass, which does not follow."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def release(engine: Any) -> None:
    """Take apart what a pass of a training engine has left whole, when no backward pass follows."""
    reshard(engine)
    if hasattr(engine, "empty_partition_cache"):  # DeepSpeed's
        engine.empty_partition_cache()


def as_main_process(look: Callable[[], T]) -> T:
    """Return on every rank the main process's result of `look()`, or raise the main process's error.

    With FSDP's `cpu_ram_efficient_loading`, the weights of the other ranks are empty until training starts. All ranks
    still call `look`, because ZeRO-3 gathers its shards in it.
    """
    seen: list = [None, None]
    try:
        seen[0] = look()
    except Exception as error:
        seen[1] = error
    found, refused = broadcast_object_list(seen)
    if refused is not None:
        raise refused
    return found
