"""Data that pass between a training step and its defenses: marks of a micro-batch, and sums of a finished step."""

from dataclasses import dataclass, field

import torch


# Names of the two built-in scopes (sets of token positions). `LABELS` names the positions that predict a label, `ALL`
# the positions that predict any real token (not padding). Defenses can define further scopes, as masks with a name.
LABELS, ALL = "loss", "all"

# Key of a batch that holds its marks, from the moment that they are read until the loss takes them.
MARKS = "defense_marks"

# Names of the four sums that each term of the loss adds to a step ([`Step.sums`]), after the name of its defense.
TERM_SUMS = ("value", "positions", "evidence", "requires_grad")


@dataclass
class Marks:
    """Masks and counts that a defense reads from a micro-batch.

    Attributes:
        scopes: named sets of tokens, each as a mask, `(B, T)` boolean. Cross-entropy is also summed over each scope
            alone, and the loss term of a defense may be limited to one scope.
        counts: numbers to be summed over micro-batches and ranks, by name. Every batch must give the same names.
    """

    scopes: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, float | torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Record of a finished training step, equal on every rank.

    Attributes:
        sums: sums over micro-batches and ranks, by name. `ce` is cross-entropy and `tokens` the number of labels;
            `ce/SCOPE` and `tokens/SCOPE` are their parts in each scope. The counts of a defense called NAME are
            `NAME/COUNT`. If that defense adds a term to the loss, there are also `NAME/value`, `NAME/positions`,
            `NAME/evidence` and `NAME/requires_grad`, which [`~trl_emguard.evidence.Evidence.end_step`] explains.
        has_moved: whether earlier updates had changed the policy visibly before this step.
    """

    sums: dict[str, float]
    has_moved: bool
