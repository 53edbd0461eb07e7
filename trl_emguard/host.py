"""Helpers for the TRL trainer that `DefendedTrainer` is mixed into: its arguments, engine, refusals and callback."""

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

from .checks import AT_LOAD, Engine, is_reentrant
from .defenses import Defense, DefenseArguments


def read_arguments(
    init: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, str | PreTrainedModel | None, bool]:
    """Find config, model and adapter among the arguments of a trainer.

    Args:
        init: the trainer's `__init__`, bound. That of a team's own trainer may take `*args` and `**kwargs`.
        args, kwargs: arguments that it is given.

    Returns:
        The config; the model, or `None` if `init` does not name it or the adapter among its parameters; and whether
        an adapter is trained, which is known only beside a model.

    Raises:
        TypeError: there is no config with the options of defenses.
    """
    signature = inspect.signature(init)
    given = signature.bind(*args, **kwargs).arguments
    config = next((value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)), None)
    if not isinstance(config, DefenseArguments):
        raise TypeError(
            f"args is a {type(config).__name__}: give a config with the options of defenses, as `class MyConfig("
            "DefenseArguments, DPOConfig)`."
        )
    if not {"model", "peft_config"} <= signature.parameters.keys():
        return config, None, False
    model = given.get("model")
    return config, model, given.get("peft_config") is not None or isinstance(model, PeftModel)


def check_model(defenses: Sequence[Defense], has_adapter: bool, config: PreTrainedConfig) -> None:
    """Let each defense refuse the kind of fine-tuning (with an adapter or without) or the config of the text model."""
    for defense in defenses:
        defense.check_tuning(has_adapter)
        defense.check_model(config.get_text_config())


def fit_ddp(args: Any, config: PreTrainedConfig) -> None:
    """Let DDP look for unused weights of a vision-language model, unless the user has chosen.

    A defended run trains such a model on text alone, which leaves its vision tower without a gradient. DDP fails then,
    unless it looks for unused weights. TRL lets it look only if the trainer has the model's processor, and a defended
    run has the tokenizer. With reentrant checkpointing DDP fails if it looks, so the option stays as it is.
    """
    if hasattr(config, "vision_config") and args.ddp_find_unused_parameters is None and not is_reentrant(args):
        args.ddp_find_unused_parameters = True


def check_optimizer(optimizer: Optimizer | None, model: PreTrainedModel | PeftModel) -> None:
    """Refuse an optimizer that holds only frozen weights of a model, so that nothing would train.

    Args:
        optimizer: the optimizer that the user gave to the trainer, or `None`.
        model: the policy, with its adapter.

    Raises:
        ValueError: the optimizer was made before the adapter was added, for example.
    """
    if optimizer is None:
        return
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    # An optimizer that holds none of the model's own weights passes: it may hold copies of them, on the CPU.
    is_trained = [weight.requires_grad for weight in model.parameters() if id(weight) in held]
    if is_trained and not any(is_trained) and any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} holds {len(is_trained)} weights of the model, all frozen, so "
            "nothing would train. It was probably made before the adapter was added. Leave `optimizers` out (`optim` "
            "or `optimizer_cls_and_kwargs` chooses one), or add the adapter first, by `get_peft_model`, then make the "
            "optimizer, and leave `peft_config` out."
        )


def check_old_passes(trainer: type, args: Any) -> None:
    """Refuse a trainer whose loss compares likelihoods from a training pass with those from a `no_grad` pass.

    GRPO and RLOO divide the likelihood of a completion by that of an earlier policy, which they compute under
    `no_grad` before `compute_loss`. Defenses surround only passes that form a gradient, so the ratio would show the
    defense instead of the updates since, and its clipping would remove most of the gradient. Likewise KTO's loss
    `kto` subtracts a divergence of the plain policy from likelihoods of the defended one, and the penalty that GRPO
    adds with `beta` above 0 would train the policy to undo the defense's effect in the training pass.

    Raises:
        ValueError: the message names the setting and the fix.
    """
    bases = {base.__name__ for base in trainer.__mro__}
    if "RLOOTrainer" in bases:
        found, fix = "RLOOTrainer, which does so in every step", "Take GRPOTrainer"
    elif "KTOTrainer" in bases and args.loss_type == "kto":
        found, fix = "loss_type='kto'", "Set loss_type='apo_zero_unpaired', or take DPOTrainer"
    elif "GRPOTrainer" not in bases:
        return
    elif args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations):
        found = (
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}, which is no multiple of "
            f"steps_per_generation={args.steps_per_generation} times num_iterations={args.num_iterations}"
        )
        fix = "Set num_iterations=1 and leave steps_per_generation and generation_batch_size out"
    elif args.use_vllm and (args.vllm_importance_sampling_correction or args.off_policy_mask_threshold is not None):
        found = (
            f"use_vllm=True and vllm_importance_sampling_correction={args.vllm_importance_sampling_correction}, "
            f"off_policy_mask_threshold={args.off_policy_mask_threshold}"
        )
        fix = "Set vllm_importance_sampling_correction=False and leave off_policy_mask_threshold out"
    elif args.beta:
        found, fix = f"beta={args.beta}", "Set beta=0.0"
    else:
        return
    raise ValueError(
        f"defense={args.defense!r} does not work with {found}: the loss would compare the defended policy's "
        f"likelihoods with those of the plain one. {fix}, or choose another defense."
    )


class StepCallback(TrainerCallback):
    """Callback that tells a `DefendedTrainer` that training begins, an update is to be made, or a step has ended."""

    def __init__(self, trainer: Any):
        self.trainer = weakref.proxy(trainer)  # no cycle of references, so a dropped trainer is freed at once

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._note_update()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._end_step(control)
        return control


def engine_facts(trainer: Any) -> Engine:
    """Return the facts about the engine of a trainer, such as DeepSpeed or FSDP."""
    parallelism = trainer.accelerator.parallelism_config
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    engines = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        AT_LOAD: trainer.is_distributed_loading_by_transformers and (trainer.model.fsdp_size or 1) > 1,
        "tensor parallelism": trainer.get_tp_size() > 1,
    }
    return Engine(
        sharding=next((name for name, acts in engines.items() if acts), None),
        fsdp_version=getattr(fsdp, "fsdp_version", None),
        fsdp_checkpointing=bool(getattr(fsdp, "activation_checkpointing", False)),
        splits_sequences=parallelism is not None and bool(parallelism.cp_enabled or parallelism.sp_enabled),
        is_fp16=trainer.accelerator.mixed_precision == "fp16" or str(trainer.model.dtype) == "torch.float16",
    )
