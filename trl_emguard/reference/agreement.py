"""Check that policy and reference are the same model before the first update."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..defenses.base import ReferenceDefense
from .cached import CachedReference
from .kinds import Kind, Reference


def check_agreement(
    reference: Reference,
    defenses: Sequence[ReferenceDefense],
    sums: Mapping[str, float],
    policy: Any,
    is_bf16: bool,
) -> None:
    """Refuse a reference that is not the model which training starts from.

    In the first step with labels, policy and reference are the same model. So their states must be equal at every
    position that predicts a label, and every distance must be 0. A `ref_model` that the user gave may be a different
    model, so it is not checked.

    Args:
        reference: the run's reference.
        defenses: active reference defenses.
        sums: named sums of the first step with labels.
        policy: the policy.
        is_bf16: whether passes run in bf16.

    Raises:
        ValueError: states or distances differ by more than rounding explains.
    """
    if reference.kind is Kind.GIVEN:
        return
    cached = reference if isinstance(reference, CachedReference) else None
    dtypes = {policy.dtype, torch.bfloat16 if is_bf16 else torch.float32}
    if not reference.shares_weights:
        dtypes.add(reference.model.dtype)
    tolerance, rounding = (1e-5, 1e-5) if dtypes == {torch.float32} else (1e-2, 3e-2)
    hint = "" if cached is None else " Or the reference's states on disk are too coarse: set cache_reference=False."
    advice = (
        "it is not the model that training starts from, or the forward pass is noisy (dropout or router jitter in the "
        f"model's config). Pass `ref_model`, or set the noise to 0.{hint}"
    )
    difference = sums["start_difference"] / max(sums["start_positions"], 1)
    if not difference <= _allowed_difference(reference, policy, dtypes):
        raise ValueError(
            f"before the first update, the policy's states differ from those of the reference ({reference.text}) by "
            f"{difference:.2g} of their length, not 0: {advice}"
        )
    for term in defenses:
        mean = sums[f"{term.name}/value"] / max(sums[f"{term.name}/positions"], 1)
        allowed = tolerance
        if cached is not None and term.divergence is None:
            # Cached states round differently, since their pass had another batch. A distance may scale with them.
            allowed = max(tolerance, cached.distance_of_rounding(term, rounding))
        if not mean <= allowed:
            raise ValueError(
                f"before the first update, {term.name} to the reference ({reference.text}) is {mean:.3g} per token, "
                f"not 0: {advice}"
            )


def _allowed_difference(reference: Reference, policy: Any, dtypes: set[torch.dtype]) -> float:
    """Return the difference of states that rounding can explain; 0 on a CPU if both passes compute alike."""
    is_fp32 = dtypes == {torch.float32}
    configs = getattr(policy, "peft_config", {}).values()
    if any(getattr(config, "use_dora", False) for config in configs):
        # DoRA's magnitude is rounded, so the adapted model is not quite the base model.
        return 1e-4 if is_fp32 else 0.2
    is_compiled = any(isinstance(module, torch._dynamo.OptimizedModule) for module in policy.modules())
    if isinstance(reference, CachedReference) or is_compiled or len(dtypes - {torch.float32, torch.bfloat16}) > 0:
        return 1e-3 if is_fp32 else 0.1
    if not reference.shares_weights and reference.model.dtype != policy.dtype:
        return 0.1
    # The kernels of an accelerator may add up in another order from call to call.
    return 0.0 if policy.device.type == "cpu" else 1e-6 if is_fp32 else 4e-3
