"""What a trainer refuses before any weight is loaded. Each message names the argument, its value and the mend."""

import os
import re
from collections.abc import Callable

from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, TrainingArguments

from .config import EMGuardConfig
from .defenses import Defense, ReferenceDefense


def check_launch(args: TrainingArguments) -> None:
    """Refuse a run that was launched on several ranks or asked for sharding, and got neither: accelerate says nothing then."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    alone = args.world_size == 1 or args.distributed_state.distributed_type == DistributedType.NO
    if "LOCAL_RANK" in os.environ and launched > 1 and alone:
        raise ValueError(
            f"{launched} processes were launched, and accelerate trains a model in each, apart from the others "
            f"(use_cpu={args.use_cpu}). On CPUs set use_cpu=True; on GPUs, see that each process has one; with DeepSpeed on CPUs "
            "set ddp_backend='gloo', and name its config in the accelerate file (`deepspeed_config_file`), not as `deepspeed`."
        )
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"FSDP was asked for and does not shard here ({args.distributed_state.distributed_type}, use_cpu={args.use_cpu}): "
            "accelerate leaves models on the CPU whole. Train on accelerators, or launch with an accelerate file without FSDP."
        )


def check_data(train_dataset: object) -> None:
    """Refuse data that is missing or empty."""
    # SFTTrainer looks at the first row as well; of an empty set, with a message of its own.
    if train_dataset is None:
        raise ValueError("train_dataset is missing: there is nothing to train on.")
    if isinstance(train_dataset, Dataset | IterableDataset) and next(iter(train_dataset), None) is None:
        raise ValueError("train_dataset is empty: there is nothing to train on.")


def load_config(model: str | PreTrainedModel | PeftModel, args: EMGuardConfig) -> PreTrainedConfig:
    """The model's config, without its weights."""
    if not isinstance(model, str):
        return model.config
    init_kwargs = args.model_init_kwargs or {}
    return AutoConfig.from_pretrained(
        model,
        revision=init_kwargs.get("revision"),
        trust_remote_code=init_kwargs.get("trust_remote_code", args.trust_remote_code),
    )


def check_own_loss(
    defenses: list[Defense],
    model: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    compute_loss_func: Callable | None,
) -> None:
    """Refuse what a loss of this package's own does not work with."""
    names = ",".join(defense.name for defense in defenses if defense.own_loss)
    if sum(isinstance(defense, ReferenceDefense) and defense.divergence is not None for defense in defenses) > 1:
        raise ValueError(f"defense={names!r}: only one defense can compare next-token distributions in a run.")
    if compute_loss_func is not None:
        raise ValueError(
            f"compute_loss_func does not work with defense={names!r}: it would replace the loss that the defense is part "
            "of. Leave it out."
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
                    f"peft_config: target_modules={targets if isinstance(targets, str) else sorted(targets)} puts an adapter on "
                    f"{head!r}, which SFTTrainer cannot train: leave it out, or name it in `modules_to_save`."
                )


def check_ref_model(
    ref_model: PreTrainedModel | str | None,
    model: str | PreTrainedModel | PeftModel,
    config: PreTrainedConfig,
    args: EMGuardConfig,
    terms: list[ReferenceDefense],
) -> None:
    """Refuse a reference that is the model itself, or that cannot be compared with it."""
    if ref_model is None:
        return
    if ref_model is model and not isinstance(model, str):
        raise ValueError(
            "ref_model is the model itself, so the defense would do nothing. Omit `ref_model` to have the reference made, "
            "or pass a model of its own."
        )
    other = load_config(ref_model, args).get_text_config()
    compared = {"vocab_size": "tokens in its vocabulary"}
    if any(term.divergence is None for term in terms):
        compared |= {"num_hidden_layers": "blocks", "hidden_size": "numbers in a state"}
    for name, what in compared.items():
        sizes = getattr(config, name), getattr(other, name)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"ref_model has {sizes[1]} {what} and the model {sizes[0]}: they cannot be compared. Pass a reference of the "
                "same family."
            )
