"""KL divergence to a safe reference model (Kaczér et al., 2508.06249)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .base import IN_TRAINING_DEFENSES, Defense, ReferenceDefense
from .options import check_choice, check_coefficient, option


DIRECTIONS = ("reverse", "forward")
TOKENS = ("loss", "all", "interleaved")


@dataclass
class KLOptions:
    """Options of `kl`: divergence of next-token distributions from a safe reference."""

    kl_coef: float = option(
        0.1, "Weight of the KL divergence to the reference, in CE's own normalisation. 0 switches it off."
    )
    kl_direction: str = option(
        "reverse",
        "'reverse' for KL(policy ‖ reference), the paper's, or 'forward' for KL(reference ‖ policy).",
        DIRECTIONS,
    )
    kl_tokens: str = option(
        "loss",
        "Positions that the KL is taken over: 'loss' for those that predict a label, 'all' for those that predict any "
        "real token, the prompt's as well, 'interleaved' for those that predict a label of a mixed-in row.",
        TOKENS,
    )


class KL(ReferenceDefense):
    """Loss `L = CE + kl_coef · (1/N) Σ_t KL_t` over the full vocabulary at temperature 1.

    Reverse KL, the paper's, is KL(policy ‖ reference); forward is KL(reference ‖ policy). The paper's code averages
    over the non-pad tokens of each micro-batch, prompt included, and does not divide by the accumulation steps, so
    its 0.1 acts like 0.4 in its own recipe (batch 4 × accumulation 4); here N counts the whole step, and 0.1 is 0.1.
    """

    name = "kl"
    papers = (IN_TRAINING_DEFENSES,)
    Options = KLOptions
    switch = "kl_coef"

    def __init__(self, args: Any):
        self.coef = check_coefficient("kl_coef", args.kl_coef)
        self.divergence = args.kl_direction
        self.tokens = args.kl_tokens

    @classmethod
    def check_options(cls, args: Any) -> None:
        check_coefficient("kl_coef", args.kl_coef)
        check_choice("kl_direction", args.kl_direction, DIRECTIONS)
        check_choice("kl_tokens", args.kl_tokens, TOKENS)

    @classmethod
    def check_with(cls, args: Any, others: Sequence[type[Defense]]) -> None:
        marked = {scope for other in others for scope in other.scopes}
        if args.kl_tokens not in ("loss", "all", *marked):
            raise ValueError(
                f"defense={args.defense!r}: {cls.name} looks at mixed-in rows alone (kl_tokens='interleaved'), and "
                "nothing is mixed in: add 'interleave', 'interleave+' or 'interleave++'."
            )

    def options(self) -> dict[str, Any]:
        return {"kl_coef": self.coef, "kl_direction": self.divergence, "kl_tokens": self.tokens}
