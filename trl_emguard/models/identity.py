"""Identity of a model: a fingerprint of its weights."""

import hashlib
from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import gathered


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return a hash of up to 64 numbers of every weight.

    FSDP2 must not have sharded the model yet; weights that ZeRO-3 loaded in shards are gathered one by one, on every
    rank.

    Args:
        model: model whose weights are hashed.
        without: names of adapters that are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if set(without).isdisjoint(name.split(".")) and not isinstance(parameter, DTensor):
            with gathered(parameter):
                flat = parameter.detach().flatten()
                sample = flat[:: max(1, flat.numel() // 64)].contiguous().cpu()
            digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
