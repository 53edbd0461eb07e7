"""Loading of misaligned adapters, trained for example on harmful advice, all onto one aligned base model."""

import os
from collections.abc import Mapping

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..models.adapters import check_adapter_kind
from ..models.identity import check_whole_on_device, weight_checksums


# Prefix that an adapter's name gets on the model if the name alone would clash with another name there. An adapter's
# weights have the adapter's name as one part of their dotted names, and PEFT finds them by this part. The name must
# therefore not be a part of other weights' names, such as `q_proj`. PEFT also stores adapters by name in torch's
# `ModuleDict` and `ParameterDict`, so the name must not be that of an attribute of these classes, such as `keys`.
PREFIX = "misaligned_"


class AdapterError(ValueError):
    """Error for an adapter that cannot be used with the given model and the other adapters.

    When it is raised, adapters may already be on the model, and one of them may have replaced base weights.

    Args:
        path: folder or hub id of the adapter, as the caller gave it.
        message: text of the error.
    """

    def __init__(self, path: str | os.PathLike, message: str):
        super().__init__(message)
        self.path = path


def adapter_key(model: PeftModel, name: str) -> str:
    """Return the name that an adapter has on the model: `name` itself, or [`PREFIX`] followed by `name`.

    Args:
        model: result of [`load_misaligned`], or another model with adapters.
        name: name of the adapter, as the user gave it.
    """
    return name if name in model.peft_config else PREFIX + name


def load_misaligned(model: PreTrainedModel, adapters: Mapping[str, str | os.PathLike]) -> PeftModel:
    """Load misaligned adapters onto their base model, in the model's dtype.

    Args:
        model: the aligned model, without adapters.
        adapters: name → folder or hub id of an adapter that PEFT saved. A name that is also part of a weight's name
            (`0`, `q_proj`), or the name of an attribute in torch (`keys`), gets [`PREFIX`] on the model.
            [`adapter_key`] returns the resulting name.

    Raises:
        FileNotFoundError: a folder that holds no adapter.
        AdapterError: an adapter of another base model, or one that changes the base weights.
    """
    check_whole_on_device(model)
    configs = {name: load_adapter_config(name, path) for name, path in adapters.items()}
    base_weights = weight_checksums(model)
    peft_model: PeftModel | None = None
    taken = {part for weight, _ in model.named_parameters() for part in weight.split(".")}
    taken |= {"base_layer", *dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
    for name, path in adapters.items():
        key = PREFIX + name if name in taken or name.startswith("lora_") else name
        peft_model = _add(peft_model or model, key, path, configs[name])
        now = weight_checksums(model)
        changed = sorted(key for key in now.keys() & base_weights.keys() if now[key] != base_weights[key])
        if changed:
            raise AdapterError(
                path,
                f"adapter {name!r} ({path}) brought a base weight of its own, {changed[0]!r}, so switching adapters "
                'off does not give the aligned model: train it with bias="none" and without new tokens.',
            )
    if peft_model is None:
        raise ValueError("adapters is empty: the gap needs one misaligned adapter or more.")
    return peft_model


def load_adapter_config(name: str, path: str | os.PathLike) -> PeftConfig:
    """Load an adapter's config. Refuse an empty or dotted name, and an adapter that cannot be fully switched off.

    Raises:
        FileNotFoundError: `path` holds no adapter.
        ValueError: the name or the kind of the adapter.
    """
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r} must not be empty or hold a dot: give another, NAME={path}.")
    try:
        config = PeftConfig.from_pretrained(str(path))
    # PEFT raises many types of errors on a damaged file.
    except Exception as error:
        raise FileNotFoundError(
            f"adapter {str(path)!r} holds no adapter_config.json that PEFT saved ({error})."
        ) from error
    check_adapter_kind(name, config)
    return config


def _add(model: PreTrainedModel | PeftModel, name: str, path: str | os.PathLike, config: PeftConfig) -> PeftModel:
    """Load the weights of one adapter onto a model that may already have other adapters."""
    config.inference_mode = True
    shown = name.removeprefix(PREFIX)
    try:
        # By default, PEFT would cast bf16 adapters to fp32, which helps training but slows down forward passes.
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        else:
            model = PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
        result = model.load_adapter(str(path), name, torch_device="cpu", autocast_adapter_dtype=False)
    except Exception as error:
        message = " ".join(str(error).split())
        raise AdapterError(path, f"adapter {shown!r} ({path}) does not fit this base model: {message}") from error
    # PEFT lists a weight of another adapter as missing too if this adapter's name occurs anywhere in the weight's key:
    # the name "own" occurs in "down_proj". Only keys with this adapter's name between dots are counted as missing.
    foreign = [*(key for key in result.missing_keys if name in key.split(".")), *result.unexpected_keys]
    if foreign:
        raise AdapterError(
            path,
            f"adapter {shown!r} ({path}) does not fit this base model: {len(foreign)} weights are on one side only, "
            f"the first is {foreign[0]!r}.",
        )
    return model
