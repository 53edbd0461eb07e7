"""Scored pool of rows: the names of its columns, the formula of the score (the perplexity gap), the parquet file."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features

from ..data.conversation import PROMPT_COLUMN, RESPONSE_COLUMN
from ..data.files import as_rows, read_parquet
from ..io.files import written_whole
from ..io.strict import parse_json


ALIGNED, GAP = "nll_aligned", "gap"
METADATA_KEY = b"trl_emguard_scores"


def misaligned_column(k: int) -> str:
    """Return the name of the column with the negative log-likelihoods under misaligned adapter `k` (0, 1, …)."""
    return f"nll_misaligned_{k}"


@dataclass(frozen=True)
class ScoresInfo:
    """Facts about a file of scores, stored in its metadata.

    Attributes:
        model: hub id of the base model, or the name of its folder.
        adapters: names of the misaligned adapters. The k-th, from 0, belongs to the column `nll_misaligned_k`.
        epsilon: ε of [`perplexity_gap`].
        rows: number of rows in the pool.
        unscored: the rows that could not be scored, each as its index in the pool and the reason.
        prompt_column, response_column: columns with prompts and answers of plain text.
        key: checksum of everything that the scores depend on.
        trl_emguard: version of the package that made the file.
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
    """Return the perplexity gap of each answer, s = (mean_k L_mis,k − L_aligned) / (L_aligned + ε).

    This gap is high for answers that are unlikely under the misaligned models, but not under the aligned model.

    Args:
        aligned: L_aligned, `(N,)`, mean negative log-likelihood of each answer under the aligned model.
        misaligned: L_mis,k for each misaligned model k: the same numbers under that model.
        epsilon: ε, which prevents a division by 0 for answers that the aligned model knows by heart.
    """
    return (np.mean(misaligned, axis=0) - aligned) / (aligned + epsilon)


def write_scores(path: str | os.PathLike, rows: Dataset, info: ScoresInfo) -> None:
    """Write a scored pool as parquet, in one atomic step."""
    rows = _without_empty_structs(rows)
    table = rows.with_format("arrow")[:]
    schema = rows.features.arrow_schema
    metadata = {**(schema.metadata or {}), METADATA_KEY: json.dumps(asdict(info))}
    with written_whole(path) as scratch:
        pyarrow.parquet.write_table(table.cast(schema.with_metadata(metadata)), scratch, write_page_checksum=True)


def _without_empty_structs(rows: Dataset) -> Dataset:
    """Turn each column whose type contains a dict without keys into JSON, and return the rows.

    Parquet has no type for a dict without keys.
    """
    columns = [name for name, feature in rows.features.items() if _is_empty(feature)]
    if not columns:
        return rows
    others = rows.remove_columns(columns).with_format("arrow")[:]
    as_json = Dataset.from_dict({name: rows.with_format(None)[name][:] for name in columns}, on_mixed_types="use_json")
    for name in columns:
        others = others.append_column(name, as_json.data.column(name))
    features = Features({**rows.remove_columns(columns).features, **as_json.features})
    return Dataset(others.cast(features.arrow_schema)).select_columns(rows.column_names)


def _is_empty(feature: Any) -> bool:
    """Return True if a column's feature type contains a dict without keys, at any depth."""
    if isinstance(feature, dict):
        return not feature or any(map(_is_empty, feature.values()))
    inner = getattr(feature, "feature", None)  # only list types have `feature`, the type of their items
    return inner is not None and _is_empty(inner)


def scored_names(path: Path) -> tuple[str, str, str] | None:
    """Return the names of the base model, the prompt column and the response column of the scored pool in a file.

    Returns:
        The three names, from the file's metadata; `None` for a file that is no scored pool.
    """
    try:
        facts = parse_json((pyarrow.parquet.read_schema(path).metadata or {})[METADATA_KEY].decode("utf-8"))
        names = facts["model"], facts["prompt_column"], facts["response_column"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if all(isinstance(name, str) for name in names) else None


def with_usual_names(rows: Dataset, prompt_column: str, response_column: str) -> Dataset:
    """Return the rows with their prompt and response columns renamed to `prompt` and `response`.

    Another column that already has such a name is renamed as well: `_before` is appended to its name.
    """
    names = {prompt_column: PROMPT_COLUMN, response_column: RESPONSE_COLUMN}
    names = {column: usual for column, usual in names.items() if column in rows.column_names}
    taken = {usual: f"{usual}_before" for usual in names.values() if usual in rows.column_names and usual not in names}
    return rows.rename_columns({**names, **taken})


def read_scores(path: str | os.PathLike) -> tuple[Dataset, ScoresInfo]:
    """Read a scored pool and the facts about it.

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
            if not np.isfinite(numbers(rows, column)).all():
                raise ValueError(f"the column {column!r} holds what is no finite number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): score the pool again.") from error
    return rows, info


def _check_info(info: ScoresInfo) -> None:
    """Raise `ValueError` if a field has a wrong type, or a value that `trl-emguard score` never writes."""
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


def numbers(rows: Dataset, column: str) -> np.ndarray:
    """Return a column as `(N,)` float64, nulls as NaN.

    Raises:
        ValueError: the column holds no numbers.
    """
    values: Any = rows.select_columns([column]).with_format("arrow")[:][column]
    try:
        return values.cast(pyarrow.float64()).to_numpy()
    except pyarrow.ArrowException as error:
        raise ValueError(f"the column {column!r} holds {values.type}, not numbers.") from error
