"""Weights that are spread over ranks, made whole where they are read outside of their module's forward."""

from contextlib import AbstractContextManager

import torch
from trl.trainer.utils import maybe_gather_lm_head_ctx


def gathered(*parameters: torch.Tensor | None) -> AbstractContextManager[None]:
    """ZeRO-3's shards are whole inside, for reading. A collective: every rank must enter it, with the same parameters.

    Args:
        parameters: `None` and what is not sharded (an adapter's weights before training starts) are left as they are.
    """
    return maybe_gather_lm_head_ctx(*(p for p in parameters if hasattr(p, "ds_status")))
