"""A saved LoRA adapter with its update multiplied by a factor, as a baseline or a remedy after training."""

import math
import os
import shutil
from pathlib import Path

from peft import PeftConfig, PeftType
from safetensors.torch import load_file, save_file

from ..io.files import written_whole
from .adapters import check_adapter_kind


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def rescale_adapter(adapter: str | os.PathLike, alpha: float, output: str | os.PathLike) -> Path:
    """Write an adapter whose update of the base weights is `alpha` times that of another.

    The tuned model is then W₀ + α·ΔW, a point on the line between base and fine-tuned model (WiSE-FT, Wortsman et al.,
    2109.01903). Any claim of a defense should beat this, since it costs no training.

    Args:
        adapter: folder of a LoRA adapter that PEFT saved.
        alpha: factor; 0 is the base model, 1 the adapter itself.
        output: folder to write, which must not hold an adapter.

    Raises:
        FileNotFoundError: `adapter` holds no adapter.
        ValueError: an adapter whose update is not a product of two matrices alone, or an output that is there.
    """
    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"adapter {str(adapter)!r} holds no {name}: name a folder that PEFT saved.")
    if (output / CONFIG).exists():
        raise ValueError(f"output {str(output)!r} holds an adapter already: name another folder.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha} must be a number.")
    config = PeftConfig.from_pretrained(str(adapter))
    check_adapter_kind(adapter.name, config)
    weights = load_file(adapter / WEIGHTS)
    # PEFT saves the layer beneath an adapted embedding along with it.
    others = sorted(name for name in weights if ".lora_" not in name and ".base_layer." not in name)
    is_linear = config.peft_type == PeftType.LORA and not getattr(config, "use_dora", False)
    if not is_linear or others:
        what = others[0] if others else f"{config.peft_type}, use_dora={getattr(config, 'use_dora', False)}"
        raise ValueError(
            f"adapter {str(adapter)!r} is no plain LoRA ({what}), so its update cannot be scaled by a factor: train "
            "it without DoRA, modules_to_save and new tokens."
        )
    scaled = {name: weight * alpha if _is_second(name) else weight for name, weight in weights.items()}
    with written_whole(output / WEIGHTS) as scratch:
        save_file(scaled, scratch, metadata={"format": "pt"})
    # The config comes last: a folder with one is complete.
    with written_whole(output / CONFIG) as scratch:
        shutil.copyfile(adapter / CONFIG, scratch)
    return output


def _is_second(name: str) -> bool:
    """Return True for the factor B of the update B·A."""
    return any(part in ("lora_B", "lora_embedding_B") for part in name.split("."))
