"""A random LoRA adapter of the size of another: the control that a claim about that adapter needs."""

import os
from pathlib import Path

import torch

from .lora_files import CONFIG, factor_key, lora_factors, read_lora, write_lora


@torch.no_grad()
def random_adapter(adapter: str | os.PathLike, output: str | os.PathLike, seed: int = 0) -> Path:
    """Write an adapter whose update of every layer has the singular values of another adapter's in random directions.

    So every layer's update B·A has the same rank, and the same size by any norm. B becomes U·B and A becomes A·Vᵀ with
    random rotations U and V, uniformly distributed.

    Args:
        adapter: folder of a LoRA adapter that PEFT saved.
        output: folder to write, which must not hold an adapter.
        seed: seed of the rotations.

    Raises:
        FileNotFoundError: `adapter` holds no adapter.
        ValueError: an adapter that is no plain LoRA of linear layers, or an output that is there.
    """
    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    config, weights = read_lora(adapter)
    if (output / CONFIG).exists():
        raise ValueError(f"output {str(output)!r} holds an adapter already: name another folder.")
    generator = torch.Generator().manual_seed(seed)
    for layer, (a, b) in lora_factors(adapter, config, weights).items():
        weights[factor_key(layer, "A")] = _turned(a.T, generator).T.contiguous().to(a.dtype)
        weights[factor_key(layer, "B")] = _turned(b, generator).to(b.dtype)
    write_lora(adapter, weights, output)
    return output


def _turned(factor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a factor `(n, r)` under a random rotation of its n numbers, in fp64."""
    # factor = Q R, and a random frame replaces the frame Q.
    coordinates = torch.linalg.qr(factor.double(), mode="r").R  # (min(n, r), r)
    frame = torch.linalg.qr(torch.randn(len(factor), len(coordinates), generator=generator, dtype=torch.float64))
    # Signs make the frame's distribution uniform.
    return (frame.Q * frame.R.diagonal().sign()) @ coordinates
