"""Facts on how the trainer prepares training rows, for defenses that prepare rows of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase


Rows = Dataset | IterableDataset

# Number of a stream's first rows that are read before training, to check them and to measure their mean length. It is
# also the size, in packs, of the buffer that shuffles the packs of a stream. `DefendedRows`, a base class of the
# trainer, uses this buffer if it packs a stream itself. It does so if defenses add rows to the stream, or columns with
# a number per token. Otherwise SFTTrainer packs the stream (if `packing` is set), without this buffer.
STREAM_ROWS = 1000


@dataclass(frozen=True)
class Tokenizing:
    """Tokenisation of rows as the trainer does it.

    Attributes:
        tokenizer: the run's tokenizer.
        prepare: function that turns rows of `prompt` and `completion`, or tokenised rows, into rows of `input_ids` and
            `labels` that are not cut. Its second argument is a name for the progress bar.
        answers_only: whether the run trains on answers alone.
        template_kwargs: arguments that the training rows share and hand to the chat template; in a stream, those of
            its first row.
    """

    tokenizer: PreTrainedTokenizerBase
    prepare: Callable[[Dataset, str], Dataset]
    answers_only: bool
    template_kwargs: dict[str, Any] | None


@dataclass(frozen=True)
class StreamPlan:
    """Counts of rows, steps, packs and tokens in a run that packs or streams its rows, for defenses that add rows.

    Attributes:
        rows: number of rows in an epoch; `None` for a stream.
        rows_of_run: number of rows, or packs of rows, in a run of `max_steps`, over all ranks; `None` if epochs limit
            the run.
        max_steps: optimizer steps of the run; 0 or less if epochs limit the run.
        tokens_of_pack: number of tokens in a pack if a stream is packed, else `None`.
        mean_tokens: mean number of tokens in a training row, measured in the stream's first rows; 0 if no stream is
            packed.
        packs_ahead: number of packs that are read ahead and shuffled; 0 if no stream is packed.
        token_columns: columns with a number per token that reach the batches. In added rows these numbers are 0.
    """

    rows: int | None
    rows_of_run: int | None
    max_steps: int
    tokens_of_pack: int | None = None
    mean_tokens: float = 0.0
    packs_ahead: int = 0
    token_columns: tuple[str, ...] = ()
