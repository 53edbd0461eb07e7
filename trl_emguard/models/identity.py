"""Identity of a model: a fingerprint of its weights."""

import hashlib
from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import gathered


# Parts of names that PEFT adds to weights of the model below.
ORIGINALS = ("base_layer", "original_module")


def fingerprint(model: nn.Module, without: Collection[str] = (), is_plain: bool = False) -> str:
    """Return a hash over a sample of every weight; an empty text for a model on the meta device, which has no numbers.

    Call it before an engine takes the model: FSDP2's shards are left out. Weights that ZeRO-3 loaded in shards are
    gathered one by one, on every rank.

    Args:
        model: any model.
        without: names of adapters whose weights are left out.
        is_plain: whether a weight has the name that it has in a model without adapters.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        return ""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if not set(without).isdisjoint(parts) or isinstance(parameter, DTensor):
            continue
        with gathered(parameter):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].contiguous().cpu()
        plain = ".".join(part for part in parts if part not in ORIGINALS)
        digest.update((plain if is_plain else name).encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
