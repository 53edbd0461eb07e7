"""Files that are written whole or not at all."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A scratch file beside `path` to write to, which takes its place when the block ends without an error.

    Whoever reads `path` meanwhile, or after the process or the machine has died, finds what was there before or all of the new.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield scratch
        to_disk(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def to_disk(path: str | os.PathLike) -> None:
    """Wait until a file's bytes are on the disk and not only in the machine's memory.

    Raises:
        OSError: the disk is full or broken, as some file systems say only now.
    """
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())


def check_writable(argument: str, folder: str | os.PathLike) -> None:
    """Raises `OSError`, which names the argument that named the folder, if no file can be written into it. The folder is made."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(folder)) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise OSError(
            f"{argument}={str(folder)!r} cannot be written to ({error.strerror}), so nothing could be saved: name another "
            "folder, or free some space."
        ) from error
