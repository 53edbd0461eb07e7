"""Adapters of a model: activate one or none, find trained weights that belong to no adapter, unwrap a PEFT model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel


# PEFT changes the base weights when it adds a LoRA adapter whose `init_lora_weights` begins with one of these words
# (`pissa_niter_16` does, for example).
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def bare_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the causal language model inside a PEFT wrapper, with its adapter layers; or the model if not wrapped."""
    return model.get_base_model() if is_peft_model(model) else model


def trained_outside_adapters(policy: PeftModel) -> list[str]:
    """Return the names of trained parameters that stay in the forward pass when all adapters are switched off.

    An adapter's parameters are recognised by their names, which contain the name of the adapter.
    """
    adapters = set(policy.peft_config)
    return [name for name, p in policy.named_parameters() if p.requires_grad and adapters.isdisjoint(name.split("."))]


def unsaved_weights(model: PreTrainedModel | PeftModel) -> list[str]:
    """Return the names of trained parameters that PEFT does not save with the model's active adapters."""
    outside = trained_outside_adapters(model) if is_peft_model(model) else []
    if not outside:
        return []
    # PEFT's own function is asked for the saved names, because they depend on the adapter's `bias` setting and on a
    # resized vocabulary.
    weights = model.state_dict()
    saved = {name for adapter in model.active_adapters for name in get_peft_model_state_dict(model, weights, adapter)}
    return [name for name in outside if name not in saved]


class AdapterSwitch:
    """Switch that makes one adapter of a model active, or none, inside a `with` block.

    Args:
        model: model with all its adapters; adapter layers that are added later are not switched.
    """

    def __init__(self, model: PeftModel):
        self.modules = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    @contextmanager
    def only(self, adapter: str | None) -> Iterator[None]:
        """Make `adapter` the only active adapter inside the block; with `None` no adapter is active."""
        # Only the fields that the forward reads are switched. PEFT's own `disable_adapter` and `set_adapter` also
        # switch `requires_grad`, which would train parameters that the user had frozen.
        before = [(m, m._disable_adapters, m._active_adapter) for m in self.modules]
        try:
            for module in self.modules:
                module._disable_adapters = adapter is None
                if adapter is not None:
                    module._active_adapter = [adapter]
            yield
        finally:
            for module, disabled, active in before:
                module._disable_adapters = disabled
                module._active_adapter = active
            # Autocast caches the low-precision copies that it makes of weights. If a training pass used a copy that a
            # `no_grad` pass made in this block, the copied weight would get no gradient. So the cache is cleared here.
            torch.clear_autocast_cache()


def changes_base(config: PeftConfig) -> bool:
    """Return True if an adapter's initialisation changes the base weights that carry the adapter."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(CHANGING_INITS)


def check_adapter_kind(name: str, config: PeftConfig) -> None:
    """Refuse an adapter that cannot be switched off, or that leaves the base weights changed when it is off."""
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter {name!r} is a learned prompt ({config.peft_type}): only adapters on weights can be switched."
        )
    if changes_base(config):
        init = getattr(config, "init_lora_weights", None)
        raise ValueError(
            f"adapter {name!r} was made with init_lora_weights={init!r}, which changes the base weights, so switching "
            "it off does not give the aligned model: convert it to plain LoRA "
            "(`path_initial_model_for_weight_conversion` of PEFT)."
        )
