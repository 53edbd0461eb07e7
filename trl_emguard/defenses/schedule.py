"""Coefficients of defenses: each is constant, follows a schedule from step to step, or is adapted by its defense.

Only one shipped defense adapts its coefficient: `kl` with `kl_target` calls `set_coefficient` at the end of a step.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback

from .options import check_number


ARROW = "->"
EXAMPLE = f"0.4{ARROW}0.05"


@dataclass(frozen=True)
class Schedule:
    """Linear course of a coefficient from the first step of a run to its last.

    Attributes:
        start: value in the first step.
        end: value in the last step.
    """

    start: float
    end: float

    @classmethod
    def parse(cls, text: str) -> "Schedule | None":
        """Return the schedule that a text such as `"0.4->0.05"` describes, or `None` if it describes none."""
        try:
            start, end = map(float, text.split(ARROW))
        except ValueError:
            return None
        is_course = all(math.isfinite(value) and value >= 0 for value in (start, end)) and max(start, end) > 0
        return cls(start, end) if is_course else None

    def at(self, step: int, steps: int) -> float:
        """Return the coefficient's value in step `step` (counted from 0) of a run that has `steps` steps.

        A run of one step has the start value. A run that resumes with a smaller `steps` may already be past its last
        step, and then has the end value.
        """
        passed = min(step / (steps - 1), 1.0) if steps > 1 else 0.0
        return (1 - passed) * self.start + passed * self.end

    def __str__(self) -> str:
        """Return the schedule as normalised text: '0.40 -> 0' and '0.4->0.0' give the same text."""
        return ARROW.join(repr(value).removesuffix(".0") for value in (self.start, self.end))


def check_coefficient(name: str, value: object) -> float | Schedule:
    """Check the value of a coefficient. Return it as a float, or as a [`Schedule`] if it is a text with "->".

    Raises:
        ValueError: `value` is neither a finite number ≥ 0 nor a schedule between two such numbers (not both 0). The
            message names the argument, the value and the fix.
    """
    if isinstance(value, str) and ARROW in value:
        schedule = Schedule.parse(value)
        if schedule is None:
            raise ValueError(
                f"{name}={value!r} is not a schedule: give two finite numbers, 0 or above and not both 0, as "
                f"'{EXAMPLE}'."
            )
        return schedule
    return check_number(name, value, f", or a schedule as '{EXAMPLE}'")


def coefficient(text: str) -> float | str:
    """Return an option's value as a number, or as the given text if that looks like a schedule (it has "->").

    Raises:
        ValueError: the text is neither.
        argparse.ArgumentTypeError: the text ends with "-", because a shell has read the ">" of a schedule as a
            redirection.
    """
    if text.strip().endswith("-"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number. A shell takes '>' for itself, so put a schedule in quotes: '{EXAMPLE}'"
        )
    return text if ARROW in text else float(text)


if TYPE_CHECKING:
    Coefficient = float | str
else:

    class Coefficient:
        """Type of an option that is a number or the text of a schedule; the value itself is a `float` or a `str`.

        The argument parser of transformers keeps only one type of `float | str`, and calls it with the text that the
        command line or a YAML file has. This class is one type, and its call gives what [`coefficient`] gives.
        """

        def __new__(cls, text: str) -> float | str:
            return coefficient(text)


class Weighted:
    """Mixin for defenses with a coefficient, which is constant, follows a schedule, or is adapted by the defense.

    Attributes:
        coef: value of the coefficient in the current step. During training only [`set_coefficient`] changes it.
        schedule: course of the coefficient; `None` if it follows no schedule.
    """

    switch: ClassVar[str] = ""

    coef: float = 1.0
    schedule: Schedule | None = None

    def weigh(self, value: object) -> None:
        """Set coefficient and schedule from the value of an option: a number, or the text of a schedule.

        The option is the one that the class attribute [`switch`] names.
        """
        checked = check_coefficient(self.switch, value)
        self.schedule = checked if isinstance(checked, Schedule) else None
        self.coef = checked.start if isinstance(checked, Schedule) else checked

    def set_coefficient(self, coef: float) -> None:
        """Set the coefficient that forward passes use from now on."""
        self.coef = coef

    @property
    def coefficient(self) -> float | str:
        """Coefficient as configured, for [`Defense.options`]: a number, or the text of a schedule."""
        return self.coef if self.schedule is None else str(self.schedule)

    @property
    def active(self) -> bool:
        return self.schedule is not None or self.coef != 0


class ScheduleCallback(TrainerCallback):
    """Callback that sets every scheduled coefficient before each step, and adds it to the step's logged metrics.

    Args:
        defenses: active defenses.
        metrics: the trainer's metrics to be logged: name → values.
    """

    def __init__(self, defenses: Sequence[Any], metrics: dict[str, list[float]]):
        self.defenses = defenses
        self.metrics = metrics

    def on_step_begin(self, args, state, control, **kwargs):
        for defense in self.defenses:
            # A resumed run may take the schedule from its checkpoint, after this callback was made. So
            # `defense.schedule` is read anew in every step.
            if isinstance(defense, Weighted) and defense.schedule is not None:
                defense.set_coefficient(defense.schedule.at(state.global_step, state.max_steps))
                self.metrics[defense.switch] = [defense.coef]
