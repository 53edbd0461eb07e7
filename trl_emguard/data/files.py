"""Files of rows: JSON lines, JSON, CSV and parquet, plain or compressed.

Rows have the values that `datasets.load_dataset` gives them. Strict checks run before `datasets` reads a file, so that
an error names file and line.
"""

import bz2
import codecs
import gzip
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetInfo,
    Json,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)

from ..io.strict import parse_json


# Suffix of a file → name by which `datasets.load_dataset` knows the file's format.
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def file_format(path: Path) -> str | None:
    """Return the suffix of a file's format, such as `.csv` for `a.csv.gz`; `None` for formats not in [`FORMATS`]."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix if name.suffix in FORMATS else None


def split_file(folder: Path, split: str) -> Path | None:
    """Return the file `<split>` with a suffix in [`FORMATS`] from a folder, or `None` if there is no such file.

    The file may be compressed. If there are several, plain files come before compressed ones, and `.jsonl` comes
    before other suffixes.
    """
    names = [f"{split}{suffix}{packed}" for packed in ("", *COMPRESSED) for suffix in FORMATS]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load_file(path: Path) -> Dataset:
    """Load the rows of a file. Its suffix tells the format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed or empty file; the message names the file, and for JSONL the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} does not exist.")
    suffix = file_format(path)
    if suffix == ".parquet" and path.suffix == suffix:
        rows = as_rows(read_parquet(path), path)
    elif suffix is None:
        raise ValueError(f"{path} ends in none of {', '.join(FORMATS)}, so its format is not known.")
    else:
        rows = _load_text(path, suffix)
    if not len(rows):
        raise _empty(path)
    return rows


def _load_text(path: Path, suffix: str) -> Dataset:
    """Decompress a file if needed, check it if it holds JSON, and load its rows through `datasets` or pyarrow."""
    with tempfile.TemporaryDirectory() as folder:
        # The file gets a plain name here, because `datasets` reads `*` and `[` in a path as a pattern.
        plain = Path(folder, f"rows{suffix}")
        if path.suffix in COMPRESSED:
            try:
                with COMPRESSED[path.suffix](path, "rb") as source, plain.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise ValueError(f"{path} cannot be decompressed ({error}).") from error
        else:
            plain.symlink_to(path.resolve())
        if suffix == ".parquet":
            return as_rows(read_parquet(plain), path)
        options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
        if FORMATS[suffix] == "json":
            _check_json(plain, path, suffix)
            _drop_blank_lines(plain)
            # `datasets` infers columns and types from the first chunk, and may fail on a new key or type in a later
            # chunk. Therefore one chunk holds the whole file. Rows that look like an agent's log ("agent traces") are
            # read without the conversion that `datasets` would make.
            options = {"chunksize": plain.stat().st_size + 1, "parse_agent_traces": False}
        elif not plain.stat().st_size:
            raise _empty(path)
        try:
            with _quiet():
                rows = load_dataset(
                    FORMATS[suffix],
                    data_files=str(plain),
                    split="train",
                    cache_dir=str(Path(folder, "cache")),
                    keep_in_memory=True,
                    **options,
                )
        # `datasets` raises errors of many types, often wrapped in a general error. Every error is therefore caught,
        # and the message names the wrapped error if there is one.
        except Exception as error:
            cause = error.__cause__ or error
            said = " ".join(str(cause).split()).replace(str(plain), path.name)
            raise ValueError(f"{path} cannot be read as {suffix[1:]} ({type(cause).__name__}: {said}).") from error
    return Dataset(rows.data, info=DatasetInfo(features=rows.features))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets` while the body of a `with` statement runs."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _empty(path: Path) -> ValueError:
    return ValueError(f"{path} is empty: there is nothing to train on.")


def _check_json(file: Path, path: Path, suffix: str) -> None:
    """Refuse a file that does not hold rows as JSON.

    Args:
        file: file to read, decompressed.
        path: name of the file as the user gave it, for messages.
        suffix: suffix of the format. A `.json` file may hold one list of objects, or one object, instead of lines.
    """
    if suffix == ".json":
        with file.open("rb") as content:
            if not _is_lines(content):
                _check_document(file, path)
                return
    rows = 0
    for _ in _lines(file, path):
        rows += 1
    if not rows:
        raise _empty(path)


def _drop_blank_lines(file: Path) -> None:
    """Replace a file of JSON by a copy without blank lines and indents, if it has any.

    `datasets` looks through all lines for values of mixed types. If a line is blank, it silently leaves that out. It
    also takes a list with whitespace before it for lines. No value changes, because no JSON text goes over a line end.
    """

    def lines(source: IO[bytes]) -> Iterator[bytes]:
        yield source.readline().removeprefix(codecs.BOM_UTF8)
        yield from source

    with file.open("rb") as source:
        # A carriage return within a line ends a line for `datasets`. Files that end lines with `\r\r\n` have one.
        if not any(line[:1].isspace() or len(line.splitlines()) > 1 for line in lines(source)):
            return
    copy = file.with_name(f"copy_of_{file.name}")
    with file.open("rb") as source, copy.open("wb") as target:
        stripped = (line.replace(b"\r", b" ").strip() for line in lines(source))
        target.writelines(line + b"\n" for line in stripped if line)
    copy.replace(file)


def _is_lines(content: IO[bytes]) -> bool:
    """Return True if a `.json` file has an object per line: if its first line is a whole object.

    Blank lines are skipped. A file without other lines counts as one with an object per line, too.
    """
    first = next((line for line in content if line.strip(codecs.BOM_UTF8 + b" \t\r\n")), b"")
    try:
        return isinstance(parse_json(first.decode("utf-8-sig")), dict)
    except ValueError:
        return not first


def _check_document(file: Path, path: Path) -> None:
    try:
        value = parse_json(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if isinstance(value, list) and not value:
        raise _empty(path)
    if isinstance(value, list) and not all(isinstance(row, dict) for row in value):
        number, row = next((i, row) for i, row in enumerate(value) if not isinstance(row, dict))
        raise ValueError(f"{path}, row {number}: expected an object, got {type(row).__name__}.")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file without the conversions that `datasets` would make.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object with at least one key, or the file has no row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {str(path)!r} does not exist.")
    rows = list(_lines(path, path))
    if not rows:
        raise _empty(path)
    return rows


def _lines(file: Path, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines. Error messages name the file `path`."""
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                if not row:
                    raise ValueError("it has no column")
            except ValueError as error:  # the errors of json and of unicode are ValueErrors
                raise ValueError(f"{path}, line {number}: not a row of JSONL ({error}).") from error
            yield row


def read_parquet(path: str | os.PathLike) -> pyarrow.Table:
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
        ValueError: a column has a type that `datasets` does not know, or holds media such as images. A row of media
            may name a file anywhere, which would be opened.
    """
    try:
        rows = Dataset(table)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged: its columns are not what it says ({type(error).__name__}: {error})."
        ) from error
    for name, feature in rows.features.items():
        if opens_files(feature):
            raise ValueError(
                f"{path}: the column {name!r} is of type {type(feature).__name__}, whose rows may name files "
                "elsewhere: leave it out. Rows are text, numbers, lists and dicts."
            )
    # Some columns raise an error only when a row is read, for example columns of times with an unknown time zone.
    try:
        rows[:1]
    except Exception as error:
        raise ValueError(f"{path}: its rows cannot be read ({type(error).__name__}: {error}).") from error
    return rows


def opens_files(feature: Any) -> bool:
    """Return True for a feature whose decoding may open files that a row names."""
    if isinstance(feature, dict):
        return any(map(opens_files, feature.values()))
    inner = getattr(feature, "feature", None)  # the feature of a list's items
    return (
        opens_files(inner)
        if inner is not None
        else hasattr(feature, "decode_example") and not isinstance(feature, Json)
    )
