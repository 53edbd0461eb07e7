"""Identity of a model, from a sample of every weight: one hash over all weights, or one checksum per weight.

For the few weights of an adapter there is also a hash of all numbers. All formats are stored in files (`defense.json`,
persona vectors, projections), so their algorithms must not change.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from .adapters import changes_base
from .sharding import gathered


# About this many evenly spaced values are sampled from a weight. For a checksum, all of them come from the weight's
# first `SAMPLES` rows.
SAMPLES = 64
# Types of the buffers that hold the weights of AWQ and GPTQ layers. Other buffers of integers, such as positions, have
# 64 bits.
PACKED = (torch.int32, torch.int16, torch.int8, torch.uint8)
# Prefix of an fp16 weight's checksum. Samples of fp16 weights, unlike all others, are not rounded to bf16, so their
# checksums can be compared only with one another.
FP16 = "fp16:"
# Names under which PEFT's adapter modules keep the original module.
ORIGINALS = ("base_layer", "original_module")

# Error for a model with weights that accelerate has offloaded. Their numbers are not in the parameters.
OFFLOADED = (
    "the model does not fit on the device, so some of its weights are offloaded, which is not supported: take a "
    "smaller dtype (bfloat16), a larger GPU or, with the options that there are, 4 bits or the CPU (device_map: cpu). "
    "A judge has more room with `evaluate --rejudge`, which loads no model under test."
)


def check_whole_on_device(model: nn.Module) -> None:
    """Refuse a model with weights that accelerate has offloaded, because its parameters do not hold their values.

    Raises:
        ValueError: a weight is on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(OFFLOADED)


def fingerprint(model: nn.Module, without: Collection[str] = (), is_plain: bool = False) -> str:
    """Return a hash of a sample of every weight; an empty text for a model on the meta device, which has no numbers.

    Call this function before FSDP2 shards the model, because sharded weights are left out. If ZeRO-3 has loaded
    weights in shards, they are gathered one by one, so every rank must call this function.

    Args:
        model: the model, with adapters or without.
        without: names of adapters to leave out.
        is_plain: if true, each weight enters the hash under the name that it has in a model without adapters.

    Raises:
        ValueError: some of the weights are offloaded.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        return ""
    digest = hashlib.sha256()
    for name, _, sample in _samples(model, lambda name, _: set(without).isdisjoint(name.split("."))):
        digest.update((_plain(name) if is_plain else name).encode() + _bytes(sample))
    return digest.hexdigest()


def adapter_scales(model: nn.Module, adapter: str) -> str:
    """Return an adapter's scaling factors as text, to append to a [`fingerprint`].

    The factors depend on `lora_alpha` and rsLoRA, so a hash of the weights does not show them.
    """
    layers = (getattr(module, "scaling", None) for module in model.modules() if isinstance(module, BaseTunerLayer))
    scales = {scaling[adapter] for scaling in layers if isinstance(scaling, dict) and adapter in scaling}
    return f"*{sorted(scales)}"


def active_fingerprint(model: nn.Module) -> str:
    """Return a model's fingerprint and its active adapters' scaling factors, or an empty text if no adapter is active.

    Adapters that are not active, or are switched off, are left out.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        active |= {model.active_adapter} if model.has_active_enabled_adapter else set()
    if not active:
        return ""
    others = getattr(model, "peft_config", {}).keys() - active
    found = fingerprint(model, others, is_plain=True)
    return found + "".join(adapter_scales(model, name) for name in sorted(active))


def weight_checksums(model: nn.Module) -> dict[str, str]:
    """Return one checksum for each weight, by the name that the weight has in a model without adapters.

    A checksum covers only a sample of the weight's values. The sample is rounded to bf16, so that a model has the same
    checksums in fp32 and bf16. Samples of fp16 weights are not rounded, and their checksums have a prefix. A sample
    comes from a weight's first rows, so a model whose vocabulary grew still has the same checksums.

    Left out are adapters, quantised and offloaded weights, and FSDP's shards. Weights that carry an adapter are left
    out as well if an adapter's initialisation has changed them (PiSSA, OLoRA). ZeRO-3's shards are gathered one
    by one, so every rank must call this function.
    """
    adapters = getattr(model, "peft_config", {})
    keeps_base = not any(map(changes_base, adapters.values()))
    added = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name, parameter in module.named_parameters()
        if name.split(".")[0] not in ORIGINALS
    }

    def is_compared(name: str, parameter: torch.Tensor) -> bool:
        return (
            id(parameter) not in added
            and not parameter.is_meta
            and (keeps_base or "base_layer" not in name.split("."))
            and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        )

    checksums = {}
    for name, parameter, sample in _samples(model, is_compared, rows=SAMPLES):
        if not sample.numel():
            continue
        is_half = parameter.dtype == torch.float16
        rounded = sample if is_half else sample.bfloat16()
        checksums[_plain(name)] = f"{FP16 if is_half else ''}{zlib.crc32(_bytes(rounded)):08x}"
    return checksums


def weights_digest(model: nn.Module) -> str:
    """Return one hash of all [`weight_checksums`], or an empty text if the model has none."""
    checksums = weight_checksums(model)
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest() if checksums else ""


def weights_fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of weights: of their names, dtypes, shapes and all their numbers, on any device."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _samples(
    model: nn.Module, is_wanted: Callable[[str, torch.Tensor], bool], rows: int | None = None
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield name, weight and a CPU sample of its numbers, for non-DTensor weights that `is_wanted` accepts.

    Buffers of packed integers count as weights: those of AWQ and GPTQ layers are no parameters.

    Args:
        model: the model.
        is_wanted: function of name and weight that returns True if the weight is sampled.
        rows: number of first rows to sample from; by default all rows. If given, the distance between neighbouring
            sampled numbers is odd, so that not all of them fall into the same columns.
    """
    packed = ((name, buffer) for name, buffer in model.named_buffers() if buffer.dtype in PACKED)
    for name, parameter in chain(model.named_parameters(), packed):
        if isinstance(parameter, DTensor) or not is_wanted(name, parameter):
            continue
        if parameter.is_meta:
            raise ValueError(OFFLOADED)
        with gathered(parameter):
            weight = parameter.detach()
            flat = (weight if rows is None else weight[:rows]).flatten()
            distance = max(1, flat.numel() // SAMPLES)
            sample = flat[:: distance if rows is None else distance | 1].contiguous().cpu()
        yield name, parameter, sample


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ORIGINALS)


def _bytes(sample: torch.Tensor) -> bytes:
    return sample.contiguous().view(torch.uint8).numpy().tobytes()
