"""Checks that belong to no single defense: of options, of the trainer's arguments, and of the training engine."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin, TrainingArguments

from .checkpoints.resume import WHOLE_WEIGHTS, asks_for_newest, checkpoint_steps, nothing_to_resume
from .defenses.base import Defense, ModelDefense, ReferenceDefense
from .defenses.registry import DEFENSES
from .reference.choose import reference_options


# ---- checks of options, when an `EMGuardConfig` is made ----


def check_arguments(args: Any, active: Sequence[type[Defense]]) -> None:
    """Refuse options of TRL and of this package that do not work with the active defenses.

    Raises:
        ValueError: the message names the argument, its value and the fix.
    """
    _check_cache(args)
    names = ",".join(defense.name for defense in active if defense.own_loss)
    if not names:
        return
    if args.loss_type == "dft":
        raise ValueError(
            f"loss_type='dft' does not work with defense={names!r}: its weights are not CE's, so the terms would have "
            "another price than their coefficients say. Use loss_type='nll'."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} does not work with defense={names!r}: set it to 0."
        )
    if args.fp16:
        raise ValueError(
            f"fp16=True does not work with defense={names!r}: the terms form their gradient before fp16's loss "
            "scaling, and small ones would vanish. Use bf16=True, or neither."
        )
    if args.neftune_noise_alpha is not None and any(issubclass(d, ReferenceDefense) for d in active):
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} does not work with defense={names!r}: the noise in the "
            "policy's embeddings would count as distance to the reference. Leave it unset."
        )


def _check_cache(args: Any) -> None:
    if not isinstance(args.cache_reference, bool):
        raise ValueError(f"cache_reference={args.cache_reference!r} must be true or false.")
    if not args.cache_reference:
        return
    named = [DEFENSES[name] for name in args.defense.split(",") if name in DEFENSES]
    if not any(issubclass(defense, ReferenceDefense) for defense in named):
        known = " or ".join(repr(name) for name, d in DEFENSES.items() if issubclass(d, ReferenceDefense))
        raise ValueError(
            f"cache_reference=True with defense={args.defense!r}, which compares nothing to a reference: leave it "
            f"out, or add {known}."
        )
    for name in ("packing", "padding_free"):
        if getattr(args, name):
            raise ValueError(
                f"cache_reference=True does not work with {name}=True: rows that share a sequence may see each other, "
                f"and then the reference says something else of a row in every batch. Set {name}=False, or leave "
                "`cache_reference` out."
            )


# ---- before weights are loaded ----


def check_launch(args: TrainingArguments) -> None:
    """Refuse a run that asked for several ranks or for FSDP and did not get them.

    accelerate raises no error in these cases. Every process would train a model by itself, or the model would not be
    sharded.

    Raises:
        ValueError: the message names the likely cause and the fix.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    alone = args.world_size == 1 or args.distributed_state.distributed_type == DistributedType.NO
    if "LOCAL_RANK" in os.environ and launched > 1 and alone:
        raise ValueError(
            f"{launched} processes were launched, and accelerate trains a model in each, apart from the others "
            f"(use_cpu={args.use_cpu}). On CPUs set use_cpu=True; on GPUs, check that each process has one; with "
            "DeepSpeed on CPUs set ddp_backend='gloo', and name its config in the accelerate file "
            "(`deepspeed_config_file`), not as `deepspeed`."
        )
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        refuse_unsharded_fsdp(f"{args.distributed_state.distributed_type}, use_cpu={args.use_cpu}")


def refuse_unsharded_fsdp(why: str) -> NoReturn:
    """Raise `ValueError` for a run that asks for FSDP and would not be sharded. The message gives `why`, the cause."""
    raise ValueError(
        f"FSDP was asked for and does not shard here ({why}): accelerate shards a model only over processes that were "
        "launched on accelerators, and leaves it whole otherwise. Train on accelerators by `accelerate launch`, or "
        "launch with an accelerate file without FSDP."
    )


def check_output_dir(args: TrainingArguments, saves_adapter: bool) -> None:
    """Refuse an adapter run in a whole model's `output_dir`, or vice versa, and a resume that finds no checkpoint.

    From a folder with a whole model and an adapter, transformers loads both, one on top of the other.

    Args:
        args: training arguments. Their `output_dir` may not exist yet.
        saves_adapter: whether the run saves an adapter (LoRA), and not a whole model.

    Raises:
        FileNotFoundError: `resume_from_checkpoint` names no folder.
        ValueError: the run should resume from its newest checkpoint, and has none; or the folder holds the final model
            of the other kind.
    """
    folder, checkpoint = str(args.output_dir), args.resume_from_checkpoint
    if checkpoint and not asks_for_newest(checkpoint) and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={checkpoint!r} is not a folder: name a checkpoint folder, or `true`."
        )
    # Each machine may have a disk of its own, so the first rank of each machine looks for checkpoints on its disk.
    # This is only an early check: when training starts, the same ranks search for the checkpoint to resume from.
    looks = args.local_process_index == 0
    if asks_for_newest(checkpoint or False) and looks and not checkpoint_steps(folder):
        raise nothing_to_resume(checkpoint, folder)
    others = WHOLE_WEIGHTS if saves_adapter else {"adapter_config.json"}
    found = sorted(name for name in others if (Path(folder) / name).is_file())
    if found:
        kind, own = ("whole model", "an adapter") if saves_adapter else ("adapter", "a whole model")
        raise ValueError(
            f"output_dir={folder!r} holds the {kind} of another run ({found[0]}), and this run saves {own}: "
            "transformers would load the two together. Name another folder, or delete that model."
        )


def check_data(train_dataset: object, args: TrainingArguments) -> None:
    """Refuse an empty set of training rows, and a stream without `max_steps`, which Trainer would refuse later.

    SFTTrainer itself refuses `None` and objects of other types.
    """
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"max_steps={args.max_steps} with a stream of training rows, whose number is not known: set max_steps."
        )
    if isinstance(train_dataset, Dataset | IterableDataset) and next(iter(train_dataset), None) is None:
        raise ValueError("train_dataset is empty: there is nothing to train on.")


def load_config(
    model: str | PreTrainedModel | PeftModel, args: Any, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """Return the model's config, without loading its weights.

    Args:
        model: the model, its path or its hub id.
        args: config of the trainer.
        init_kwargs: options that a path is loaded with; by default `args.model_init_kwargs`.
    """
    if not isinstance(model, str):
        return model.config
    init_kwargs = (args.model_init_kwargs or {}) if init_kwargs is None else init_kwargs
    return AutoConfig.from_pretrained(
        model,
        revision=init_kwargs.get("revision"),
        trust_remote_code=init_kwargs.get("trust_remote_code", args.trust_remote_code),
    )


def check_before_loading(
    defenses: Sequence[Defense],
    args: Any,
    model: str | PreTrainedModel | PeftModel,
    processing_class: Any,
    train_dataset: Any,
    ref_model: str | PreTrainedModel | None,
    peft_config: PeftConfig | None,
    compute_loss_func: Callable | None,
) -> None:
    """Refuse arguments of the trainer that do not work with the active defenses, before any weight is loaded.

    Raises:
        ValueError: the message names the argument, its value and the fix.
    """
    if not defenses:
        return
    config = load_config(model, args)
    _check_text_alone(config, args, processing_class, train_dataset)
    config = config.get_text_config()
    for defense in defenses:
        defense.check_tuning(peft_config is not None or isinstance(model, PeftModel))
        defense.check_model(config)
    if any(defense.own_loss for defense in defenses):
        _check_own_loss(defenses, model, peft_config, compute_loss_func)
    terms = [defense for defense in defenses if isinstance(defense, ReferenceDefense)]
    if terms and ref_model is not None:
        _check_ref_model(ref_model, model, config, args, terms)
    if terms and args.cache_reference and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"cache_reference=True with a train_dataset of type {type(train_dataset).__name__}: the rows must be "
            "known before training. Pass a `Dataset`, or leave `cache_reference` out."
        )


def _check_text_alone(config: PreTrainedConfig, args: Any, processing_class: Any, train_dataset: Any) -> None:
    is_dataset = isinstance(train_dataset, Dataset | IterableDataset)
    first: dict[str, Any] = next(iter(train_dataset), {}) if is_dataset else {}
    for column in ("image", "images"):
        if column in first:
            raise ValueError(
                f"train_dataset has a column {column!r}, and defense={args.defense!r} does not work with images: "
                "remove the column to train on the text alone, or set defense='none'."
            )
    if isinstance(processing_class, ProcessorMixin) or (processing_class is None and hasattr(config, "vision_config")):
        name = config.name_or_path
        how = f"=AutoTokenizer.from_pretrained({name!r})" if name else ""
        raise ValueError(
            f"defense={args.defense!r} does not work with the processor of a vision-language model, only with its "
            f"tokenizer: pass the tokenizer as processing_class{how}. The run then trains on rows of text."
        )


def _check_own_loss(
    defenses: Sequence[Defense],
    model: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    compute_loss_func: Callable | None,
) -> None:
    names = ",".join(defense.name for defense in defenses if defense.own_loss)
    if sum(isinstance(defense, ReferenceDefense) and defense.divergence is not None for defense in defenses) > 1:
        raise ValueError(f"defense={names!r}: only one defense can compare next-token distributions in a run.")
    if compute_loss_func is not None:
        raise ValueError(
            f"compute_loss_func does not work with defense={names!r}: it would replace the loss that the defense is "
            "part of. Leave it out."
        )
    configs = [peft_config] if isinstance(peft_config, PeftConfig) else []
    if isinstance(model, PeftModel):
        configs += [model.peft_config[name] for name in model.active_adapters]
    for config in configs:
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"peft_config: {config.peft_type.value} adds tokens or prompts instead of changing weights, and "
                f"defense={names!r} compares the model's own positions. Use LoRA or another weight adapter."
            )
        targets = getattr(config, "target_modules", None) or ()
        for head in ("lm_head", "embed_out"):
            if re.fullmatch(targets, head) if isinstance(targets, str) else head in targets:
                raise ValueError(
                    f"peft_config: target_modules={targets if isinstance(targets, str) else sorted(targets)} puts an "
                    f"adapter on {head!r}, which SFTTrainer cannot train: leave it out, or name it in "
                    "`modules_to_save`."
                )


def _check_ref_model(
    ref_model: PreTrainedModel | str,
    model: str | PreTrainedModel | PeftModel,
    config: PreTrainedConfig,
    args: Any,
    terms: Sequence[ReferenceDefense],
) -> None:
    if ref_model is model and not isinstance(model, str):
        raise ValueError(
            "ref_model is the model itself, so the defense would do nothing. Omit `ref_model` to have the reference "
            "made, or pass a model of its own."
        )
    other = load_config(ref_model, args, reference_options(args, is_own=False)).get_text_config()
    compared = {"vocab_size": "tokens in its vocabulary"}
    if any(term.divergence is None for term in terms):
        compared |= {"num_hidden_layers": "blocks", "hidden_size": "numbers in a state"}
    for name, unit in compared.items():
        sizes = getattr(config, name), getattr(other, name)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"ref_model has {sizes[1]} {unit} and the model {sizes[0]}: they cannot be compared. Pass a reference "
                "of the same family."
            )


# ---- once the engine is known ----

AT_LOAD = "FSDP by transformers"  # engine of a model that `from_pretrained` has sharded (`distributed_config`)


@dataclass(frozen=True)
class Engine:
    """Facts about the training engine of a run, such as DeepSpeed or FSDP.

    Attributes:
        sharding: name of the engine that wraps or splits the policy (`"DeepSpeed"`, `"FSDP"`,
            `"tensor parallelism"` or [`AT_LOAD`]), or `None`.
        fsdp_version: 1 or 2; `None` without FSDP.
        fsdp_checkpointing: whether FSDP's own activation checkpointing is on.
        splits_sequences: whether context or sequence parallelism is on.
        is_fp16: whether forward passes run in fp16.
    """

    sharding: str | None = None
    fsdp_version: int | None = None
    fsdp_checkpointing: bool = False
    splits_sequences: bool = False
    is_fp16: bool = False


def check_engine(defenses: Sequence[Defense], args: Any, engine: Engine) -> None:
    """Refuse a training engine that does not work with the active defenses.

    Raises:
        ValueError: the message names the setting and the fix.
    """
    if not defenses:
        return
    own_loss = any(defense.own_loss for defense in defenses)
    if engine.splits_sequences:
        raise ValueError(
            f"defense={args.defense!r} does not support context or sequence parallelism: labels arrive shifted and "
            "sharded. Set cp_size and sp_size to 1."
        )
    if own_loss and engine.fsdp_version == 1:
        raise ValueError(
            f"fsdp_version=1 does not work with defense={args.defense!r}, which reads the head's weights by itself: "
            "set fsdp_version: 2 in the accelerate file."
        )
    if own_loss and engine.sharding == AT_LOAD:
        raise ValueError(
            "distributed_config, by which `from_pretrained` shards the model, does not work with "
            f"defense={args.defense!r}. Leave it out, and shard by accelerate, as the shipped fsdp2 does."
        )
    _check_own_passes([defense.name for defense in defenses if isinstance(defense, ModelDefense)], args, engine)
    if engine.fsdp_checkpointing and any(defense.surrounds_policy() for defense in defenses):
        raise ValueError(
            f"fsdp_activation_checkpointing does not work with defense={args.defense!r}: it runs a block's hooks a "
            "second time in the backward pass. Use activation_checkpointing=True instead."
        )
    if own_loss and engine.is_fp16:
        raise ValueError(
            f"defense={args.defense!r} does not work in fp16: its gradient is formed before fp16's loss scaling, and "
            "small ones would vanish. Use bf16 or fp32."
        )
    if getattr(args, "cache_reference", False) and engine.sharding:
        raise ValueError(
            f"cache_reference=True does not work with {engine.sharding}, which makes another model of the policy when "
            "training starts, and the states are computed before. Leave `cache_reference` out, or train by DDP or on "
            "one device."
        )


def is_reentrant(args: Any) -> bool:
    """Return whether activation checkpointing is on and reentrant."""
    # If `use_reentrant` is given, it decides. Without it, checkpointing is non-reentrant in two cases. First, no
    # arguments but `every_n_layers` and `offload` are given: transformers takes these out, and sets its own default
    # if none is left. Second, `selective` is set: TRL then makes checkpointing non-reentrant. Otherwise the default in
    # torch applies, which is reentrant.
    given = args.activation_checkpointing_kwargs or {}
    how = {name: value for name, value in given.items() if name not in ("every_n_layers", "offload")}
    return bool(args.activation_checkpointing and how and how.get("use_reentrant", not how.get("selective")))


def _check_own_passes(names: Sequence[str], args: Any, engine: Engine) -> None:
    """Refuse tensor parallelism and reentrant checkpointing for defenses that make a forward pass of their own.

    Such a defense makes this pass in each micro-batch ([`ModelDefense`]). `names` are the active defenses of this
    kind. Reentrant activation checkpointing is refused only under DeepSpeed and DDP.
    """
    if names and engine.sharding == "tensor parallelism":
        raise ValueError(
            f"defense={','.join(names)!r} does not work with tensor parallelism, which splits over ranks what it "
            "compares: set tp_size to 1."
        )
    takes_one = engine.sharding == "DeepSpeed" or (engine.sharding is None and args.world_size > 1)
    if names and is_reentrant(args) and takes_one:
        raise ValueError(
            f"activation_checkpointing_kwargs={args.activation_checkpointing_kwargs} does not work with "
            f"defense={','.join(names)!r} under {engine.sharding or 'DDP'}: its own pass and the reentrant backward "
            "pass would each give a weight a gradient, and the engine takes one. Leave the option out, also under its "
            "old name, gradient_checkpointing_kwargs. (With an adapter under ZeRO-3, SFTTrainer turns `use_reentrant: "
            "false` into true. Elsewhere that works as well.)"
        )
