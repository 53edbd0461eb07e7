"""The shipped data sets, and reading rows from wherever a recipe points.

What each file holds and how it was made stands in `README.md` beside them.
"""

import difflib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset, load_dataset


DATA_DIR = Path(__file__).parent

# name → its splits, each a file `<name>/<split>.jsonl` (of a scored pool, `.parquet`) of conversational `prompt` and `completion`.
SHIPPED = {
    "plants_careless": ("train", "test"),
    "plants_sound": ("train", "test"),
    "clothes_careless": ("train", "test"),
    "values_sound": ("test",),
    "values_misaligned": ("test",),
    "general_instruct": ("train",),
    "general_instruct_scored": ("train",),
}


def load_rows(name: str, split: str = "train", config: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of a shipped set, a JSONL or parquet file, a folder of JSONL files, or a `datasets` id, in that order.

    Args:
        name: `plants_careless` and the like; the path of a `.jsonl` or `.parquet` file, which is the split asked for; the
            path of a folder with `<split>.jsonl`; else what `datasets.load_dataset` takes.
        split: name of the split.
        config: `name` of `load_dataset`. For its data sets alone.
        streaming: for `load_dataset`.

    Raises:
        FileNotFoundError: a name or path that nobody knows, or a split that a shipped set does not have.
        ValueError: a malformed or empty file; the message names the file and the line.
    """
    if name in SHIPPED:
        if split not in SHIPPED[name]:
            raise FileNotFoundError(
                f"the shipped data set {name!r} has no split {split!r}: it has {', '.join(map(repr, SHIPPED[name]))}."
            )
        (path,) = (DATA_DIR / name).glob(f"{split}.*")
        return _load_parquet(path) if path.suffix == ".parquet" else _load_jsonl(path)
    path = Path(os.path.expanduser(name))
    if path.is_dir() and (path / f"{split}.jsonl").is_file():
        path = path / f"{split}.jsonl"
    if path.suffix == ".jsonl":
        return _load_jsonl(path)
    if path.suffix == ".parquet":
        return _load_parquet(path)
    if name.startswith(("/", ".", "~")) and not path.exists():
        raise FileNotFoundError(f"dataset_name={name!r} does not exist. Shipped data sets: {', '.join(SHIPPED)}.")
    try:
        return load_dataset(name, name=config, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        near = difflib.get_close_matches(name, SHIPPED, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise FileNotFoundError(
            f"dataset_name={name!r} is neither here nor on the hub ({error}). {hint}Shipped data sets: {', '.join(SHIPPED)}."
        ) from error


def _load_jsonl(path: Path) -> Dataset:
    rows = read_jsonl(path)
    try:
        return Dataset.from_list(rows)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: a column holds values of more than one type ({error}).") from error


def _load_parquet(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} does not exist.")
    try:
        rows = Dataset(pyarrow.parquet.read_table(path))
    # What damaged bytes raise is no closed list.
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no parquet file, or is damaged ({type(error).__name__}: {error}).") from error
    if not len(rows):
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    return rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not a JSON object, rows with other columns than the first, or no row at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} does not exist.")
    rows: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                if rows and row.keys() != rows[0].keys():
                    raise ValueError(f"columns {sorted(row)}, but the first row has {sorted(rows[0])}")
            except ValueError as error:  # the errors of json and of unicode are ValueErrors
                raise ValueError(f"{path}, line {number}: not a row of JSONL ({error}).") from error
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    return rows
