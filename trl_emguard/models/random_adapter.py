"""Random LoRA adapter whose updates are as large as a given adapter's: a control for claims about that adapter."""

import os
from pathlib import Path

import torch

from .lora_files import CONFIG, factor_key, lora_factors, read_lora, write_lora
from .rotation import rotated


@torch.no_grad()
def random_adapter(adapter: str | os.PathLike, output: str | os.PathLike, seed: int = 0) -> Path:
    """Write an adapter whose updates have the singular values of a given adapter's updates, but random directions.

    Every layer's update B·A thus keeps its rank and its size (Frobenius, spectral and nuclear norm). B becomes U·B and
    A becomes A·Vᵀ, with uniformly distributed random rotations U and V.

    Args:
        adapter: folder of a LoRA adapter that PEFT saved.
        output: folder to write. It must not hold an adapter yet.
        seed: seed of the rotations.

    Raises:
        FileNotFoundError: `adapter` holds no adapter.
        ValueError: the adapter is not a plain LoRA of linear layers, or `output` holds an adapter already.
    """
    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    config, weights = read_lora(adapter)
    if (output / CONFIG).exists():
        raise ValueError(f"output {str(output)!r} holds an adapter already: name another folder.")
    generator = torch.Generator().manual_seed(seed)
    for layer, (a, b) in lora_factors(adapter, config, weights).items():
        weights[factor_key(layer, "A")] = rotated(a.T, generator).T.contiguous().to(a.dtype)
        weights[factor_key(layer, "B")] = rotated(b, generator).to(b.dtype)
    write_lora(adapter, weights, output)
    return output
