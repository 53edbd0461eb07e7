"""Scopes: named sets of token positions, over which cross-entropy and the defenses' loss terms are summed."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..defenses.base import Defense, TermDefense
from ..defenses.step import ALL, LABELS, MARKS, TERM_SUMS, Marks


def read_marks(defenses: Sequence[Defense], batch: dict[str, Any]) -> Marks:
    """Return all defenses' marks for a micro-batch. Remove the keys that only defenses read.

    A batch that holds its marks already, under the key [`MARKS`], is not read again: a defense may mark positions at
    random, or count batches.

    Raises:
        ValueError: a defense gives a count the name of a sum that its term of the loss makes.
    """
    read = batch.pop(MARKS, None)
    if read is not None:  # the batch may have been moved to the device since it was read
        device = batch["labels"].device
        return Marks({scope: mask.to(device) for scope, mask in read.scopes.items()}, read.counts)
    merged = Marks()
    for defense in defenses:
        marks = defense.read_batch(batch)
        taken = sorted(marks.counts.keys() & TERM_SUMS) if isinstance(defense, TermDefense) else []
        if taken:
            raise ValueError(
                f"defense {defense.name!r}: read_batch returned a count named {taken[0]!r}, which is the name of a "
                "sum of its term of the loss: give the count another name."
            )
        merged.scopes |= marks.scopes
        merged.counts |= {f"{defense.name}/{name}": count for name, count in marks.counts.items()}
    return merged


def with_marks(defenses: Sequence[Defense], batch: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a micro-batch that holds its marks, for the functions below and for [`read_marks`].

    If no defense has marks, the batch itself is returned. It then holds only inputs of the model, as a subclass of the
    trainer may expect.

    Raises:
        ValueError: as in [`read_marks`].
    """
    if all(type(defense).read_batch is Defense.read_batch for defense in defenses):
        return batch
    batch = copy.copy(batch)
    batch[MARKS] = read_marks(defenses, batch)
    return batch


def positions_in_scope(
    batch: Mapping[str, Any], scope: str, marks: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return a mask of the positions of a scope. At position t the model predicts token t + 1.

    Args:
        batch: collated batch of `(B, T)` tensors.
        scope: `"loss"` for positions that predict a label; `"all"` for positions that predict a real token; a name in
            `marks` for positions that predict a label and whose predicted token is in this mask.
        marks: name of a scope → mask of its tokens, `(B, T)` boolean.

    Returns:
        Boolean, `(B, T - 1)`.

    Raises:
        ValueError: the scope is `"all"`, and the batch does not say which tokens are real.
    """
    if scope == LABELS:
        return batch["labels"][:, 1:] != -100
    if scope != ALL:
        return (batch["labels"][:, 1:] != -100) & (marks or {})[scope][:, 1:]
    # The attention mask or the position ids tell which tokens are padding. Token ids cannot tell, because the pad
    # token may also be the end-of-turn token.
    if batch.get("attention_mask") is not None:
        mask = batch["attention_mask"].bool()
        return mask[:, 1:] & mask[:, :-1]
    if batch.get("position_ids") is not None:
        # Rows that are joined without padding have no attention mask. Tokens with position id 0 are left out. They are
        # either padding at the end of the batch, or the first token of a document, which no earlier token predicts.
        return batch["position_ids"][:, 1:] != 0
    raise ValueError(
        "tokens='all' needs to know which tokens are real, and this batch has neither 'attention_mask' nor "
        "'position_ids': let the data collator return one of them."
    )


def count_positions(batches: Sequence[Mapping[str, Any]], scopes: Sequence[str]) -> torch.Tensor:
    """Return the number of positions in each scope, summed over all batches, `(len(scopes),)`.

    Args:
        batches: collated batches of `(B, T)` tensors that hold their marks ([`with_marks`]), if there are any.
        scopes: names of the scopes.
    """
    counts = [
        torch.stack([positions_in_scope(batch, scope, batch.get(MARKS, Marks()).scopes).sum() for scope in scopes])
        for batch in batches
    ]
    return torch.stack(counts).sum(0)
