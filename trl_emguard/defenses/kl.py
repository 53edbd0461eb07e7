"""KL divergence to a safe reference model (Kaczér et al., 2508.06249)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import IN_TRAINING_DEFENSES, ReferenceDefense, check_choice, check_coefficient


if TYPE_CHECKING:
    from ..config import EMGuardConfig


class KL(ReferenceDefense):
    """`L = CE + kl_coef · (1/N) Σ_t KL_t` over the full vocabulary at temperature 1.

    Reverse KL, the paper's, is KL(policy ‖ reference); forward is KL(reference ‖ policy). The paper's code averages over
    the non-pad tokens of each micro-batch, prompt included, and does not divide by the accumulation steps, so its 0.1
    acts like 0.4 in its own recipe (batch 4 × accumulation 4); here N counts the whole step, and 0.1 is 0.1.
    """

    name = "kl"
    papers = (IN_TRAINING_DEFENSES,)

    def __init__(self, args: EMGuardConfig):
        self.coef = check_coefficient("kl_coef", args.kl_coef)
        self.divergence = check_choice("kl_direction", args.kl_direction, ("reverse", "forward"))
        self.tokens = check_choice("kl_tokens", args.kl_tokens, ("loss", "all", "interleaved"))

    def options(self) -> dict[str, Any]:
        return {"kl_coef": self.coef, "kl_direction": self.divergence, "kl_tokens": self.tokens}
