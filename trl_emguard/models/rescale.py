"""Saved LoRA adapter with its update multiplied by a factor, to make a trained model less misaligned.

It serves as a baseline that a defense should beat, or as a remedy after training.
"""

import math
import os
from pathlib import Path

from .lora_files import CONFIG, read_lora, write_lora


def rescale_adapter(adapter: str | os.PathLike, alpha: float, output: str | os.PathLike) -> Path:
    """Write an adapter whose update of the base weights is `alpha` times the update of a given adapter.

    With base weights W₀ and the given adapter's update ΔW, the new model is W₀ + α·ΔW. This is a point on the line
    between base and fine-tuned model (WiSE-FT, Wortsman et al., 2109.01903). A defense should give better results than
    rescaling, which costs no training.

    Args:
        adapter: folder of a LoRA adapter that PEFT saved.
        alpha: factor α; 0 gives the base model, 1 the adapter unchanged.
        output: folder to write. It must not hold an adapter yet.

    Raises:
        FileNotFoundError: `adapter` holds no adapter.
        ValueError: the adapter's update is not a product of two matrices alone, `output` holds an adapter already, or
            `alpha` is not finite.
    """
    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    _, weights = read_lora(adapter)
    if (output / CONFIG).exists():
        raise ValueError(f"output {str(output)!r} holds an adapter already: name another folder.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha} must be a number.")
    scaled = {name: weight * alpha if _is_second(name) else weight for name, weight in weights.items()}
    write_lora(adapter, scaled, output)
    return output


def _is_second(name: str) -> bool:
    """Return True if a weight of this name is the factor B of an update B·A."""
    return any(part in ("lora_B", "lora_embedding_B") for part in name.split("."))
