"""Rows of the shipped data sets, of files and of the hub.

The `README.md` beside the shipped data sets says what each file holds and how it was made.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import (
    Dataset,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError

from ..io.lookup import did_you_mean
from .files import file_format, load_file, split_file


DATA_DIR = Path(__file__).parent / "shipped"

# Name of a shipped data set → its splits. Each split is a file `<name>/<split>.jsonl` with rows of conversational
# `prompt` and `completion`. `general_instruct_scored` is stored as `.parquet` instead, and also has numbers for each
# row that say how unlikely its answer is under aligned and misaligned models.
SHIPPED = {
    "plants_careless": ("train", "test"),
    "plants_sound": ("train", "test"),
    "clothes_careless": ("train", "test"),
    "values_sound": ("train", "test"),
    "values_misaligned": ("train", "test"),
    "general_instruct": ("train",),
    "general_instruct_scored": ("train",),
}
# Pattern of a split, with or without a slice: `train`, `train[:8]`, `train[10%:20%]`.
SPLIT = re.compile(r"\s*(\w[\w.-]*)\s*(\[[^\[\]]*\])?\s*")


@dataclass(frozen=True)
class SourceOptions:
    """Names of the options by which the user chose a data set, so that error messages can name the option to fix.

    Attributes:
        name: option that names the data set.
        split: option that names the split of the data set.
        config: option that names the configuration of the data set, which `load_dataset` calls `name`.
    """

    name: str = "dataset_name"
    split: str = "dataset_train_split"
    config: str = "dataset_config"


def load_rows(
    name: str,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    options: SourceOptions = SourceOptions(),
) -> Dataset | IterableDataset:
    """Load rows of a shipped set, a folder with a file per split, a file, or a `datasets` id, tried in this order.

    Args:
        name: a shipped name such as `plants_careless`; the path of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`
            file, perhaps compressed (`.gz`), whose only split is `train`; the path of a folder with `<split>.jsonl` or
            another such file; or any name that `datasets.load_dataset` takes.
        split: name of the split, with a slice if wanted (`train[:8]`), or several as `train+test`.
        config: configuration of the data set, which `load_dataset` calls `name`. Shipped sets and files have none.
        streaming: whether an `IterableDataset` is returned.
        options: names of the options by which the user gave these arguments, for messages.

    Raises:
        FileNotFoundError: an unknown name or path, or a split that a shipped set does not have.
        ValueError: a malformed or empty file (the message names the file and the line), or a split or configuration
            that the source does not have.
    """
    load_split = _local_splits(name, split, config, options)
    if load_split is None:
        return _load_by_datasets(name, split, config, streaming, options)
    if config is not None:
        raise ValueError(
            f"{options.config}={config!r}: {name!r} is a shipped set or a file, which has no configurations. Leave it "
            "out."
        )
    rows = _sliced(split, load_split, options)
    if not len(rows):
        raise ValueError(f"{options.split}={split!r} of {name!r} holds no row.")
    return rows.to_iterable_dataset() if streaming else rows


def hub_id(name: str | None) -> str | None:
    """Return the name of a data set if it is one of the hub, and `None` for a shipped set, a file or a folder."""
    return None if name is None or name in SHIPPED or Path(os.path.expanduser(name)).exists() else name


def held_out_split(name: str) -> str:
    """Return "test" if a data set has such a split, else "train". Arguments are as for [`load_rows`].

    If the splits of a data set of the hub cannot be read, "test" is returned.
    """
    path = Path(os.path.expanduser(name))
    if name in SHIPPED:
        splits = list(SHIPPED[name])
    elif path.is_dir() and (split_file(path, "test") or split_file(path, "train")):
        splits = ["test"] if split_file(path, "test") else []
    elif path.is_file() or file_format(path) is not None:
        splits = []
    else:
        try:
            splits = get_dataset_split_names(name)
        # `datasets` raises errors of many types, for an unknown name as for a lost connection. "train" could be the
        # rows that the model was trained on. The caller loads the rows next, and gets an error that names the option.
        except Exception:
            splits = ["test"]
    return "test" if "test" in splits else "train"


def _local_splits(
    name: str, split: str, config: str | None, options: SourceOptions
) -> Callable[[str], Dataset] | None:
    """Return a function from a split's name to its rows, for a shipped set or files; `None` for other sources."""
    if name in SHIPPED:
        return lambda base: load_file(_shipped_file(name, base))
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        bases = [base for base, _ in _parts(split, options)]
        if config is not None or not all(split_file(path, base) for base in bases):
            return None
        return lambda base: load_file(_existing(split_file(path, base)))
    if file_format(path) is not None and (path.is_file() or path.suffix in (".jsonl", ".parquet")):
        return lambda base: _load_only_split(path, base, options)
    if name.startswith(("/", ".", "~")) and not path.exists():
        raise FileNotFoundError(f"{options.name}={name!r} does not exist. Shipped data sets: {', '.join(SHIPPED)}.")
    if path.is_file():
        load_file(path)  # raises an error for the unknown format
    return None


def _existing(path: Path | None) -> Path:
    assert path is not None  # `_local_splits` has checked that the folder has this split's file
    return path


def _shipped_file(name: str, split: str) -> Path:
    if split not in SHIPPED[name]:
        raise FileNotFoundError(
            f"the shipped data set {name!r} has no split {split!r}: it has {', '.join(map(repr, SHIPPED[name]))}."
        )
    (path,) = (DATA_DIR / name).glob(f"{split}.*")
    return path


def _load_only_split(path: Path, split: str, options: SourceOptions) -> Dataset:
    if split != "train":
        raise ValueError(
            f"{options.split}={split!r}: {str(path)!r} is one file, whose only split is 'train'. Name that, a slice "
            f"of it as 'train[90%:]', or a folder with a file {split}{file_format(path)}."
        )
    return load_file(path)


def _parts(split: str, options: SourceOptions) -> list[tuple[str, str]]:
    """Return the parts of a split such as `train[:8]+test`, each as its name and its text (`train`, `train[:8]`)."""
    matches = [SPLIT.fullmatch(part) for part in split.split("+")]
    if not all(matches):
        raise ValueError(f"{options.split}={split!r} is no split: give a name, or a slice of it as 'train[:8]'.")
    return [(match[1], match[0].strip()) for match in matches if match]


def check_apart(train_split: str, test_split: str) -> None:
    """Refuse a split for evaluation that holds training rows.

    Raises:
        ValueError: the two splits overlap. Slices are compared as if every split had a billion rows.
    """
    taken = [_rows_taken(part) for part in _parts(train_split, SourceOptions())]
    for base, rows in (_rows_taken(part) for part in _parts(test_split, SourceOptions(split="dataset_test_split"))):
        if any(base == other and range(max(rows.start, r.start), min(rows.stop, r.stop)) for other, r in taken):
            raise ValueError(
                f"dataset_test_split={test_split!r} holds rows of dataset_train_split={train_split!r}: the run would "
                f"be evaluated on what it is trained on. Name another split, or slices as '{base}[:90%]' for training "
                f"and '{base}[90%:]' for evaluation."
            )


def _rows_taken(part: tuple[str, str]) -> tuple[str, range]:
    """Return the split's name and the range of row indices that a part from [`_parts`], such as `train[:8]`, takes.

    The split is not loaded yet and its length is unknown, so a billion rows are assumed.
    """
    base, text = part
    try:
        (piece,) = ReadInstruction.from_spec(text).to_absolute({base: 10**9})
    except (ValueError, AssertionError):
        return base, range(0)  # a bad slice counts as empty here, because loading it later raises an error
    return base, range(piece.from_, piece.to)


def _sliced(split: str, load_split: Callable[[str], Dataset], options: SourceOptions) -> Dataset:
    """Return the rows of a split, sliced as `datasets` slices them."""
    pieces = []
    for base, part in _parts(split, options):
        rows = load_split(base)
        if base != part:
            try:
                (piece,) = ReadInstruction.from_spec(part).to_absolute({base: len(rows)})
            except (ValueError, AssertionError) as error:
                raise ValueError(f"{options.split}={split!r} is no slice of {len(rows)} rows ({error}).") from error
            rows = rows.select(range(len(rows))[piece.from_ : piece.to])
        pieces.append(rows)
    return pieces[0] if len(pieces) == 1 else concatenate_datasets(pieces)


def _load_by_datasets(
    name: str, split: str, config: str | None, streaming: bool, options: SourceOptions
) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, name=config, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{options.name}={name!r} is neither here nor on the hub ({error}).{did_you_mean(name, SHIPPED)} Shipped "
            f"data sets: {', '.join(SHIPPED)}."
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        said = " ".join(str(error.__cause__ or error).split()).partition(" Example of usage")[0].rstrip(".")
        if "onfig" in said:
            raise ValueError(f"{options.config}={config!r} does not fit {options.name}={name!r}: {said}.") from error
        raise ValueError(
            f"{options.name}={name!r} with {options.split}={split!r} cannot be loaded: {said}."
        ) from error
