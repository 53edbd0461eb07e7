"""Weights that are spread over ranks, made whole where they are read outside of their module's forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list
from trl.trainer.utils import maybe_gather_lm_head_ctx


T = TypeVar("T")


def gathered(*parameters: torch.Tensor | None) -> AbstractContextManager[None]:
    """ZeRO-3's shards are whole inside, for reading. A collective: every rank must enter it, with the same parameters.

    Args:
        parameters: `None` and what is not sharded (an adapter's weights before training starts) are left as they are.
    """
    return maybe_gather_lm_head_ctx(*(p for p in parameters if hasattr(p, "ds_status")))


def as_main_process(look: Callable[[], T]) -> T:
    """What the main process sees in its weights, or the error that it raises, on every rank.

    With FSDP's `cpu_ram_efficient_loading` the other ranks' weights are empty until training starts. They look all the same, since
    ZeRO-3 gathers its shards for it.
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
