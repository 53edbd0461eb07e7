"""Where the reference comes from: adapters off, a frozen `ref` adapter, or a frozen model of its own."""

import copy
import types
from contextlib import AbstractContextManager
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import fsdp2_prepare_model, is_peft_model
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..config import EMGuardConfig
from ..models import identity
from ..models.adapters import AdapterSwitch
from ..models.sharding import as_main_process, gathered


logger = get_logger(__name__)

REF_ADAPTER = "ref"


class AdapterReference:
    """The policy's own base weights, with other adapters: none, or a frozen copy of the one it started with.

    The pass runs inside the policy's forward, between [`swapped_in`]'s enter and exit.

    Args:
        model: the policy.
        adapter: name of the frozen adapter; `None` for the base model.
    """

    def __init__(self, model: PeftModel, adapter: str | None):
        self.adapter = adapter
        self.kind = "base model, adapters off" if adapter is None else f"frozen copy of the adapter ({adapter!r})"
        self._switch = AdapterSwitch(model)

    def swapped_in(self) -> AbstractContextManager[None]:
        return self._switch.only(self.adapter)


class ModelReference:
    """A frozen model of its own, run through its own prepared engine before the policy's forward.

    Attributes:
        model: the causal language model without wrappers.
        engine: what to call.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, accelerator: Accelerator, kind: str):
        self.kind = kind
        model.requires_grad_(False)
        model.eval()
        self.model = model.get_base_model() if is_peft_model(model) else model
        self._unprepared = model
        self._accelerator = accelerator
        self.engine = model

    def prepare(self, is_deepspeed: bool, is_fsdp: bool) -> None:
        """Place the model as the policy is placed. Call it after the forward was patched."""
        if is_deepspeed:
            self.engine = prepare_deepspeed(self._unprepared, self._accelerator)
        elif is_fsdp:
            # Block by block, as the policy. TRL's `prepare_fsdp` makes one unit of a model, which a pass gathers whole.
            self.engine = fsdp2_prepare_model(self._accelerator, self._unprepared)
        else:
            self.engine = self._accelerator.prepare_model(self._unprepared, evaluation_mode=True)

    def release(self) -> None:
        """Take apart what FSDP2 keeps whole until a backward pass, which this model never has: its head."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def move_backbone(self, device: torch.device | str) -> bool:
        """Take all but the head to a device: off the accelerator while every state is cached, and back.

        Returns:
            False where it stays: a model that the user passed, or one that is quantised or split over devices.
        """
        fixed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "hf_quantizer", None)
        if self.kind == GIVEN or fixed:
            return False
        self.model.base_model.to(device)
        return True


GIVEN = "separate model (ref_model)"


def make_reference(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | str | None,
    accelerator: Accelerator,
    args: EMGuardConfig,
) -> AdapterReference | ModelReference:
    """Choose and build the reference for a policy as it is given, before it has learned anything.

    | policy | reference |
    |---|---|
    | `ref_model` given | that model, frozen |
    | adapter whose output is zero (fresh LoRA, rsLoRA, DoRA, EVA) | the base model: adapters off |
    | any other adapter (pre-trained; PiSSA, OLoRA, LoftQ; not LoRA) | a frozen copy of the adapter, named `ref` |
    | adapter with trainable weights outside of it (`bias!="none"`, unfrozen layers) | a frozen copy of the whole model |
    | no adapter | a frozen copy; loaded again where it is sharded, or by `init_kwargs` |

    Raises:
        ValueError: the reference shares weights with the policy, or cannot be made; the message says what to pass instead.
    """
    init_kwargs = args.ref_model_init_kwargs
    if isinstance(ref_model, str):
        ref_model = _load(ref_model, policy, args)
    if ref_model is not None:
        _check_separate(policy, ref_model)
        return ModelReference(ref_model, accelerator, GIVEN)

    if is_peft_model(policy):
        if init_kwargs:
            logger.warning("`ref_model_init_kwargs` is ignored: the reference of an adapter is made of the policy.")
        outside = trainable_outside_adapters(policy)
        if outside:
            if is_deepspeed_zero3_enabled():
                raise ValueError(
                    f"the weight {outside[0]!r} is trained but belongs to no adapter, so switching adapters off does not "
                    "give the model back, and a model that is sharded by ZeRO-3 cannot be copied. Pass `ref_model`, or "
                    'train adapters alone (`bias="none"`).'
                )
            return ModelReference(_frozen_copy(policy), accelerator, "frozen copy of the model")
        if as_main_process(lambda: _adapter_is_zero(policy)):
            return AdapterReference(policy, None)
        return AdapterReference(policy, _add_ref_adapter(policy))

    if init_kwargs or is_deepspeed_zero3_enabled():
        path = get_config_model_id(policy.config)
        if not path:
            raise ValueError(
                "the reference has to be loaded again, since the model is sharded or `ref_model_init_kwargs` is given, "
                "but this model was not loaded from a path. Pass `ref_model`."
            )
        return ModelReference(_load(path, policy, args), accelerator, f"loaded again from {path}")
    return ModelReference(_frozen_copy(policy), accelerator, "frozen copy of the model")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability that a module keeps to 0: numbers, and adapters' dicts of numbers.

    Noise that is read from the model's config at run time stays; the trainer finds it by its distance at step 0.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" not in name and not (name == "p" and "Dropout" in type(module).__name__):
                continue
            if isinstance(value, float):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):
                value.update({key: 0.0 for key, number in value.items() if isinstance(number, float)})


def trainable_outside_adapters(policy: PeftModel) -> list[str]:
    """Trained parameters that stay in the forward pass when adapters are off. PEFT keys an adapter's by its name."""
    adapters = set(policy.peft_config)
    return [name for name, p in policy.named_parameters() if p.requires_grad and adapters.isdisjoint(name.split("."))]


def fingerprint(reference: AdapterReference | ModelReference, policy: nn.Module) -> str:
    """A hash of some numbers of every weight that the reference uses, to tell whether a resumed run has the same one.

    Called before an engine takes the model: FSDP2 has not sharded it yet, and what ZeRO-3 loaded in shards is gathered here weight
    by weight, on every rank.
    """
    if isinstance(reference, ModelReference):
        return identity.fingerprint(reference.model)
    return identity.fingerprint(policy, set(getattr(policy, "peft_config", {})) - {reference.adapter})


def _load(path: str, policy: PreTrainedModel | PeftModel, args: EMGuardConfig) -> PreTrainedModel:
    """A model in the policy's dtype, loaded as the policy was, under what `ref_model_init_kwargs` says."""
    given = args.model_init_kwargs or {}
    kwargs = {
        "dtype": policy.dtype,
        "attn_implementation": policy.config._attn_implementation,
        "device_map": None,
        "trust_remote_code": args.trust_remote_code,
        **{name: given[name] for name in ("revision", "trust_remote_code") if name in given},
    }
    kwargs |= cast(dict, args.ref_model_init_kwargs or {})  # a string of JSON is a dict by now
    return create_model_from_path(path, **kwargs)


def _frozen_copy(policy: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    # The policy's forward was patched on the instance, and the patch holds on to the policy: the copy starts anew.
    copied = copy.deepcopy(policy)
    (copied.get_base_model() if is_peft_model(copied) else copied).__dict__.pop("forward", None)
    return copied


def _check_separate(policy: PreTrainedModel | PeftModel, ref_model: PreTrainedModel) -> None:
    trained = {p.data_ptr() for p in policy.parameters() if p.requires_grad and p.numel()}
    if ref_model is policy or any(p.data_ptr() in trained for p in ref_model.parameters() if p.numel()):
        raise ValueError(
            "ref_model shares trained weights with the model, so it would move with it and the defense would do nothing. "
            "Omit `ref_model` to have the reference made, or pass a model of its own."
        )


def _adapter_is_zero(policy: PeftModel) -> bool:
    """Whether the active adapters leave the model as it is: LoRA whose B (of an embedding: A) is 0, and untouched copies."""
    zeros = []
    for layer in (m for m in policy.modules() if isinstance(m, BaseTunerLayer)):
        if isinstance(layer, TrainableTokensLayer):
            continue  # looked at below, in its wrapper
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
    for wrapper in (m for m in policy.modules() if isinstance(m, AuxiliaryTrainingWrapper)):
        for name in wrapper.active_adapters:
            if isinstance(wrapper, ModulesToSaveWrapper):
                if name in wrapper.modules_to_save and not _equal(
                    wrapper.modules_to_save[name], wrapper.original_module
                ):
                    return False
            elif not _tokens_untouched(wrapper.token_adapter, name):
                return False
    return True


def _equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    with gathered(*(p for pair in pairs for p in pair)):
        return all(torch.equal(p, q.to(p.dtype)) for p, q in pairs)


def _tokens_untouched(layer: TrainableTokensLayer, adapter: str) -> bool:
    """Whether PEFT's trainable tokens still are the rows of the embedding that they replace."""
    rows = layer.get_base_layer().weight[layer.token_indices[adapter]]
    return torch.equal(layer.trainable_tokens_delta[adapter].to(rows.dtype), rows)


def _add_ref_adapter(policy: PeftModel) -> str:
    active = policy.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active adapters ({', '.join(active)}): a frozen copy is made of one. Activate "
            "one, or pass `ref_model`."
        )
    if getattr(policy, "_emguard_ref", False):
        policy.delete_adapter(REF_ADAPTER)  # of an earlier trainer on the same model
    if REF_ADAPTER in policy.peft_config:
        raise ValueError(
            f"the model already has an adapter named {REF_ADAPTER!r}, the name that the frozen copy takes: rename it, or "
            "pass `ref_model`."
        )
    config = copy.deepcopy(policy.peft_config[active[0]])
    if hasattr(config, "init_lora_weights"):
        # The copy's weights are written below. A second PiSSA, OLoRA or LoftQ init would change the base weights again.
        config.init_lora_weights = True
    config.inference_mode = True
    # The data order must not depend on how many random numbers the copy's initialisation drew.
    with torch.random.fork_rng():
        policy.add_adapter(REF_ADAPTER, config)
    parameters = dict(policy.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if REF_ADAPTER not in parts:
            continue
        source = ".".join(active[0] if part == REF_ADAPTER else part for part in parts)
        if source not in parameters:
            raise ValueError(
                f"the weight {name!r} of the frozen adapter copy has no counterpart in the policy: this adapter type "
                f"({config.peft_type}) cannot be copied. Pass `ref_model`."
            )
        parameter.data = parameters[source].detach().clone()
        parameter.requires_grad_(False)

    # PEFT saves every adapter it holds: a checkpoint is the policy alone.
    policy.save_pretrained = types.MethodType(_save_policy, policy)
    policy._emguard_ref = True
    return REF_ADAPTER


def _save_policy(policy: PeftModel, *args, **kwargs):
    kwargs.setdefault("selected_adapters", [name for name in policy.peft_config if name != REF_ADAPTER])
    return type(policy).save_pretrained(policy, *args, **kwargs)
