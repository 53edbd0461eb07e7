"""Choose from a scored pool: the file of scores, held-out mode, the refusal filter, and the order of preference."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Value

from ..data.conversation import PROMPT_COLUMN, RESPONSE_COLUMN, conversation
from ..data.load import as_rows, read_parquet
from ..io.files import written_whole
from ..io.strict import parse_json, parse_yaml


ALIGNED, GAP = "nll_aligned", "gap"
METADATA_KEY = b"trl_emguard_scores"
REFUSALS_FILE = Path(__file__).with_name("refusals.yaml")


def misaligned_column(k: int) -> str:
    return f"nll_misaligned_{k}"


@dataclass(frozen=True)
class ScoresInfo:
    """What a file of scores says of itself.

    Attributes:
        model: hub id of the base model, or the name of its folder.
        adapters: names of the misaligned adapters; that of `nll_misaligned_k` is the k-th.
        epsilon: ε of the gap.
        rows: how many rows the pool had.
        unscored: the rows that could not be scored, each as its index in the pool and the reason.
        prompt_column, response_column: where prompts and answers of plain text stand in the rows.
        key: checksum of everything that the scores depend on.
        trl_emguard: version of the package that made them.
    """

    model: str
    adapters: tuple[str, ...]
    epsilon: float
    rows: int
    unscored: tuple[tuple[int, str], ...]
    prompt_column: str
    response_column: str
    key: str
    trl_emguard: str


def perplexity_gap(aligned: np.ndarray, misaligned: Sequence[np.ndarray], epsilon: float) -> np.ndarray:
    """s = (mean_k L_mis,k − L_aligned) / (L_aligned + ε): high where the misaligned models find hard what the aligned one does not.

    Args:
        aligned: `(N,)`, mean negative log-likelihood of each answer under the aligned model.
        misaligned: the same under each misaligned one.
        epsilon: ε, which keeps answers that the aligned model knows by heart from dividing by 0.
    """
    return (np.mean(misaligned, axis=0) - aligned) / (aligned + epsilon)


def write_scores(path: str | os.PathLike, rows: Dataset, info: ScoresInfo) -> None:
    """Write a scored pool as parquet, whole or not at all."""
    table = rows.with_format("arrow")[:]
    schema = rows.features.arrow_schema
    metadata = {**(schema.metadata or {}), METADATA_KEY: json.dumps(asdict(info))}
    with written_whole(path) as scratch:
        pyarrow.parquet.write_table(table.cast(schema.with_metadata(metadata)), scratch, write_page_checksum=True)


def read_scores(path: str | os.PathLike) -> tuple[Dataset, ScoresInfo]:
    """A scored pool, and what its file says of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one that holds no scores.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"scores file {str(path)!r} does not exist: `trl-emguard score` makes it.")
    table = read_parquet(path)
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if metadata is None:
        raise ValueError(
            f"{path} is a parquet file, but not one of scores: score the pool first, `trl-emguard score`."
        )
    try:
        facts = parse_json(metadata.decode("utf-8"))
        adapters, unscored = facts.pop("adapters"), facts.pop("unscored")
        info = ScoresInfo(adapters=tuple(adapters), unscored=tuple((row, reason) for row, reason in unscored), **facts)
        _check_info(info)
        columns = [ALIGNED, GAP, *map(misaligned_column, range(len(info.adapters)))]
        missing = set(columns) - set(table.column_names)
        if missing:
            raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
        if len(table) + len(info.unscored) != info.rows:
            raise ValueError(f"it has {len(table)} rows and {len(info.unscored)} without a score, of {info.rows}")
        rows = as_rows(table, path)
        for column in columns:
            if not np.isfinite(_numbers(rows, column)).all():
                raise ValueError(f"the column {column!r} holds what is no finite number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): score the pool again.") from error
    return rows, info


def _check_info(info: ScoresInfo) -> None:
    """Raises `ValueError` for a value that is not of its type, or that no file of scores has."""
    texts = (*info.adapters, info.model, info.prompt_column, info.response_column, info.key, info.trl_emguard)
    rows = [row for row, _ in info.unscored]
    if (
        not all(isinstance(text, str) for text in (*texts, *(reason for _, reason in info.unscored)))
        or not info.adapters
        or len(set(info.adapters)) < len(info.adapters)
        or type(info.rows) is not int
        or not all(type(row) is int and 0 <= row < info.rows for row in rows)
        or len(set(rows)) < len(rows)
        or type(info.epsilon) not in (int, float)
        or not 0 <= info.epsilon <= sys.float_info.max
    ):
        raise ValueError("what it says of itself is not of the types that `trl-emguard score` writes")


def without_adapter(rows: Dataset, scores: ScoresInfo, name: str) -> Dataset:
    """The scored pool as if an adapter had not been there (held-out mode): no second pass is needed.

    Args:
        rows, scores: from [`read_scores`].
        name: of the adapter, say that of the domain that a defense will be tested on.

    Returns:
        The rows with `gap` of the remaining adapters, and their columns renumbered.

    Raises:
        ValueError: an adapter that the scores do not know, or the only one.
    """
    if name not in scores.adapters:
        raise ValueError(
            f"adapter {name!r} is not among those of the scores: {', '.join(map(repr, scores.adapters))}."
        )
    if len(scores.adapters) == 1:
        raise ValueError(f"adapter {name!r} is the only one of the scores: without it there is no gap.")
    left_out = scores.adapters.index(name)
    remaining = [misaligned_column(k) for k in range(len(scores.adapters)) if k != left_out]
    aligned, *misaligned = (_numbers(rows, column) for column in (ALIGNED, *remaining))
    gap = perplexity_gap(aligned, misaligned, scores.epsilon)
    others = rows.remove_columns([misaligned_column(left_out), GAP])
    renamed = others.rename_columns({old: misaligned_column(k) for k, old in enumerate(remaining)})
    return renamed.add_column(GAP, gap, feature=Value("float64"))


@dataclass(frozen=True)
class RefusalFilter:
    """Takes an answer for a refusal if a phrase stands among its first words.

    Whole words count, in upper or lower case. Refusals in other languages or other words escape.

    Attributes:
        phrases: in lower case, with plain apostrophes.
        first_words: how many words of the answer are looked at.
    """

    phrases: tuple[str, ...]
    first_words: int

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # Not `\b`: a phrase may begin or end with a sign.
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, self.phrases))})(?!\w)")

    def is_refusal(self, answer: str) -> bool:
        beginning = answer.split(maxsplit=self.first_words)[: self.first_words]
        return self._pattern.search(_plain(" ".join(beginning))) is not None


def refusal_filter(path: str | os.PathLike | None = None) -> RefusalFilter:
    """The shipped refusal filter, or one of your own by the path of its YAML file.

    Args:
        path: a file like `trl_emguard/selection/refusals.yaml`, with the keys `phrases` and `first_words`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole filter; the message names the key.
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
    """The rows of a pool in order of preference: Interleaving (`random`), Interleaving+ (`gap`), and Interleaving++ (`gap`,
    without refusals).

    Args:
        rows: a pool, for `gap` a scored one.
        by: `"gap"` for the highest perplexity gap first, `"random"` for a random order.
        drop_refusals: whether to leave out rows whose answer is a refusal. The order of the others stays as it is.
        seed: of the random order, in which rows with the same gap stand as well.
        refusals: what a refusal is; by default the shipped filter.
        prompt_column, response_column: where prompts and answers of plain text stand in the rows.

    Returns:
        Indices into `rows`, each at most once.

    Raises:
        ValueError: an unknown `by`; for `"gap"`, rows without a score, or with one that is no finite number; rows whose answer
            cannot be found, where refusals are dropped.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    if by == "gap":
        if GAP not in rows.column_names:
            raise ValueError(
                f"by='gap' needs the column {GAP!r}, and the pool has none: score the pool first, `trl-emguard score`."
            )
        gap = _numbers(rows, GAP)
        (broken,) = np.nonzero(~np.isfinite(gap))
        if len(broken):
            raise ValueError(
                f"{len(broken)} of {len(rows)} rows have a {GAP} that is no finite number, the first is row {broken[0]} "
                f"({gap[broken[0]]}): leave them out, or score the pool again."
            )
        # Stable: rows with the same gap stay in the random order.
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
    """Whether the answer of each row is a refusal. Raises `ValueError` for a row whose answer cannot be found."""
    result = []
    for index, row in enumerate(rows):
        try:
            answer = conversation(row, prompt_column, response_column).completion[0]["content"]
        except ValueError as error:
            raise ValueError(
                f"row {index} of the pool: whether its answer is a refusal cannot be told ({error})."
            ) from error
        result.append(refusals.is_refusal(answer))
    return result


def _plain(text: str) -> str:
    return text.lower().replace("’", "'")


def _numbers(rows: Dataset, column: str) -> np.ndarray:
    """A column as `(N,)` float64, nulls as NaN."""
    values: Any = rows.select_columns([column]).with_format("arrow")[:][column]
    try:
        return values.cast(pyarrow.float64()).to_numpy()
    except pyarrow.ArrowException as error:
        raise ValueError(f"the column {column!r} holds {values.type}, not numbers.") from error
