"""Files of a saved LoRA adapter, read and written. Adapters whose updates are not plain products B·A are refused."""

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..io.files import written_whole
from .adapters import check_adapter_kind


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Files and folders in which a tokenizer may be saved, as patterns of their names.
TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "additional_chat_templates", "special_tokens_map.json", "added_tokens.json",
    "vocab*", "merges.txt", "*.model",
)  # fmt: skip
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Factors A `(r, k)` and B `(d, r)` of each layer's update B·A, by the layer's name in the model.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_lora(adapter: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return config and weights of a plain LoRA adapter. Refuse DoRA, and trained weights other than A and B.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the adapter is of another kind, or a file is damaged.
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
    # PEFT saves the original layer of an adapted embedding (`base_layer`) together with the adapter, so such a weight
    # is no reason to refuse the adapter.
    others = sorted(name for name in weights if ".lora_" not in name and ".base_layer." not in name)
    is_linear = config.peft_type == PeftType.LORA and not getattr(config, "use_dora", False)
    if not is_linear or others:
        what = others[0] if others else f"{config.peft_type}, use_dora={getattr(config, 'use_dora', False)}"
        raise ValueError(
            f"adapter {str(adapter)!r} is no plain LoRA ({what}), so its update is not a product of two matrices "
            "alone: train it without DoRA, trained biases, modules_to_save and new tokens."
        )
    return config, weights


def lora_factors(adapter: Path, config: LoraConfig, weights: Mapping[str, torch.Tensor]) -> Factors:
    """Return the factors A and B of each adapted layer as the file stores them, without PEFT's scaling.

    Args:
        adapter: folder of the adapter, for messages.
        config, weights: the adapter's config and weights, from [`read_lora`].

    Raises:
        ValueError: a weight is not a factor of a linear layer, a factor is missing or does not fit the other factor,
            the adapter holds no weights, its config replicates layers (`layer_replication`), or it adapts weights of
            modules that are no linear layers (`target_parameters`), such as the experts of a mixture of experts.
    """
    if config.layer_replication:
        raise ValueError(f"adapter {str(adapter)!r} has layer_replication, so its layers are not those of the models.")
    if config.target_parameters:
        raise ValueError(
            f"adapter {str(adapter)!r} is no plain LoRA of linear layers: it has target_parameters="
            f"{sorted(config.target_parameters)}, as an adapter of a mixture of experts has for its experts. Train it "
            "with target_modules that are linear layers, such as q_proj and v_proj, and with nothing else."
        )
    layers = []
    for name, weight in weights.items():
        match = FACTOR.fullmatch(name)
        if match is None or weight.dim() != 2:
            raise ValueError(
                f"adapter {str(adapter)!r} is no plain LoRA of linear layers: it holds {name!r} of shape "
                f"{tuple(weight.shape)}. Train it without lora_bias, and on linear layers alone."
            )
        layers.append(match[1])
    factors = {}
    for layer in dict.fromkeys(layers):
        a, b = weights.get(factor_key(layer, "A")), weights.get(factor_key(layer, "B"))
        if a is None or b is None or len(a) != b.shape[1]:
            raise ValueError(
                f"adapter {str(adapter)!r} has no fitting pair A, B for the layer {layer!r}: it is damaged."
            )
        factors[layer] = a, b
    if not factors:
        raise ValueError(f"adapter {str(adapter)!r} holds no weights: name a folder that training saved.")
    return factors


def factor_key(layer: str, factor: str) -> str:
    """Return the name under which an adapter's file holds factor `"A"` or `"B"` of a layer."""
    return f"base_model.model.{layer}.lora_{factor}.weight"


def lora_updates(adapter: Path, config: LoraConfig, weights: Mapping[str, torch.Tensor]) -> Factors:
    """Return A and s·B of each adapted layer in fp32, with PEFT's scaling s. The layer's update is (s·B)·A.

    Raises:
        ValueError: as in [`lora_factors`].
    """
    updates = {}
    for layer, (a, b) in lora_factors(adapter, config, weights).items():
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), layer), config.lora_alpha)
        scaling = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
        updates[layer] = a.float(), scaling * b.float()
    return updates


def write_lora(adapter: Path, weights: dict[str, torch.Tensor], output: Path) -> None:
    """Write an adapter with new weights, and with config and tokenizer of an existing adapter.

    Training saves its tokenizer beside the adapter. Its chat template or end token may not be the base model's.

    Args:
        adapter: folder of the existing adapter.
        weights: weights to write.
        output: folder to write.
    """
    with written_whole(output / WEIGHTS) as scratch:
        save_file(weights, scratch, metadata={"format": "pt"})
    for path in (path for pattern in TOKENIZER_FILES for path in adapter.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, output / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, output / path.name)
    # The config is written last, so a folder with a config is complete.
    with written_whole(output / CONFIG) as scratch:
        shutil.copyfile(adapter / CONFIG, scratch)
