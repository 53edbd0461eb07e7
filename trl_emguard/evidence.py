"""Evidence that a defense has an effect: sums over training steps, a verdict on them, and the file `defense.json`.

A term is a summand that a defense adds to the loss. Most terms compare states (logits or block outputs) of the policy,
the model in training, with the same states of a reference model.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .io.files import written_whole
from .io.strict import parse_json


DEFENSE_FILE = "defense.json"

# A run counts as not defended once the term that a defense adds to the loss has formed no gradient in this many judged
# steps in a row. A step is judged only if it has positions that the term looks at, and if the policy had been updated
# before (see `Evidence.judged_steps`). Without an update, the policy may still equal the reference, and the term then
# rightly has no gradient. One judged step is not enough, because in bf16 the change that an update makes may vanish in
# the rounding of the states.
PATIENCE = 3


class InactiveDefenseError(RuntimeError):
    """Error for a run that is not defended.

    Common causes: a term of the loss formed no gradient although the policy had been updated; rows to mix in did not
    reach the batches; a steering hook did not fire or changed nothing; an inoculation prompt changed no row. The check
    after training saves the model before it raises this error. Checks before training or during a step save nothing.
    """


def moves(learning_rate: float, label_tokens: float) -> bool:
    """Return whether a step's update is large enough to change the policy's states visibly.

    The first updates of a long warm-up are too small to be visible in bf16. So an update counts only if its learning
    rate is at least a tenth of the peak rate.

    Args:
        learning_rate: learning rate of the update, as a share of the peak rate; 0 if the update was skipped.
        label_tokens: number of tokens with a label in the step.
    """
    return learning_rate >= 0.1 and label_tokens > 0


@dataclass
class Evidence:
    """Evidence that a term of the loss forms a gradient, summed over steps, micro-batches and ranks.

    Attributes:
        value: sum of the term's distance over positions.
        positions: number of positions that the term looked at; a term that does not depend on the batch counts one
            per step and rank.
        gradient: Σ |∂ weighted term / ∂ compared states|. The states are logits or block outputs, for example. The
            sum is above 0 once the term has formed any gradient.
        requires_grad: number of micro-batches in which the policy's states required grad at all.
        judged_steps: number of steps in which a gradient was to be expected: the policy had been updated before, no
            schedule set the coefficient to 0, and the term had positions to look at.
        idle_steps: number of judged steps since the last step with a gradient.
    """

    value: float = 0.0
    positions: float = 0.0
    gradient: float = 0.0
    requires_grad: float = 0.0
    judged_steps: int = 0
    idle_steps: int = 0

    @classmethod
    def read(cls, name: str, record: dict[str, Any]) -> "Evidence":
        """Return the evidence of a term from the record that [`as_json`] made; an empty record gives zeros.

        Entries of other names, which the defense may have added, are ignored.

        Raises:
            ValueError: the record is no dict, or one of its entries is no number.
        """
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record} if isinstance(record, dict) else None
        if known is None or not all(isinstance(value, int | float) for value in known.values()):
            raise ValueError(f"the evidence of {name!r} must hold numbers, and is {record!r}.")
        return cls(**known)

    def as_json(self) -> dict[str, Any]:
        """Return the evidence as a dict for `defense.json`, with the entry `acted`: whether a gradient was formed."""
        return {**asdict(self), "acted": self.has_acted}

    @property
    def has_acted(self) -> bool:
        return self.gradient > 0 and self.requires_grad > 0

    @property
    def is_unjudged(self) -> bool:
        """True if the term has formed no gradient, and none was to be expected yet (see `judged_steps`)."""
        return not self.has_acted and self.judged_steps == 0

    def end_step(
        self, value: float, positions: float, evidence: float, requires_grad: float, *, has_moved: bool
    ) -> None:
        """Add a step's sums over all micro-batches and ranks. Every rank calls this with the same numbers.

        Args:
            value: sum of the term's distance over positions.
            positions: number of positions that the term looked at.
            evidence: Σ |∂ weighted term / ∂ compared states|.
            requires_grad: number of micro-batches in which the policy's states required grad.
            has_moved: whether the policy had been updated before this step, and no schedule sets the coefficient to 0.
        """
        # A step with a number that is not finite says nothing about the defense, so it is ignored here. The trainer's
        # `_check_finite` raises an error if such numbers mean that training has diverged.
        if not all(math.isfinite(number) for number in (value, positions, evidence, requires_grad)):
            return
        self.value += value
        self.positions += positions
        self.gradient += evidence
        self.requires_grad += requires_grad
        if evidence > 0 and requires_grad > 0:
            self.idle_steps = 0
        elif has_moved and positions > 0:
            self.idle_steps += 1
        self.judged_steps += int(has_moved and positions > 0)

    def verdict(self, name: str, final: bool = False) -> str | None:
        """Return a text that says why the run counts as not defended, or `None` if no fault was found so far.

        Args:
            name: name of the defense.
            final: whether training ends here. Then one judged step is enough, if the term never formed a gradient.
        """
        if self.idle_steps < PATIENCE and not (final and self.idle_steps and not self.has_acted):
            return None
        return (
            f"defense {name!r} has formed no gradient in the last {self.idle_steps} step(s) although the policy had "
            f"moved, so the run is not defended. Likely cause: {self._cause()}."
        )

    def _cause(self) -> str:
        """Return the likely reason why the term's gradient is exactly zero."""
        if self.requires_grad == 0:
            return "no trainable weight reaches the states that it compares (frozen layers)"
        if self.value == 0:
            return (
                "the policy's states equal the reference's: the reference is the policy, or no trainable weight lies "
                "below the layers that it compares (frozen layers)"
            )
        return "its value does not depend on the policy's states (detached graph), or the reference became the policy"


def write_defense_file(folder: str | os.PathLike, record: dict[str, Any]) -> None:
    """Write `defense.json` into a checkpoint folder, atomically."""
    with written_whole(Path(folder) / DEFENSE_FILE) as scratch:
        scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_defense_file(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return the content of `defense.json` in a checkpoint folder, or `None` if the file is missing.

    The file is missing if another trainer wrote the checkpoint.

    Raises:
        ValueError: the file exists, but is not a valid record.
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
            f"{path} is corrupt ({type(error).__name__}: {error}), so nobody can say how this checkpoint was trained. "
            "Take another checkpoint, or copy it again."
        ) from error
    return record
