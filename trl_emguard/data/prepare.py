"""Preparation of training rows as the trainer does it, handed to defenses that tokenise rows of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase


Rows = Dataset | IterableDataset

# Rows of a stream are looked at up to this number.
STREAM_ROWS = 1000


@dataclass(frozen=True)
class Tokenizing:
    """The trainer's way from rows to tokens and labels.

    Attributes:
        tokenizer: the run's.
        prepare: function from rows of `prompt` and `completion`, or tokenised ones, and a name for the progress bar to
            rows of `input_ids` and `labels`, uncut.
        answers_only: whether the run trains on answers alone.
        template_kwargs: arguments that the training rows hand to the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    prepare: Callable[[Dataset, str], Dataset]
    answers_only: bool
    template_kwargs: dict[str, Any] | None


@dataclass(frozen=True)
class StreamPlan:
    """Number of training rows that pass by where rows are packed or streamed.

    Attributes:
        rows: rows of an epoch; `None` for a stream.
        rows_of_run: rows, or packs of rows, that a run of `max_steps` takes, over all ranks; `None` where epochs
        decide.
        max_steps: optimizer steps of the run, 0 or less where epochs decide.
        tokens_of_pack: tokens of a pack, where a stream is packed; `None` elsewhere.
        mean_tokens: tokens of a training row there, on average over the first rows.
        packs_ahead: packs there that are read ahead, and shuffled.
        token_columns: columns of the training rows with a number per token that reach the batches; 0 in added rows.
    """

    rows: int | None
    rows_of_run: int | None
    max_steps: int
    tokens_of_pack: int | None = None
    mean_tokens: float = 0.0
    packs_ahead: int = 0
    token_columns: tuple[str, ...] = ()
