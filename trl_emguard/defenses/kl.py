"""KL divergence to a safe reference model (Kaczér et al., 2508.06249)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .base import IN_TRAINING_DEFENSES, Defense, ReferenceDefense
from .options import check_choice, option
from .schedule import EXAMPLE, check_coefficient


DIRECTIONS = ("reverse", "forward")
LOSS, ALL, INTERLEAVED = TOKENS = ("loss", "all", "interleaved")
# Defaults by scope. That on mixed-in rows comes from the testbed of a spreading trait (docs/kl.md).
COEFFICIENTS = {LOSS: 0.1, ALL: 0.1, INTERLEAVED: 0.4}


@dataclass
class KLOptions:
    """Options of `kl`: divergence of next-token distributions from a safe reference."""

    # None stands second: the argument parser of transformers takes the first type then, and texts otherwise.
    kl_coef: float | None | str = option(  # noqa: RUF036
        None,
        "Weight of the KL divergence to the reference, a mean over the positions of `kl_tokens`. 0 switches it off. "
        f"By default {COEFFICIENTS[LOSS]}, and {COEFFICIENTS[INTERLEAVED]} where `kl_tokens` is 'interleaved'. "
        f"'{EXAMPLE}' changes it linearly over the run, as it does every `…_coef`.",
    )
    kl_direction: str = option(
        "reverse",
        "'reverse' for KL(policy ‖ reference), the paper's, or 'forward' for KL(reference ‖ policy).",
        DIRECTIONS,
    )
    kl_tokens: str | None = option(
        None,
        "Positions that the KL is taken over: 'loss' for those that predict a label, 'all' for those that predict any "
        "real token, the prompt's as well, 'interleaved' for those that predict a label of a mixed-in row. By default "
        "'interleaved' where rows are mixed in, and 'loss' otherwise.",
        TOKENS,
    )


class KL(ReferenceDefense):
    """Loss `L = CE + kl_coef · (1/N) Σ_t KL_t` over the full vocabulary at temperature 1.

    Reverse KL, the paper's, is KL(policy ‖ reference); forward is KL(reference ‖ policy). The paper's code averages
    over the non-pad tokens of each micro-batch, prompt included, and does not divide by the accumulation steps, so
    its 0.1 acts like 0.4 in its own recipe (batch 4 × accumulation 4); here N counts the positions of `kl_tokens` in
    the whole step, and 0.1 is 0.1. Where rows are mixed in, the KL is taken over those alone by default, which leaves
    the task's own rows free (Azarbal et al., 2025), and the reference runs on them alone.
    """

    name = "kl"
    papers = (IN_TRAINING_DEFENSES,)
    Options = KLOptions
    switch = "kl_coef"

    def __init__(self, args: Any):
        self._given_coef, self._given_tokens = args.kl_coef, args.kl_tokens
        self.divergence = args.kl_direction
        self._choose(args.kl_tokens or LOSS)

    def _choose(self, tokens: str, coef: float | str | None = None) -> None:
        """Set the positions, and the coefficient to the one given, this one, or the positions' own."""
        self.tokens = tokens
        given = coef if self._given_coef is None else self._given_coef
        self.weigh(COEFFICIENTS[tokens] if given is None else given)

    def meet(self, others: Sequence[Defense]) -> None:
        if self._given_tokens is None and any(INTERLEAVED in other.scopes for other in others):
            self._choose(INTERLEAVED)

    @classmethod
    def check_options(cls, args: Any) -> None:
        if args.kl_coef is not None:
            check_coefficient("kl_coef", args.kl_coef)
        check_choice("kl_direction", args.kl_direction, DIRECTIONS)
        if args.kl_tokens is not None:
            check_choice("kl_tokens", args.kl_tokens, TOKENS)

    @classmethod
    def check_with(cls, args: Any, others: Sequence[type[Defense]]) -> None:
        marked = {scope for other in others for scope in other.scopes}
        if args.kl_tokens not in (None, LOSS, ALL, *marked):
            raise ValueError(
                f"defense={args.defense!r}: {cls.name} looks at mixed-in rows alone (kl_tokens='interleaved'), and "
                "nothing is mixed in: add 'interleave', 'interleave+' or 'interleave++'."
            )

    # ---- options, and those of a checkpoint ----

    def options(self) -> dict[str, Any]:
        options = {"kl_coef": self.coefficient, "kl_direction": self.divergence, "kl_tokens": self.tokens}
        return {**options, "kl_mean_over": self.mean_over or self.tokens} if self.tokens == INTERLEAVED else options

    def options_like(self, then: dict[str, Any], is_on_all_ranks: bool) -> dict[str, Any]:
        coef = then.get("kl_coef") if self._given_coef is None else self.coefficient
        tokens = then.get("kl_tokens") if self._given_tokens is None else self.tokens
        tokens = tokens if tokens in TOKENS else self.tokens  # the file may be damaged
        options = {"kl_coef": coef, "kl_direction": self.divergence, "kl_tokens": tokens}
        # Checkpoints of version 0.1 have a mean over all labels, and do not say so.
        return {**options, "kl_mean_over": then["kl_mean_over"]} if then.get("kl_mean_over") in TOKENS else options

    def continue_from(self, options: dict[str, Any]) -> None:
        self._choose(options["kl_tokens"], options["kl_coef"])
        self.mean_over = options.get("kl_mean_over", LOSS if self.tokens == INTERLEAVED else None)
