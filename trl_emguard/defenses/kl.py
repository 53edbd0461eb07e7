"""KL divergence to a safe reference model (Kaczér et al., 2508.06249)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .base import IN_TRAINING_DEFENSES, Defense, ReferenceDefense
from .options import check_choice, option
from .schedule import EXAMPLE, Coefficient, Schedule, check_coefficient
from .step import Step


DIRECTIONS = ("reverse", "forward")
LOSS, ALL, INTERLEAVED = TOKENS = ("loss", "all", "interleaved")
# Default of `kl_coef` for each value of `kl_tokens`. The default for INTERLEAVED (KL on rows that another defense
# mixes in) was chosen from the runs in docs/kl.md.
COEFFICIENTS = {LOSS: 0.1, ALL: 0.1, INTERLEAVED: 0.4}
# Adaptation to `kl_target` (Ziegler et al., 1909.08593, section 2.2): each step multiplies `kl_coef` by
# 1 + GAIN · error. The error is KL / kl_target - 1, clipped to ±LARGEST_ERROR. KL is the step's mean over `kl_tokens`.
GAIN, LARGEST_ERROR = 0.1, 0.2
# Smallest and largest value that `kl_target` gives `kl_coef`, as a multiple of its start value. Without these limits,
# a KL that stays below `kl_target` would make `kl_coef` ever smaller, and the term's gradient too small for fp32. A KL
# that cannot fall to `kl_target` would make `kl_coef` ever larger, until training diverges.
LEAST, MOST = 0.01, 100.0


@dataclass
class KLOptions:
    """Options of `kl`: divergence of next-token distributions from a safe reference."""

    kl_coef: Coefficient | None = option(
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
    kl_target: float | None = option(
        None,
        "Budget of drift: `kl_coef` starts as given and adapts, so that the logged `kl` goes to this many nats a "
        "token.",
    )


class KL(ReferenceDefense):
    """Loss `L = CE + kl_coef · (1/N) Σ_t KL_t`, with KL_t at position t over the full vocabulary, at temperature 1.

    Reverse KL, as in the paper, is KL(policy ‖ reference); forward is KL(reference ‖ policy). The paper's code takes
    the mean over the non-pad tokens of each micro-batch, prompt included, and does not divide by the number of
    accumulation steps. So in the paper's recipe (batch 4 × accumulation 4) a coefficient of 0.1 acts like 0.4
    with `kl_tokens="all"` here. N counts the positions of `kl_tokens` in the whole step, so a coefficient means the
    same with any number of accumulation steps.

    If another defense mixes rows in, the KL is by default taken over the mixed-in rows alone, which leaves the policy
    free to change on the task's own rows (Azarbal et al., 2025). The reference then runs on the mixed-in rows alone.

    With `kl_target`, the coefficient β (`kl_coef`) adapts from step to step (Ziegler et al., 1909.08593, section 2.2):
    β_{t+1} = β_t (1 + 0.1 · clip(KL_t / target − 1, −0.2, 0.2)). Here KL_t is the mean over `kl_tokens` in step t. β
    stays between a hundredth and a hundred times its start.
    """

    name = "kl"
    papers = (IN_TRAINING_DEFENSES,)
    Options = KLOptions
    switch = "kl_coef"
    running_metrics = ("kl_coef",)

    def __init__(self, args: Any):
        self.target = args.kl_target
        self._given_coef, self._given_tokens = args.kl_coef, args.kl_tokens
        self.divergence = args.kl_direction
        self._choose(args.kl_tokens or LOSS)

    def _choose(self, tokens: str, coef: float | str | None = None) -> None:
        """Set `tokens`; set the coefficient to the config's value, else `coef`, else the default for `tokens`."""
        self.tokens = tokens
        given = coef if self._given_coef is None else self._given_coef
        self.weigh(COEFFICIENTS[tokens] if given is None else given)
        self._start = self.coef

    def meet(self, others: Sequence[Defense]) -> None:
        if self._given_tokens is None and any(INTERLEAVED in other.scopes for other in others):
            self._choose(INTERLEAVED)

    @classmethod
    def check_options(cls, args: Any) -> None:
        if args.kl_coef is not None:
            check_coefficient("kl_coef", args.kl_coef)
        check_target(args.kl_target, args.kl_coef)
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

    # ---- adaptation of the coefficient to `kl_target` ----

    @property
    def coefficient(self) -> float | str:
        return super().coefficient if self.target is None else self._start

    def end_step(self, step: Step) -> dict[str, float]:
        metrics = super().end_step(step)
        if self.target is None:
            return metrics
        used = {"kl_coef": self.coef}
        if self.name in metrics:  # a step without positions of `kl_tokens` has no KL, so the coefficient stays
            error = min(max(metrics[self.name] / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
            coef = self.coef * (1 + GAIN * error)
            self.set_coefficient(min(max(coef, self._start * LEAST), self._start * MOST))
        return metrics | used

    def begin(self, evidence: dict[str, Any]) -> None:
        super().begin(evidence)
        if self.target is not None:
            coef = evidence.get("kl_coef", self._start)
            # A resumed run gets `coef` from the checkpoint's file `defense.json`, which may be damaged.
            check_coefficient("kl_coef", coef)
            self.set_coefficient(float(coef))

    def evidence(self) -> dict[str, Any]:
        return super().evidence() | ({} if self.target is None else {"kl_coef": self.coef})

    # ---- options of the run, and those saved in a checkpoint ----

    def options(self) -> dict[str, Any]:
        options = {"kl_coef": self.coefficient, "kl_direction": self.divergence, "kl_tokens": self.tokens}
        options |= {} if self.target is None else {"kl_target": self.target}
        return {**options, "kl_mean_over": self.mean_over or self.tokens} if self.tokens == INTERLEAVED else options

    def options_like(self, then: dict[str, Any], is_on_all_ranks: bool) -> dict[str, Any]:
        coef = then.get("kl_coef") if self._given_coef is None else self.coefficient
        tokens = then.get("kl_tokens") if self._given_tokens is None else self.tokens
        # A damaged checkpoint may give no valid `kl_tokens`. This run's own value is returned then.
        tokens = tokens if tokens in TOKENS else self.tokens
        options = {"kl_coef": coef, "kl_direction": self.divergence, "kl_tokens": tokens}
        options |= {} if self.target is None else {"kl_target": self.target}
        # `kl_mean_over` names the positions whose number N divides the sum of the KL. No option sets it: a resumed run
        # takes it from the checkpoint (`continue_from`). If the checkpoint has a value, it is therefore returned as
        # this run's value too. Only checkpoints with `kl_tokens` 'interleaved' have one. Checkpoints of an earlier
        # version, which took the mean over all labels, have none.
        return {**options, "kl_mean_over": then["kl_mean_over"]} if then.get("kl_mean_over") in TOKENS else options

    def continue_from(self, options: dict[str, Any]) -> None:
        self._choose(options["kl_tokens"], options["kl_coef"])
        self.mean_over = options.get("kl_mean_over", LOSS if self.tokens == INTERLEAVED else None)


def check_target(target: Any, coef: Any) -> None:
    """Refuse a `kl_target` that is not a positive number, and a `kl_coef` that cannot adapt to a target.

    Raises:
        ValueError: the target is no positive number, or the coefficient is 0 or a schedule. The message names the
            argument, its value and the fix.
    """
    if target is None:
        return
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < math.inf:
        raise ValueError(f"kl_target={target!r} is no budget: give nats a token above 0, or leave it out.")
    if coef is not None and (coef == 0 or isinstance(check_coefficient("kl_coef", coef), Schedule)):
        raise ValueError(
            f"kl_target={target} adapts the coefficient, and kl_coef={coef!r} cannot follow it: give a number above 0 "
            "to start with, or leave kl_target out."
        )
