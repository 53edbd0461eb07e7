"""Models on the meta device, where tensors have a shape but no values, and a trainer for such a model."""

import copy
import json
import os
import re
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, IterableDataset
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig
from safetensors import safe_open
from torch import device, nn
from transformers import AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from transformers.quantizers import AutoHfQuantizer

from ..checks import Engine, load_config
from ..config import EMGuardConfig
from ..models.load import text_tokenizer
from ..reference.cache import reference_cache_dir
from ..reference.choose import reference_kind
from ..reference.kinds import ModelReference
from ..trainer import EMGuardTrainer
from .engine import Launch, check_settings


# Training rows and evaluation rows, the latter `None` if nothing is evaluated.
Data = tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]


def meta_model(path: str, args: EMGuardConfig, quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
    """Build the model that SFTTrainer would load, but on the meta device, and return it.

    Raises:
        FileNotFoundError: some of the weight files that a folder's index names are missing.
    """
    _check_shards(Path(path))
    given, config = dict(args.model_init_kwargs or {}), load_config(path, args)  # type: ignore[arg-type]
    dtype = given.get("dtype", "float32")
    # To make a model with flash attention, or with an attention kernel from the hub, transformers needs the kernel's
    # package and a GPU. A dry run must work without them. So the model is made with the default attention, and the
    # kernel's name is written into the config of the finished model.
    attention = str(given.get("attn_implementation") or "")
    is_kernel = re.fullmatch(r"flash_attention_\d|.*/.*", attention) is not None
    kwargs = {
        "dtype": config.dtype if dtype in ("auto", None) else dtype,
        "attn_implementation": None if is_kernel else given.get("attn_implementation"),
    }
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with device("meta"):
        if architecture is None:
            remote = given.get("trust_remote_code", args.trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote, **kwargs)
        else:
            model = architecture._from_config(config, **kwargs)
    if is_kernel:
        if not model._supports_flash_attn:
            raise ValueError(f"attn_implementation={attention!r}: {type(model).__name__} does not support it.")
        model.config._attn_implementation = attention
    quantization = given.get("quantization_config", quantization)
    stored = getattr(config, "quantization_config", None)
    if quantization is None and stored and stored.get("quant_method", "bitsandbytes") == "bitsandbytes":
        quantization = stored
    return model if quantization is None else quantized(model, quantization)


def quantized(model: PreTrainedModel, how: BitsAndBytesConfig | dict[str, Any]) -> PreTrainedModel:
    """Give a model on the meta device the layers that it would have after quantised loading, and return the model.

    Args:
        model: the model.
        how: quantisation; a dict is that in the config of a checkpoint that is quantised already.
    """
    # A checkpoint that is quantised already is treated like one that is not: with `pre_quantized=True`, 4-bit weights
    # would get the dtype of packed weights without being packed, and `count_weights` would count each of them twice.
    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None)
    model.hf_quantizer = quantizer
    return quantizer.postprocess_model(model)


def read_first_rows(model: PreTrainedModel, path: str, revision: str | None) -> bool:
    """Load the first 64 rows of every weight into a meta model, enough for this package's checksums of weights.

    Args:
        model: model on the meta device.
        path: model folder, or hub id of a model in the hub's cache.
        revision: revision of a model on the hub.

    Returns:
        True if rows of at least one weight were loaded.
    """
    modules, has_read = dict(model.named_modules()), False
    for file in _local_folder(path, revision).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                module, _, weight = name.rpartition(".")
                if weight in dict(modules.get(module, nn.Module()).named_parameters(recurse=False)):
                    rows = nn.Parameter(weights.get_slice(name)[:64], requires_grad=False)
                    modules[module].register_parameter(weight, rows)
                    has_read = True
    return has_read


def _local_folder(path: str, revision: str | None) -> Path:
    """Return the folder of a model on this machine; for a model that is not here, a folder that does not exist."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(path)


def _check_shards(folder: Path) -> None:
    # Only the first index (list of a model's weight files) is checked. The index of safetensors comes first, because
    # `from_pretrained` prefers safetensors as well.
    for index in chain(folder.glob("*.safetensors.index.json"), folder.glob("*.bin.index.json")):
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"model {str(folder)!r}: the file {name!r}, which {index.name} names, is missing."
                )
        return


class MetaTrainer(EMGuardTrainer):
    """Trainer of a dry run, with a model on the meta device and facts about the engine that the launch would start.

    It also records how many tokens each training row has before rows are cut and packed. The report needs these
    numbers (`whole_lengths`). They are recorded also without defenses, but not for a stream.

    Args:
        launch: facts about the launch.
        args, kwargs: arguments of [`EMGuardTrainer`].
    """

    counts_whole_rows = True
    compares_weights = False

    def __init__(self, launch: Launch, *args: Any, **kwargs: Any):
        self.launch = launch
        super().__init__(*args, **kwargs)

    def engine_facts(self) -> Engine:
        return replace(self.launch.facts, is_fp16=super().engine_facts().is_fp16)


def meta_trainer(
    path: str,
    args: EMGuardConfig,
    data: Data,
    quantization: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
    callbacks: list[TrainerCallback],
    launch: Launch,
) -> EMGuardTrainer:
    """Build a run's trainer with a model on the meta device, and raise errors that the launched run would raise.

    Args:
        path: folder or hub id of the model.
        args: configuration with complete `model_init_kwargs`.
        data: training and evaluation rows.
        quantization, peft_config, callbacks: arguments of the trainer.
        launch: facts about the launch. Call this function inside of [`simulated_ranks`].

    Raises:
        ValueError, FileNotFoundError, InactiveDefenseError: errors that the run would raise.
    """
    _check_folder("output_dir", args.output_dir)
    if args.cache_reference:
        _check_folder("TRL_EMGUARD_CACHE/reference", str(reference_cache_dir()))
    check_settings(args, callbacks, launch)
    given = _unplaced(args)
    if launch.engine.name == "zero3" and peft_config is not None and given.activation_checkpointing_kwargs:
        # SFTTrainer also sets `use_reentrant` to True in the launched run, because PEFT needs that under ZeRO-3.
        given.activation_checkpointing_kwargs = {**given.activation_checkpointing_kwargs, "use_reentrant": True}
    given.push_to_hub, given.model_init_kwargs = False, None
    given.report_to = []  # a dry run logs nothing, and the trackers need not be installed here
    # The precision in the training arguments wins over that of the launch, as it does in a launched run.
    if launch.mixed_precision is not None and not (args.bf16 or args.fp16):
        given.mixed_precision = launch.mixed_precision
    revision = (args.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as scratch:
        given.output_dir = scratch  # the trainer makes this folder, and a dry run leaves none behind
        trainer = MetaTrainer(
            launch,
            meta_model(path, args, quantization),
            given,
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=text_tokenizer(path, args, data[0])
            or AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=args.trust_remote_code),
            peft_config=peft_config,
            callbacks=callbacks,
        )
    trainer.args.output_dir = args.output_dir
    # No engine runs in this process, so the trainer is told the engine of the launch.
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = launch.engine.is_deepspeed, launch.fsdp is not None
    if trainer.reference is not None and launch.engine.name == "zero3":
        kind = reference_kind(trainer.model, None, args, is_sharded=True)
        if isinstance(trainer.reference, ModelReference):
            trainer.reference.kind, trainer.reference.source = kind, path
    return trainer


def _check_folder(argument: str, folder: str) -> None:
    """Raise `ValueError` if a folder cannot be made or written to. The folder is not made here."""
    absolute = Path(folder).absolute()
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}={folder!r} cannot be written to: name another folder.")


def _unplaced(args: EMGuardConfig) -> EMGuardConfig:
    """Return a copy of the arguments that makes Trainer leave the model on the meta device, and see one GPU at most.

    Each process of the launch sees one GPU. This process may see all, and SFTTrainer would refuse several.
    """
    unplaced: Any = copy.copy(args)
    # `place_model_on_device` and `n_gpu` are properties without a setter, so the copy gets a class that overrides
    # them.
    overridden = {"place_model_on_device": False, "n_gpu": min(1, args.n_gpu)}
    unplaced.__class__ = type(type(args).__name__, (type(args),), overridden)
    return unplaced
