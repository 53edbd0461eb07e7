"""A defense proves that it acts: what is counted, when it is judged, and `defense.json`."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .io.files import written_whole
from .io.strict import parse_json


DEFENSE_FILE = "defense.json"

# Steps with positions in scope, after the policy has moved, that a term may spend without any gradient. One step can be
# too small to show: in bf16 its change may vanish in the rounding of the states.
PATIENCE = 3


class InactiveDefenseError(RuntimeError):
    """The run is not defended.

    A term formed no gradient although the policy had moved, or rows to mix in did not come (then the model was saved); a steering
    hook did not fire or changed nothing; or an inoculation prompt changed no row (then training had not begun).
    """


@dataclass
class Evidence:
    """What one term has shown so far, summed over micro-batches and ranks.

    Attributes:
        value: Σ of the distance over positions.
        positions: positions in scope.
        gradient: Σ |∂ weighted term / ∂ what it compares| (logits, or block outputs). Above 0 once the term has taught
            anything.
        requires_grad: micro-batches in which the policy's states required grad at all.
        judged_steps: steps with positions in scope after the policy had moved.
        idle_steps: how many of them, up to now and without a break, formed no gradient.
    """

    value: float = 0.0
    positions: float = 0.0
    gradient: float = 0.0
    requires_grad: float = 0.0
    judged_steps: int = 0
    idle_steps: int = 0

    @property
    def acted(self) -> bool:
        return self.gradient > 0 and self.requires_grad > 0

    def cause(self) -> str:
        """The likely reason for a gradient of exactly zero."""
        if self.requires_grad == 0:
            return "no trainable weight reaches the states that it compares (frozen layers)"
        if self.value == 0:
            return (
                "the policy's states equal the reference's: the reference is the policy, or no trainable weight lies below "
                "the layers that it compares (frozen layers)"
            )
        return (
            "its value does not depend on the policy's states (detached graph), or the reference has become the policy"
        )


class EvidenceLedger:
    """Counts the evidence of each term and judges it.

    Args:
        names: the active terms.
    """

    def __init__(self, names: Sequence[str]):
        self.terms = {name: Evidence() for name in names}
        self.moved = False

    def end_step(self, step: dict[str, dict[str, float]], learning_rate: float, label_tokens: float) -> None:
        """Take in a step's sums over all micro-batches and ranks, which every rank passes alike.

        Args:
            step: per term, the step's `value`, `positions`, `evidence` and `requires_grad`.
            learning_rate: of the update that was made, as a share of the peak rate; 0 where the update was skipped. The
                policy has moved once a step with labels made an update at a tenth of the peak rate or more: the first
                steps of a long warm-up are too small to show in bf16.
            label_tokens: of the step.
        """
        for name, sums in step.items():
            term = self.terms[name]
            # Training that diverged is another matter, and is not blamed on the defense.
            if not all(math.isfinite(value) for value in sums.values()):
                continue
            term.value += sums["value"]
            term.positions += sums["positions"]
            term.gradient += sums["evidence"]
            term.requires_grad += sums["requires_grad"]
            if sums["evidence"] > 0 and sums["requires_grad"] > 0:
                term.idle_steps = 0
            elif self.moved and sums["positions"] > 0:
                term.idle_steps += 1
            term.judged_steps += int(self.moved and sums["positions"] > 0)
        self.moved = self.moved or (learning_rate >= 0.1 and label_tokens > 0)

    def verdict(self, final: bool = False) -> str | None:
        """Why the run is not defended, or `None`.

        Args:
            final: whether training ends here, so that one judged step is enough for a term that has never acted.
        """
        for name, term in self.terms.items():
            if term.idle_steps >= PATIENCE or (final and term.idle_steps and not term.acted):
                return (
                    f"defense {name!r} has formed no gradient in the last {term.idle_steps} step(s) although the policy had "
                    f"moved, so the run is not defended. Likely cause: {term.cause()}."
                )
        return None

    def unjudged(self) -> list[str]:
        """Terms of which nothing can be said, because no step came after the policy had moved."""
        return [name for name, term in self.terms.items() if not term.acted and term.judged_steps == 0]

    def state(self) -> dict[str, Any]:
        return {name: {**asdict(term), "acted": term.acted} for name, term in self.terms.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what [`state`] said.

        Raises:
            ValueError: it is no such state.
        """
        for name, saved in state.items():
            if not isinstance(saved, dict) or not all(isinstance(value, int | float) for value in saved.values()):
                raise ValueError(f"the evidence of {name!r} must hold numbers, and is {saved!r}.")
            try:
                self.terms[name] = Evidence(**{key: value for key, value in saved.items() if key != "acted"})
            except TypeError as error:
                raise ValueError(f"the evidence of {name!r} is of another form: {error}.") from error


def write_defense_file(folder: str | os.PathLike, record: dict[str, Any]) -> None:
    """Write `defense.json` into a checkpoint folder, whole or not at all."""
    with written_whole(Path(folder) / DEFENSE_FILE) as scratch:
        scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_defense_file(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The record in a checkpoint folder; `None` where there is none (a checkpoint of another trainer).

    Raises:
        ValueError: the file is there and is not such a record.
    """
    path = Path(folder) / DEFENSE_FILE
    if not path.is_file():
        return None
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(record["defenses"], dict) or not isinstance(record["evidence"], dict):
            raise TypeError("`defenses` and `evidence` must be objects")
        if not record["defenses"].keys() <= record["evidence"].keys():
            raise TypeError("`evidence` must hold every defense")
        reference = record.get("reference")
        if reference is not None and not all(isinstance(reference[key], str) for key in ("kind", "fingerprint")):
            raise TypeError("`reference` must say its `kind` and `fingerprint`")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}), so nobody can say how this checkpoint was trained. "
            "Resume from another checkpoint."
        ) from error
    return record
