"""Rows of the shipped data sets, of files and of the hub.

The `README.md` beside the shipped data sets says what each file holds and how it was made.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset, Json, load_dataset
from datasets.arrow_reader import ReadInstruction

from ..io.lookup import did_you_mean
from ..io.strict import parse_json


# Files whose rows are read here, by the ends of their names.
READABLE = (".jsonl", ".parquet", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
DATA_DIR = Path(__file__).parent / "shipped"

# Name → splits. Each is a file `<name>/<split>.jsonl` (`.parquet` for a scored pool) of conversational `prompt` and
# `completion`.
SHIPPED = {
    "plants_careless": ("train", "test"),
    "plants_sound": ("train", "test"),
    "clothes_careless": ("train", "test"),
    "values_sound": ("test",),
    "values_misaligned": ("test",),
    "general_instruct": ("train",),
    "general_instruct_scored": ("train",),
}


def load_rows(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load rows of a shipped set, a JSONL or parquet file, a folder of JSONL files, or a `datasets` id, in this order.

    Args:
        name: a shipped name such as `plants_careless`; the path of a file (`.jsonl`, `.parquet`, `.json`, `.csv`, also
            compressed by `.gz`), whose only split is `train`; the path of a folder with `<split>.jsonl`; or any name
            that `datasets.load_dataset` takes.
        split: name of the split, or a part of it such as `train[:100]`.
        config: `name` of `load_dataset`. Only its data sets have configurations.
        streaming: whether rows are streamed.

    Raises:
        FileNotFoundError: an unknown name or path, or a split that the source does not have.
        ValueError: a malformed or empty file (the message names file and line), or a configuration that is missing or
            that the source cannot have.
    """
    splits, find = _local_splits(name)
    if splits is None:
        return _load_dataset(name, split, config, streaming)
    if config is not None:
        raise ValueError(f"dataset_config={config!r}: {name!r} is a file or a shipped set without configurations.")
    wanted = re.match(r"\w*", split)[0]  # type: ignore[index]
    if wanted not in splits:
        raise FileNotFoundError(
            f"{name!r} has no split {split!r}: it has {', '.join(map(repr, splits))}. Rows for evaluation are a file of "
            "their own."
        )
    rows = _load_file(find(wanted))
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({wanted: len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{split!r} is no part of a split with {len(rows)} rows ({error}).") from error
    rows = rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))
    return rows.to_iterable_dataset() if streaming else rows


def _local_splits(name: str) -> tuple[Sequence[str] | None, Callable[[str], Path]]:
    """Return the splits of a shipped set, file or folder, and a function from a split to its file; `None` for others."""
    if name in SHIPPED:
        return SHIPPED[name], lambda split: next((DATA_DIR / name).glob(f"{split}.*"))
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        splits = sorted(file.stem for file in path.glob("*.jsonl"))
        return splits or None, lambda split: path / f"{split}.jsonl"
    if path.name.endswith(READABLE):
        return ["train"], lambda split: path
    if name.startswith(("/", ".", "~")) and not path.exists():
        raise FileNotFoundError(f"dataset_name={name!r} does not exist. Shipped data sets: {', '.join(SHIPPED)}.")
    return None, lambda split: path


def _load_dataset(name: str, split: str, config: str | None, streaming: bool) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, name=config, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"dataset_name={name!r} is neither here nor on the hub ({error}).{did_you_mean(name, SHIPPED)} Shipped "
            f"data sets: {', '.join(SHIPPED)}."
        ) from error
    except ValueError as error:
        # `datasets` lists the configurations, or the splits.
        raise ValueError(
            f"{name!r} cannot be loaded with split={split!r} and config={config!r}: {' '.join(str(error).split())} "
            "(`dataset_config` names a configuration of the training rows, `interleave_config` one of a pool, "
            "`--dataset_config` one for `score`.)"
        ) from error


def _load_file(path: Path) -> Dataset:
    if path.suffix == ".parquet":
        return _load_parquet(path)
    if path.suffix == ".jsonl":
        return _load_jsonl(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} does not exist.")
    kind = "csv" if ".csv" in path.suffixes else "json"
    return load_dataset(kind, data_files=str(path), split="train")


def _load_jsonl(path: Path) -> Dataset:
    rows = read_jsonl(path)
    # A row may leave out keys that others have.
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        # As `load_dataset("json")`: what is not of one type in every row, such as the arguments of tools, stays as it is.
        return Dataset.from_list([{name: row.get(name) for name in names} for row in rows], on_mixed_types="use_json")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: a column holds values of more than one type ({error}).") from error
    except (OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}: a number is too large for a column, or a value is nested too deeply ({error})."
        ) from error


def _load_parquet(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} does not exist.")
    rows = as_rows(read_parquet(path), path)
    if not len(rows):
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    return rows


def read_parquet(path: Path) -> pyarrow.Table:
    """Read the table of a parquet file. Checksums of its pages are validated where they exist.

    Raises:
        ValueError: the file is damaged, or is no parquet file.
    """
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        table.validate(full=True)
        return table
    # Damaged bytes raise many types of errors.
    except Exception as error:
        raise ValueError(f"{path} is no parquet file, or is damaged ({type(error).__name__}: {error}).") from error


def as_rows(table: pyarrow.Table, path: Path) -> Dataset:
    """Return the rows of a table that was read from a file.

    Raises:
        ValueError: columns that `datasets` does not know, or columns of media such as images: their rows may name
            files anywhere.
    """
    try:
        rows = Dataset(table)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged: its columns are not what it says ({type(error).__name__}: {error})."
        ) from error
    for name, feature in rows.features.items():
        if _opens_files(feature):
            raise ValueError(
                f"{path}: the column {name!r} is of type {type(feature).__name__}, whose rows may name files "
                "elsewhere: leave it out. Rows are text, numbers, lists and dicts."
            )
    try:
        rows[:1]  # some unknown types show only when a row is read, for example times of an unknown zone
    except Exception as error:
        raise ValueError(f"{path}: its rows cannot be read ({type(error).__name__}: {error}).") from error
    return rows


def _opens_files(feature: Any) -> bool:
    """Return True for a feature whose decoding may open files that a row names."""
    if isinstance(feature, dict):
        return any(map(_opens_files, feature.values()))
    inner = getattr(feature, "feature", None)  # the feature of a list's items
    return (
        _opens_files(inner)
        if inner is not None
        else hasattr(feature, "decode_example") and not isinstance(feature, Json)
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not a JSON object, or no row at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} does not exist.")
    rows: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                if not row:
                    raise ValueError("it has no column")
            except ValueError as error:  # the errors of json and of unicode are ValueErrors
                raise ValueError(f"{path}, line {number}: not a row of JSONL ({error}).") from error
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty: there is nothing to train on.")
    return rows
