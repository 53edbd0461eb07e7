"""Weights that are spread over ranks, gathered for code that reads them outside their module's forward."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx


T = TypeVar("T")


def gathered(*parameters: torch.Tensor | None) -> AbstractContextManager[None]:
    """Gather weights that ZeRO-3 has sharded, so that they can be read inside the `with` block.

    This is a collective operation: every rank must enter the block, with the same parameters.

    Args:
        parameters: weights. `None` is ignored, and so is a weight that is not sharded (for example an adapter's weight
            before training starts).
    """
    return maybe_gather_lm_head_ctx(*(p for p in parameters if hasattr(p, "ds_status")))


def sharding_engine(model: nn.Module) -> str | None:
    """Return the name of the engine that shards a model's weights over ranks; `None` if each rank has all weights."""
    if any(hasattr(parameter, "ds_status") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
        return "FSDP"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "tensor parallelism"
    return None


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered for a backward pass. Call this if no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def release(engine: Any) -> None:
    """Free weights that FSDP2 or ZeRO-3 keeps gathered after a forward pass. Call this if no backward pass follows."""
    reshard(engine)
    # Only DeepSpeed's engine has `empty_partition_cache`, which frees the weights that ZeRO-3 keeps gathered.
    if hasattr(engine, "empty_partition_cache"):
        engine.empty_partition_cache()


@contextmanager
def saving_whole(accelerator: Accelerator) -> Iterator[None]:
    """Let Trainer save whole weights under FSDP inside the `with` block, whatever the type of its checkpoints."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    kept = plugin.state_dict_type
    try:
        plugin.state_dict_type = StateDictType.FULL_STATE_DICT
        yield
    finally:
        plugin.state_dict_type = kept


def as_main_process(look: Callable[[], T]) -> T:
    """Call `look` on all ranks. Return the main process's result, or raise the main process's error, on every rank.

    Only the main process's result can be trusted: with FSDP's `cpu_ram_efficient_loading`, the weights of the other
    ranks are empty until training starts. All ranks still call `look`, because under ZeRO-3 `look` gathers sharded
    weights, which needs every rank.
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
