"""Reference models on the policy's base weights: with all adapters off, or with a frozen copy of the adapter."""

import copy
import types
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..guard.forward import ReferenceGuard, States, rows_with
from ..models.adapters import AdapterSwitch, bare_model
from ..models.batches import eval_mode
from ..models.head import output_head
from ..models.identity import fingerprint
from ..models.sharding import gathered
from .kinds import Kind, Reference


REF_ADAPTER = "ref"


class AdapterReference(Reference):
    """Reference that runs on the policy's base weights, without adapters or with a frozen copy of its adapter.

    During training it has no call of its own: it runs inside a call of the policy's patched `forward`.

    Args:
        policy: model with all its adapters.
        adapter: name of the frozen adapter that the reference runs with; `None` for the base model.
    """

    def __init__(self, policy: PeftModel, adapter: str | None):
        self.adapter = adapter
        self.kind = Kind.ADAPTERS_OFF if adapter is None else Kind.ADAPTER_COPY
        self.model = policy.get_base_model()
        self.unused_adapters = frozenset(policy.peft_config) - {adapter}
        self._policy = policy
        self.switch = AdapterSwitch(policy)

    def inside(
        self, model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int]
    ) -> States:
        if not self.runs_whole_batches:
            inputs, positions = rows_with(inputs, positions)
        with self.switch.only(self.adapter), torch.no_grad():
            return ReferenceGuard(positions, layers)(model, model.forward, inputs)

    def put_back(self) -> None:
        if self.adapter is not None:
            remove_ref_adapter(self._policy, self.adapter)

    def fingerprint(self, policy: nn.Module) -> str:
        return fingerprint(policy, self.unused_adapters)

    def run(
        self, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int], accelerator: Accelerator
    ) -> States:
        with eval_mode(self.model), accelerator.autocast():
            return self.inside(self.model, dict(inputs), positions, layers)

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self.switch.only(self.adapter):
            return output_head(self.model)


def adapter_is_zero(policy: PeftModel) -> bool:
    """Return whether the active adapters leave the model's outputs unchanged.

    They do if every LoRA's matrix B is 0 (A for an embedding), and every trained copy of a module or of token
    embeddings equals the original. Layers of any other adapter type (also AdaLoRA) count as changing.
    """
    zeros: list[torch.Tensor] = []
    for layer in (m for m in policy.modules() if isinstance(m, BaseTunerLayer)):
        if isinstance(layer, TrainableTokensLayer):
            # An adapter of PEFT's type TrainableTokens puts this layer into the model without a wrapper, so the layer
            # is checked here. LoRA can train tokens too, and puts a wrapper around the embedding layer for this.
            # Wrappers are checked below.
            if not all(_tokens_untouched(layer, name) for name in layer.active_adapters):
                return False
            continue
        if not isinstance(layer, LoraLayer) or isinstance(layer, AdaLoraLayer):
            return False
        for name in layer.active_adapters:
            if name in layer.lora_B:
                zeros += layer.lora_B[name].parameters()
            if name in layer.lora_embedding_A:
                zeros.append(layer.lora_embedding_A[name])
    with gathered(*zeros):
        if any(bool(weight.detach().any()) for weight in zeros):
            return False
    wrappers = [m for m in policy.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    return all(_is_untouched(wrapper, name) for wrapper in wrappers for name in wrapper.active_adapters)


def _is_untouched(wrapper: AuxiliaryTrainingWrapper, adapter: str) -> bool:
    """Return whether the copy of a module, or the token embeddings, that a wrapper trains still equal the original."""
    if not isinstance(wrapper, ModulesToSaveWrapper):
        return _tokens_untouched(wrapper.token_adapter, adapter)
    if adapter not in wrapper.modules_to_save:
        return True
    copied, original = wrapper.modules_to_save[adapter].parameters(), wrapper.original_module.parameters()
    pairs = list(zip(copied, original, strict=True))
    with gathered(*(p for pair in pairs for p in pair)):
        return all(torch.equal(p, q.to(p.dtype)) for p, q in pairs)


def _tokens_untouched(layer: TrainableTokensLayer, adapter: str) -> bool:
    if adapter not in layer.token_indices:
        return True
    rows = layer.get_base_layer().weight[layer.token_indices[adapter]]
    return torch.equal(layer.trainable_tokens_delta[adapter].to(rows.dtype), rows)


def add_ref_adapter(policy: PeftModel) -> str:
    """Add a frozen copy of the active adapter to the policy, and return the copy's name.

    Checkpoints do not contain the copy: the policy's `save_pretrained` is patched to leave the copy out, until
    [`remove_ref_adapter`] removes the patch.

    Raises:
        ValueError: the number of active adapters is not 1, the user has an adapter named `ref`, or this type of
            adapter cannot be copied.
    """
    active = policy.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active adapters ({', '.join(active)}): a frozen copy is made of one. "
            "Activate one, or pass `ref_model`."
        )
    ours = vars(policy).setdefault("_emguard_refs", set())
    if REF_ADAPTER in policy.peft_config and REF_ADAPTER not in ours:
        raise ValueError(
            f"the model already has an adapter named {REF_ADAPTER!r}, the name that the frozen copy takes: rename it, "
            "or pass `ref_model`."
        )
    # Another trainer on the same model may still use the copy that it added, so this copy gets a new name.
    taken = (REF_ADAPTER if i == 1 else f"{REF_ADAPTER}_{i}" for i in count(1))
    own = next(name for name in taken if name not in policy.peft_config)
    config = copy.deepcopy(policy.peft_config[active[0]])
    if hasattr(config, "init_lora_weights"):
        # A second PiSSA, OLoRA or LoftQ initialisation would change the base weights again. It is not needed, because
        # the copy's weights are set below.
        config.init_lora_weights = True
    config.inference_mode = True
    # The data order must not depend on how many random numbers the copy's initialisation drew.
    with torch.random.fork_rng():
        policy.add_adapter(own, config)
    parameters = dict(policy.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if own not in parts:
            continue
        source = ".".join(active[0] if part == own else part for part in parts)
        if source not in parameters:
            raise ValueError(
                f"the weight {name!r} of the frozen adapter copy has no counterpart in the policy: this adapter type "
                f"({config.peft_type}) cannot be copied. Pass `ref_model`."
            )
        parameter.data = parameters[source].detach().clone()
        parameter.requires_grad_(False)

    # PEFT would save the copy too, but a checkpoint must contain the policy alone.
    policy.save_pretrained = types.MethodType(_save_policy, policy)
    ours.add(own)
    return own


def remove_ref_adapter(policy: PeftModel, name: str) -> None:
    """Remove a frozen adapter copy from a model; with the last copy, also remove the patch of `save_pretrained`."""
    ours = vars(policy).get("_emguard_refs", set())
    if name in ours:
        policy.delete_adapter(name)
        ours.discard(name)
    if not ours:
        vars(policy).pop("save_pretrained", None)


def _save_policy(policy: PeftModel, *args: Any, **kwargs: Any) -> Any:
    kwargs.setdefault("selected_adapters", [name for name in policy.peft_config if name not in policy._emguard_refs])
    return type(policy).save_pretrained(policy, *args, **kwargs)


def frozen_copy(policy: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Return a deep copy of a model. The copy's `forward` is not patched, even if the model's `forward` is."""
    copied = copy.deepcopy(policy)
    # The patched `forward` is copied too and would still run the policy, so the copy loses the patch.
    bare_model(copied).__dict__.pop("forward", None)
    return copied
