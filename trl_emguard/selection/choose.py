"""Choice of rows from a scored pool: rank rows, drop refusals, leave a misaligned adapter out of the scores.

Each row of a scored pool has a perplexity gap ([`~trl_emguard.selection.scored.perplexity_gap`]). It says how much
less likely the row's answer is under the base model with a misaligned adapter, on average over such adapters,
than under the aligned base model alone.
"""

import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, Value

from ..data.conversation import PROMPT_COLUMN, RESPONSE_COLUMN, conversation, turn_text
from ..io.strict import parse_yaml
from .scored import (
    ALIGNED,
    GAP,
    METADATA_KEY,
    ScoresInfo,
    misaligned_column,
    numbers,
    perplexity_gap,
    read_scores,
    write_scores,
)


# Names from `scored` are listed, too, because this module once defined them.
__all__ = [
    "METADATA_KEY",
    "REFUSALS_FILE",
    "RefusalFilter",
    "ScoresInfo",
    "misaligned_column",
    "perplexity_gap",
    "rank_rows",
    "read_scores",
    "refusal_filter",
    "without_adapter",
    "write_scores",
]

REFUSALS_FILE = Path(__file__).with_name("refusals.yaml")


def without_adapter(rows: Dataset, scores: ScoresInfo, name: str) -> Dataset:
    """Return the scored pool with each row's gap computed anew from the stored likelihoods, without one adapter.

    Args:
        rows, scores: result of [`~trl_emguard.selection.scored.read_scores`].
        name: name of the adapter to leave out, for example one trained on the domain that a defense is tested on.

    Returns:
        The rows, with the `gap` of the remaining adapters and with these adapters' columns renumbered.

    Raises:
        ValueError: the scores do not include the adapter, or include no other adapter.
    """
    if name not in scores.adapters:
        raise ValueError(
            f"adapter {name!r} is not among those of the scores: {', '.join(map(repr, scores.adapters))}."
        )
    if len(scores.adapters) == 1:
        raise ValueError(f"adapter {name!r} is the only one of the scores: without it there is no gap.")
    left_out = scores.adapters.index(name)
    remaining = [misaligned_column(k) for k in range(len(scores.adapters)) if k != left_out]
    aligned, *misaligned = (numbers(rows, column) for column in (ALIGNED, *remaining))
    gap = perplexity_gap(aligned, misaligned, scores.epsilon)
    others = rows.remove_columns([misaligned_column(left_out), GAP])
    renamed = others.rename_columns({old: misaligned_column(k) for k, old in enumerate(remaining)})
    return renamed.add_column(GAP, gap, feature=Value("float64"))


@dataclass(frozen=True)
class RefusalFilter:
    """A filter that calls an answer a refusal if its first words contain one of the phrases.

    Only whole words count, in upper or lower case. Refusals in other languages or other words are missed.

    Attributes:
        phrases: phrases in lower case, with plain apostrophes.
        first_words: number of words that are searched, from the beginning of the answer.
    """

    phrases: tuple[str, ...]
    first_words: int

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # `\b` would fail for a phrase that begins or ends with a punctuation mark.
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, self.phrases))})(?!\w)")

    def is_refusal(self, answer: str) -> bool:
        beginning = answer.split(maxsplit=self.first_words)[: self.first_words]
        return self._pattern.search(_plain(" ".join(beginning))) is not None


def refusal_filter(path: str | os.PathLike | None = None) -> RefusalFilter:
    """Load a refusal filter from a YAML file, by default the shipped one.

    Args:
        path: a file like `trl_emguard/selection/refusals.yaml`, with the keys `phrases` and `first_words`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not describe a filter; the message names the key at fault.
    """
    path = REFUSALS_FILE if path is None else Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"refusals file {str(path)!r} does not exist.")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"refusals file {path} is not YAML: {error}") from error
    if not isinstance(data, dict) or data.keys() != {"phrases", "first_words"}:
        raise ValueError(f"refusals file {path} must hold the keys phrases and first_words, and no other.")
    phrases, first_words = data["phrases"], data["first_words"]
    if not isinstance(phrases, list) or not phrases:
        raise ValueError(f"refusals file {path}: 'phrases' must be a list of texts, got {phrases!r}.")
    for i, phrase in enumerate(phrases, 1):
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"refusals file {path}: phrase {i} of 'phrases' must be text, got {phrase!r}.")
    if type(first_words) is not int or first_words < 1:
        raise ValueError(
            f"refusals file {path}: 'first_words' must be a whole number of 1 or more, got {first_words!r}."
        )
    return RefusalFilter(tuple(_plain(" ".join(phrase.split())) for phrase in phrases), min(first_words, sys.maxsize))


def rank_rows(
    rows: Dataset,
    by: Literal["gap", "random"],
    drop_refusals: bool = False,
    seed: int = 0,
    refusals: RefusalFilter | None = None,
    prompt_column: str = PROMPT_COLUMN,
    response_column: str = RESPONSE_COLUMN,
) -> list[int]:
    """Return the indices of a pool's rows in the order in which to choose rows: highest gap first, or random.

    Kaczér et al. (2508.06249) call these orders Interleaving (`random`), Interleaving+ (`gap`), and Interleaving++
    (`gap`, without refusals).

    Args:
        rows: a pool of rows. The order by `gap` needs a scored pool.
        by: `"gap"` for the highest perplexity gap first, `"random"` for a random order.
        drop_refusals: True leaves out rows whose answer is a refusal. The order of the others stays the same.
        seed: seed of the random order. With `gap`, this order decides between rows with the same gap.
        refusals: filter that finds refusals; by default the shipped one.
        prompt_column, response_column: columns with prompts and answers of plain text.

    Returns:
        Indices into `rows`, each at most once.

    Raises:
        ValueError: an unknown `by`; with `"gap"`, a row without a score or with a score that is no finite number; with
            `drop_refusals`, a row whose answer cannot be found.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    if by == "gap":
        if GAP not in rows.column_names:
            raise ValueError(
                f"by='gap' needs the column {GAP!r}, and the pool has none: score the pool first, `trl-emguard score`."
            )
        gap = numbers(rows, GAP)
        (broken,) = np.nonzero(~np.isfinite(gap))
        if len(broken):
            raise ValueError(
                f"{len(broken)} of {len(rows)} rows have a {GAP} that is no finite number, the first is row "
                f"{broken[0]} ({gap[broken[0]]}): leave them out, or score the pool again."
            )
        # A stable sort keeps rows with the same gap in the random order.
        order = order[np.argsort(-gap[order], kind="stable")]
    elif by != "random":
        raise ValueError(f"by={by!r} is unknown: 'gap' or 'random'.")
    if drop_refusals:
        is_refusal = np.array(
            _find_refusals(rows, refusals or refusal_filter(), prompt_column, response_column), dtype=bool
        )
        order = order[~is_refusal[order]]
    return order.tolist()


def _find_refusals(
    rows: Dataset, refusals: RefusalFilter, prompt_column: str = PROMPT_COLUMN, response_column: str = RESPONSE_COLUMN
) -> list[bool]:
    """Return for each row if its answer is a refusal. A row whose answer cannot be found raises `ValueError`."""
    result = []
    for index, row in enumerate(rows):
        try:
            answer = turn_text(conversation(row, prompt_column, response_column).completion[0])
        except ValueError as error:
            raise ValueError(
                f"row {index} of the pool: whether its answer is a refusal cannot be told ({error})."
            ) from error
        result.append(refusals.is_refusal(answer))
    return result


def _plain(text: str) -> str:
    return text.lower().replace("’", "'")
