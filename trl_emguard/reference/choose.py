"""Choice of the reference model: the policy with adapters off or with a frozen `ref` adapter, or a separate model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..models.adapters import trained_outside_adapters
from ..models.sharding import as_main_process
from .adapter import AdapterReference, adapter_is_zero, add_ref_adapter, frozen_copy
from .kinds import Kind, ModelReference, Reference


logger = get_logger(__name__)


def reference_kind(
    policy: PreTrainedModel | PeftModel, ref_model: PreTrainedModel | str | None, args: Any, is_sharded: bool
) -> Kind:
    """Choose the kind of reference for a policy, which must not have been trained yet in this run.

    | policy | reference |
    |---|---|
    | `ref_model` given | that model, frozen |
    | adapter with trained weights outside of it (`bias!="none"`, unfrozen layers) | a frozen copy of the whole model |
    | adapter whose output is zero (fresh LoRA, rsLoRA, DoRA, EVA) | the base model: adapters off |
    | any other adapter (pre-trained; PiSSA, OLoRA, LoftQ; not LoRA) | a frozen copy of the adapter, named `ref` |
    | no adapter, and the model is sharded or `ref_model_init_kwargs` is given | the same model, loaded again |
    | no adapter otherwise | a frozen copy of the model |

    Args:
        policy: the model to train. On the meta device an adapter counts as fresh, since its weights have no values.
        ref_model: the trainer's argument `ref_model`: a model, its path, or `None`.
        args: config with `ref_model_init_kwargs`.
        is_sharded: whether weights are loaded in shards (ZeRO-3).

    Raises:
        ValueError: no reference can be made. The message says which argument to pass.
    """
    if ref_model is not None:
        return Kind.GIVEN
    if not is_peft_model(policy):
        return Kind.LOADED_AGAIN if args.ref_model_init_kwargs or is_sharded else Kind.MODEL_COPY
    outside = trained_outside_adapters(policy)
    if outside and is_sharded:
        raise ValueError(
            f"the weight {outside[0]!r} is trained but belongs to no adapter, so switching adapters off does not give "
            "the model back, and a model that is sharded by ZeRO-3 cannot be copied. Pass `ref_model`, or train "
            "adapters "
            'alone (`bias="none"`).'
        )
    if outside:
        return Kind.MODEL_COPY
    return Kind.ADAPTERS_OFF if _changes_nothing(policy) else Kind.ADAPTER_COPY


def _changes_nothing(policy: PeftModel) -> bool:
    """Return whether the policy's adapters leave its outputs unchanged. Every rank must call this function."""
    is_meta = next(policy.parameters()).is_meta
    return is_meta or as_main_process(lambda: adapter_is_zero(policy))


def make_reference(
    policy: PreTrainedModel | PeftModel, ref_model: PreTrainedModel | str | None, accelerator: Accelerator, args: Any
) -> Reference:
    """Build the reference that [`reference_kind`] chooses.

    Raises:
        ValueError: the reference shares trained weights with the policy, has a vocabulary of another size, or cannot
            be made.
    """
    kind = reference_kind(policy, ref_model, args, is_deepspeed_zero3_enabled())
    if kind is Kind.GIVEN:
        given = ref_model
        if isinstance(ref_model, str):
            given = _load(ref_model, policy, args, is_own=False)
            revision = (args.model_init_kwargs or {}).get("revision")
            if revision not in (None, "main", (args.ref_model_init_kwargs or {}).get("revision")):
                logger.warning(
                    f"ref_model={ref_model!r} is not loaded at the model's revision {revision!r}: name its own by "
                    "ref_model_init_kwargs={'revision': …} if it is not the repository's main one."
                )
        assert given is not None
        _check_separate(policy, given)
        _check_vocabulary(policy, given)
        return ModelReference(given, accelerator, kind)
    if is_peft_model(policy) and args.ref_model_init_kwargs:
        logger.warning("`ref_model_init_kwargs` is ignored: the reference of an adapter is made of the policy.")
    if kind is Kind.ADAPTERS_OFF:
        return AdapterReference(policy, None)
    if kind is Kind.ADAPTER_COPY:
        return AdapterReference(policy, add_ref_adapter(policy))
    if kind is Kind.MODEL_COPY:
        unused = policy.peft_config if is_peft_model(policy) and _changes_nothing(policy) else ()
        return ModelReference(frozen_copy(policy), accelerator, kind, unused_adapters=unused)
    path = get_config_model_id(policy.config)
    if next(policy.parameters()).is_meta:
        # A model on the meta device means a dry run, which loads no weights. The policy is copied, not loaded again.
        return ModelReference(frozen_copy(policy), accelerator, kind, path)
    if not path:
        raise ValueError(
            "the reference has to be loaded again, since the model is sharded or `ref_model_init_kwargs` is given, "
            "but this model was not loaded from a path. Pass `ref_model`."
        )
    again = _load(path, policy, args, is_own=True)
    _check_vocabulary(policy, again)
    return ModelReference(again, accelerator, kind, path)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set dropout probabilities to 0 inside the context, in all modules that store them as attributes.

    Such an attribute is a number, or in adapters a dict of numbers. Noise that a module reads from the model's config
    at run time (dropout or router jitter) stays on. The trainer notices such noise in the first step, because policy
    and reference then differ ([`~trl_emguard.reference.agreement.check_agreement`]).
    """
    before: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" not in name and not (name == "p" and "Dropout" in type(module).__name__):
                continue
            if isinstance(value, float):
                before.append((module, name, value))
                setattr(module, name, 0.0)
            elif isinstance(value, dict):
                for key, number in value.items():
                    if isinstance(number, float):
                        before.append((value, key, number))
                        value[key] = 0.0
    try:
        yield
    finally:
        for holder, name, number in before:
            if isinstance(holder, dict):
                holder[name] = number
            else:
                setattr(holder, name, number)


def reference_options(args: Any, is_own: bool) -> dict[str, Any]:
    """Return the options of `from_pretrained` that a reference takes over from the policy, or that the user gives.

    Args:
        args: config of the trainer.
        is_own: True for the policy's own model, loaded again. A `ref_model` is another one, so the policy's `revision`
            is none of its own.
    """
    given = args.model_init_kwargs or {}
    shared = ("revision", "trust_remote_code") if is_own else ("trust_remote_code",)
    return {
        "trust_remote_code": args.trust_remote_code,
        **{name: given[name] for name in shared if name in given},
        **(args.ref_model_init_kwargs or {}),
    }


def _load(path: str, policy: PreTrainedModel | PeftModel, args: Any, is_own: bool) -> PreTrainedModel:
    """Load a model with the policy's dtype, attention implementation and [`reference_options`].

    No device map is used. `args.ref_model_init_kwargs` overrides all of these options.
    """
    kwargs = {
        "dtype": policy.dtype,
        "attn_implementation": policy.config._attn_implementation,
        "device_map": None,
        **reference_options(args, is_own),
    }
    return create_model_from_path(path, **kwargs)


def _check_vocabulary(policy: PreTrainedModel | PeftModel, reference: PreTrainedModel) -> None:
    """Refuse a reference whose vocabulary does not have the size of the policy's vocabulary.

    The sizes differ, for example, if tokens were added to the policy together with a chat template.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"ref_model has {sizes[1]} tokens in its vocabulary and the model {sizes[0]}, since new tokens were "
            "added to it (chat_template_path): resize the embeddings of `ref_model` in the same way, or save the "
            "model with the new tokens first."
        )


def _check_separate(policy: PreTrainedModel | PeftModel, ref_model: PreTrainedModel) -> None:
    trained = {p.data_ptr() for p in policy.parameters() if p.requires_grad and p.numel()}
    if ref_model is policy or any(p.data_ptr() in trained for p in ref_model.parameters() if p.numel()):
        raise ValueError(
            "ref_model shares trained weights with the model, so it would move with it and the defense would do "
            "nothing. Omit `ref_model` to have the reference made, or pass a model of its own."
        )
