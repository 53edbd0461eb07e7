"""Atomic writes of files, a check that a folder is writable, a lock of a folder, and the cache folder."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the path of a scratch file, which replaces `path` if the `with` block ends without an error.

    The scratch file lies in the folder of `path`. A reader of `path` finds either the old content or the complete new
    content, even after a crash of the process or the machine.
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
    """Wait until a file's bytes have reached the disk.

    Raises:
        OSError: the disk is full or broken. Some file systems report this only on a sync, not on the write.
    """
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())


def check_writable(argument: str, folder: str | os.PathLike) -> None:
    """Refuse a folder that no file can be written into. The folder is created if it is missing.

    Args:
        argument: name of the argument that gave the folder, for the error message.
        folder: the folder to try.

    Raises:
        OSError: the folder cannot be made, or a file in it cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(folder)) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise OSError(
            f"{argument}={str(folder)!r} cannot be written to ({error.strerror}), so nothing could be saved: name "
            "another folder, or free some space."
        ) from error


@contextmanager
def locked(argument: str, folder: str | os.PathLike) -> Iterator[None]:
    """Hold a lock on an existing folder, the file `.lock` in it, so that no second process writes there meanwhile.

    The system frees the lock when the process ends, also after a crash. Some systems and file systems have no locks:
    there, nothing is locked.

    Args:
        argument: name of the argument that gave the folder, for the error message.
        folder: the folder to lock.

    Raises:
        ValueError: another process holds the lock.
    """
    with (Path(folder) / ".lock").open("w") as file:
        try:
            import fcntl  # Windows does not have this module

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{argument}={str(folder)!r} is in use by another process, which writes there too: wait for its end, "
                "or name another folder."
            ) from error
        except (ImportError, OSError):
            pass
        yield


def cache_dir() -> Path:
    """Return the folder for files that later runs reuse: `$TRL_EMGUARD_CACHE`, or `~/.cache/trl_emguard`."""
    return Path(os.environ.get("TRL_EMGUARD_CACHE") or "~/.cache/trl_emguard").expanduser()
