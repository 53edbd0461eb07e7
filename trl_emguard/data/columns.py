"""Collator for columns that defenses add to rows, with one number per token. SFTTrainer's collator ignores them."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from ..evidence import InactiveDefenseError


class TokenColumns:
    """Collator that pads or joins extra columns as another collator pads or joins `input_ids`.

    If a row's tokens were cut at their end after the column was made, the column is cut too. A row without the
    column gets zeros.

    Args:
        collator: collator that makes a batch of rows from everything but the extra columns.
        names: names of the extra columns, each with a whole number per token.

    Returns:
        From a call: the batch of `collator`, with each extra column as `(B, T)` integers, 0 for pads.

    Raises:
        InactiveDefenseError: from a call: `collator` changes, drops or rearranges rows.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], names: Sequence[str]):
        self.collator = collator
        self.names = names

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [{key: value for key, value in row.items() if key not in self.names} for row in features]
        batch = self.collator(rows)
        ids = [row["input_ids"] for row in rows]
        for name in self.names:
            values = [numbers_per_token(row, name) for row in features]
            batch[name] = laid_out_like(batch["input_ids"], ids, values, torch.long)
        return batch


def numbers_per_token(row: dict[str, Any], name: str) -> list[int]:
    """Return a row's column, cut to the row's number of tokens; zeros if the row lacks the column."""
    length = len(row["input_ids"])
    return row[name][:length] if name in row else [0] * length


def laid_out_like(
    input_ids: torch.Tensor, rows: list[list[int]], values: Sequence[list[Any]], dtype: torch.dtype = torch.bool
) -> torch.Tensor:
    """Return values per token, laid out as a collator laid out the rows: padded, or joined into one row.

    Args:
        input_ids: `(B, T)`, tokens of the batch.
        rows: tokens of the rows that the collator was given.
        values: for each row, a value per token.
        dtype: type of the result, `(B, T)`. The result is 0 for pads.

    Raises:
        InactiveDefenseError: the collator changes, drops or rearranges rows.
    """
    laid_out = torch.zeros_like(input_ids, dtype=dtype)
    if len(input_ids) != len(rows):  # a padding-free collator joins all rows into one
        rows, values = [list(chain(*rows))], [list(chain(*values))]
    for row, told, line, places in zip(rows, values, input_ids.tolist(), laid_out, strict=len(input_ids) == len(rows)):
        if line[: len(row)] == row:
            places[: len(row)] = torch.tensor(told)
        elif line[len(line) - len(row) :] == row:
            places[len(line) - len(row) :] = torch.tensor(told)
        else:
            break
    else:
        if len(input_ids) == len(rows):
            return laid_out
    raise InactiveDefenseError(
        "the data collator changes, drops or rearranges rows, so nobody can tell which of them a defense has marked, "
        "and the run is not defended. Let it keep rows and their order, or leave `data_collator` out."
    )
