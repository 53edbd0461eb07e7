"""Check that policy and reference are the same model before the first update."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from ..defenses.base import ReferenceDefense
from .cached import CachedReference
from .kinds import Kind, Reference


def check_agreement(
    reference: Reference,
    defenses: Sequence[ReferenceDefense],
    sums: Mapping[str, float],
    policy: Any,
    args: TrainingArguments,
) -> None:
    """Refuse a reference that is not the model which training starts from.

    Policy and reference are the same model in the first step with labels. So their hidden states must be equal at
    every position that predicts a label, and each defense must find a distance of 0 between them. A `ref_model` that
    the user gave may be a different model, so it is not checked.

    Args:
        reference: the run's reference.
        defenses: active defenses that compare the policy with the reference.
        sums: name → sum over the first step with labels. The check uses the sums of each defense's distances and of
            the states' relative differences, and the numbers of positions.
        policy: the model that is trained.
        args: the run's arguments. They say whether forward passes run in bf16, and are compiled or patched.

    Raises:
        ValueError: the states differ, or a distance is above 0, by more than rounding explains.
    """
    if reference.kind is Kind.GIVEN:
        return
    cached = reference if isinstance(reference, CachedReference) else None
    dtypes = {policy.dtype, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32}
    if not reference.shares_weights:
        dtypes.add(reference.model.dtype)
    tolerance, rounding = (1e-5, 1e-5) if dtypes == {torch.float32} else (1e-2, 3e-2)
    hint = "" if cached is None else " Or the reference's states on disk are too coarse: set cache_reference=False."
    advice = (
        "it is not the model that training starts from, or the forward pass is noisy (dropout or router jitter in the "
        f"model's config). Pass `ref_model`, or set the noise to 0.{hint}"
    )
    difference = sums["start_difference"] / max(sums["start_positions"], 1)
    if not difference <= _allowed_difference(reference, policy, dtypes, args):
        raise ValueError(
            f"before the first update, the policy's states differ from those of the reference ({reference.text}) by "
            f"{difference:.2g} of their length, not 0: {advice}"
        )
    if _has_other_kernels(reference, policy, args):
        return  # different rounding makes the distances differ from 0; the states were already compared above
    for term in defenses:
        mean = sums[f"{term.name}/value"] / max(sums[f"{term.name}/positions"], 1)
        allowed = tolerance
        if cached is not None and term.divergence is None:
            # A defense without a `divergence` compares block outputs. Cached outputs were computed in other batches
            # than the policy's, so the two are rounded differently. The distance that this causes may grow with the
            # norm of the outputs, so the limit for the distance is computed from a sample of the cached outputs.
            allowed = max(tolerance, cached.distance_of_rounding(term, rounding))
        if not mean <= allowed:
            raise ValueError(
                f"before the first update, {term.name} to the reference ({reference.text}) is {mean:.3g} per token, "
                f"not 0: {advice}"
            )


def _allowed_difference(reference: Reference, policy: Any, dtypes: set[torch.dtype], args: TrainingArguments) -> float:
    """Return the largest relative difference between states of policy and reference that rounding can explain.

    On a CPU it is 0 if policy and reference compute in the same way: no DoRA, no cached states, no compiled module, no
    kernels of Liger in the policy alone, and both in the same dtype, fp32 or bf16.
    """
    is_fp32 = dtypes == {torch.float32}
    configs = getattr(policy, "peft_config", {}).values()
    if any(getattr(config, "use_dora", False) for config in configs):
        # DoRA's stored magnitudes are rounded, so a model with a fresh DoRA adapter is not exactly the base model.
        return 1e-4 if is_fp32 else 0.2
    is_recomputed = isinstance(reference, CachedReference) or _has_other_kernels(reference, policy, args)
    if is_recomputed or len(dtypes - {torch.float32, torch.bfloat16}) > 0:
        return 1e-3 if is_fp32 else 0.1
    if not reference.shares_weights and reference.model.dtype != policy.dtype:
        return 0.1
    # Kernels of an accelerator may add numbers up in another order from call to call, which changes the rounding.
    return 0.0 if policy.device.type == "cpu" else 1e-6 if is_fp32 else 4e-3


def _has_other_kernels(reference: Reference, policy: Any, args: TrainingArguments) -> bool:
    """Return True if policy and reference may compute with different kernels, which round differently."""
    # A compiled module inside the policy is one that the user has compiled. The argument `torch_compile` is read too,
    # because Trainer then puts a compiled wrapper around the policy, and no module inside the policy shows this.
    is_compiled = any(isinstance(module, torch._dynamo.OptimizedModule) for module in policy.modules())
    # When training begins, Trainer patches the policy with Liger's kernels, but not a reference that is another model.
    return args.torch_compile or is_compiled or (args.use_liger_kernel and not reference.shares_weights)
