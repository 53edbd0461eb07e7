"""Agreement of policy and reference before the first update."""

from collections.abc import Mapping, Sequence

import torch

from ..defenses.base import ReferenceDefense
from .cached import CachedReference
from .kinds import Kind, Reference


def check_agreement(
    reference: Reference,
    defenses: Sequence[ReferenceDefense],
    sums: Mapping[str, float],
    dtype: torch.dtype,
    is_bf16: bool,
) -> None:
    """Refuse a reference that is not the model which training starts from: every distance must be 0 in the first step.

    A model that the user passed may be another one, and is not checked.

    Args:
        reference: the run's reference.
        defenses: reference defenses that act.
        sums: sums of the first step.
        dtype: dtype of the policy.
        is_bf16: whether passes run in bf16.

    Raises:
        ValueError: a distance is above what rounding explains.
    """
    if reference.kind is Kind.GIVEN:
        return
    dtypes = {dtype, torch.bfloat16 if is_bf16 else torch.float32}
    if not reference.shares_weights:
        dtypes.add(reference.model.dtype)
    cached = reference if isinstance(reference, CachedReference) else None
    tolerance, rounding = (1e-5, 1e-5) if dtypes == {torch.float32} else (1e-2, 3e-2)
    hint = "" if cached is None else " Or the reference's states on disk are too coarse: set cache_reference=False."
    for term in defenses:
        mean = sums[f"{term.name}/value"] / max(sums[f"{term.name}/positions"], 1)
        allowed = tolerance
        if cached is not None and term.divergence is None:
            # Cached states come from a pass over another batch, and a distance may be in the states' own units.
            allowed = max(tolerance, cached.distance_of_rounding(term, rounding))
        if not mean <= allowed:
            raise ValueError(
                f"before the first update, {term.name} to the reference ({reference.text}) is {mean:.3g} per token, not "
                "0: it is not the model that training starts from, or the forward pass is noisy (dropout or router "
                f"jitter in the model's config). Pass `ref_model`, or set the noise to 0.{hint}"
            )
