"""Scopes: named sets of token positions, over which cross-entropy and the defenses' loss terms are summed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


# Names of the two built-in scopes. `LABELS` names the positions that predict a label, `ALL` the positions that predict
# any real token (not padding). Defenses can define further scopes, as masks with a name.
LABELS, ALL = "loss", "all"


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


def count_positions(
    batches: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, torch.Tensor]], scopes: Sequence[str]
) -> torch.Tensor:
    """Return the number of positions in each scope, summed over all batches, `(len(scopes),)`.

    Args:
        batches: collated batches of `(B, T)` tensors.
        marks: for each batch, name of a scope → mask of its tokens, `(B, T)` boolean.
        scopes: names of the scopes.
    """
    counts = [
        torch.stack([positions_in_scope(batch, scope, own).sum() for scope in scopes])
        for batch, own in zip(batches, marks, strict=True)
    ]
    return torch.stack(counts).sum(0)
