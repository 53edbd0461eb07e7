"""The files of a saved LoRA adapter: read where its update is a product of two matrices alone, and written."""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..io.files import written_whole
from .adapters import check_adapter_kind


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_lora(adapter: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return the config and the weights of a plain LoRA adapter: no DoRA, and nothing trained beside the factors.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: an adapter of another kind, or a damaged file.
    """
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"adapter {str(adapter)!r} holds no {name}: name a folder that PEFT saved.")
    config = PeftConfig.from_pretrained(str(adapter))
    check_adapter_kind(adapter.name, config)
    try:
        weights = load_file(adapter / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"adapter {str(adapter)!r} has a damaged {WEIGHTS} ({error}): copy it again.") from error
    # PEFT saves the layer beneath an adapted embedding along with it.
    others = sorted(name for name in weights if ".lora_" not in name and ".base_layer." not in name)
    is_linear = config.peft_type == PeftType.LORA and not getattr(config, "use_dora", False)
    if not is_linear or others:
        what = others[0] if others else f"{config.peft_type}, use_dora={getattr(config, 'use_dora', False)}"
        raise ValueError(
            f"adapter {str(adapter)!r} is no plain LoRA ({what}), so its update is not a product of two matrices "
            "alone: train it without DoRA, trained biases, modules_to_save and new tokens."
        )
    return config, weights


def write_lora(adapter: Path, weights: dict[str, torch.Tensor], output: Path) -> None:
    """Write an adapter with the config of another.

    Args:
        adapter: folder of the other adapter.
        weights: weights to write.
        output: folder to write.
    """
    with written_whole(output / WEIGHTS) as scratch:
        save_file(weights, scratch, metadata={"format": "pt"})
    # The config comes last: a folder with one is complete.
    with written_whole(output / CONFIG) as scratch:
        shutil.copyfile(adapter / CONFIG, scratch)
