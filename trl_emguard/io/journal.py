"""Journals: JSONL files that an interrupted computation is resumed from."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import written_whole
from .strict import parse_json


class ForeignJournalError(ValueError):
    """Raised if a file is not a journal, or is the journal of another computation."""


class Journal:
    """A JSONL file of records. Its first line says which computation the records belong to.

    ```python
    >>> journal = Journal("answers.jsonl", {"answers_of": "3f2a"})
    >>> done = journal.read()
    >>> journal.start(done)
    >>> journal.append(["the next record"])
    ```

    Args:
        path: the file. It need not exist.
        header: small dict for the first line. It identifies the computation, for example by a checksum of everything
            that the records depend on.
    """

    def __init__(self, path: str | os.PathLike, header: dict[str, str]):
        self.path = Path(path)
        self.header = header

    def read(self) -> list[Any]:
        """Return the complete records, or an empty list if the file does not exist.

        A last line without a newline was interrupted while it was written, and is left out.

        Raises:
            ForeignJournalError: the first line is not the header.
            ValueError: a line is not JSON.
        """
        if not self.path.is_file():
            return []
        # Lines are split as bytes, because an interrupted last line may end inside a character. `str.splitlines`
        # would also split at rare characters inside a record, such as U+2028. CRLF and CR count as line ends, just as
        # Python's text mode reads them.
        content = self.path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, interrupted = content.split(b"\n")
        try:
            if lines:
                is_own = parse_json(lines[0].decode("utf-8")) == self.header
            else:
                is_own = json.dumps(self.header).encode().startswith(interrupted)
        except ValueError:
            is_own = False
        if not is_own:
            raise ForeignJournalError(f"its first line is not {json.dumps(self.header)}")
        return [parse_json(line.decode("utf-8")) for line in lines[1:]]

    def resume(self, kind: str, *fields: str) -> list[dict[str, Any]]:
        """Return the records, each a dict with a `key`, and rewrite the file without an interrupted last line.

        Args:
            kind: name of the computation that writes such files, for the error message.
            fields: names of the fields that every record must have besides `key`.

        Raises:
            ValueError: the file belongs to another computation or is damaged. The file is left unchanged.
        """
        try:
            records = self.read()
            _ = {record["key"]: [record[name] for name in fields] for record in records}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged or no file of {kind} ({error}): delete it.") from error
        self.start(records)
        return records

    def start(self, records: Iterable[Any] = ()) -> None:
        """Write the file anew, with the header and the given `records`, in one atomic step."""
        with written_whole(self.path) as scratch:
            self._write(scratch, [self.header, *records])

    def append(self, records: Iterable[Any]) -> None:
        """Add records to the end of the file and flush them. On an error, the file is cut back to its old content."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self._write(self.path, records)
        except BaseException:
            if self.path.exists():
                os.truncate(self.path, size)
            raise

    @staticmethod
    def _write(path: Path, records: Iterable[Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def record_key(*parts: Any) -> str:
    """Return the key of a record: a checksum of everything that the record depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
