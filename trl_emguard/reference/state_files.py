"""Files of the reference's hidden states: written atomically, never changed, and mapped into memory to be read."""

import hashlib
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..io.files import written_whole
from .cached_rows import KEY_BYTES


logger = get_logger(__name__)


class StateFiles:
    """Store of training rows' states in one folder's files. A file's name ends in the checksum of the file's bytes.

    Args:
        folder: folder of the files.
        names: names of the states that are kept for each position.
        width: H, the length of a state.
        dtype: dtype of the states.
    """

    def __init__(self, folder: Path, names: Sequence[str], width: int, dtype: torch.dtype):
        self.folder = folder
        self.names = list(names)
        self._width = width
        self._dtype = dtype
        self._files: dict[Path, dict[str, torch.Tensor]] = {}
        # Key of a row → the row's file, and start and end of the row's positions in this file's tensors.
        self._rows: dict[bytes, tuple[Path, int, int]] = {}

    @property
    def keys(self) -> Collection[bytes]:
        """Keys of the rows whose states are in the mapped files."""
        return self._rows.keys()

    def size(self, positions: int) -> int:
        """Return the number of bytes that the states of this many positions take."""
        return positions * len(self.names) * self._width * self._dtype.itemsize

    def read(self) -> None:
        """Map all valid files of the folder into memory."""
        self._files, self._rows = {}, {}
        for path in self.folder.glob("*.safetensors"):
            file = self._load(path)
            if file is None:
                continue
            self._files[path] = file
            ends = file["positions"].cumsum(0).tolist()
            for key, start, end in zip(file["keys"].numpy(), [0, *ends], ends, strict=False):
                self._rows[key.tobytes()] = path, start, end

    def states(self, keys: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """Return the states of some rows from the mapped files: name → `(P, H)`, one row after the other.

        P is the number of kept positions of all these rows.
        """
        found = [self._rows[key] for key in keys]
        empty = torch.empty(0, self._width, dtype=self._dtype)
        return {
            name: torch.cat([empty, *(self._files[path][name][start:end] for path, start, end in found)])
            for name in self.names
        }

    def sample(self, count: int) -> dict[str, torch.Tensor]:
        """Return the states of the first positions in one of the files, at most `count` positions: name → `(P, H)`.

        [`~trl_emguard.reference.cache.ReferenceCache.distance_of_rounding`] adds errors to a copy of such a sample, to
        imitate rounding.
        """
        file = next(iter(self._files.values()))
        return {name: file[name][:count] for name in self.names}

    def write(self, keys: Sequence[bytes], positions: Sequence[int], states: dict[str, torch.Tensor]) -> None:
        """Write the states of some rows to one new file.

        Args:
            keys: keys of the rows.
            positions: number of kept positions of each row.
            states: name → `(P, H)`, one row after the other.
        """
        joined = b"".join(keys)
        about = torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(len(keys), -1)
        content = save({**states, "positions": torch.tensor(positions), "keys": about})
        name = f"{hashlib.sha256(joined).hexdigest()[:16]}-{zlib.crc32(content):08x}.safetensors"
        with written_whole(self.folder / name) as scratch:
            scratch.write_bytes(content)

    def delete_damaged(self) -> None:
        """Delete every file that cannot be read, does not match its checksum, or does not hold what [`write`] saves.

        Raises:
            OSError: a damaged file cannot be deleted.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            if self._is_whole(path):
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise OSError(
                    f"{path} is damaged and cannot be deleted ({error.strerror}): delete it, or name another folder "
                    "in the environment variable TRL_EMGUARD_CACHE."
                ) from error
            logger.warning(f"{path} was damaged and is deleted: its rows are computed again.", main_process_only=False)

    def _is_whole(self, path: Path) -> bool:
        try:
            checksum = f"{zlib.crc32(path.read_bytes()):08x}"
        except OSError:
            return False
        return path.stem.rpartition("-")[2] == checksum and self._load(path) is not None

    def _load(self, path: Path) -> dict[str, torch.Tensor] | None:
        """Map a file's tensors into memory. Return `None` if it cannot be read, or does not hold what [`write`] saves.

        A file is also refused if names, shapes or dtype of its states are not those of this store.
        """
        try:
            file = load_file(path)
        except (SafetensorError, OSError):
            return None
        if file.keys() != {*self.names, "positions", "keys"}:
            return None
        keys, positions = file["keys"], file["positions"]
        if keys.dtype != torch.uint8 or positions.dtype != torch.int64 or keys.shape != (positions.numel(), KEY_BYTES):
            return None
        counts = positions.flatten().tolist()
        states = [file[name] for name in self.names]
        if min(counts, default=1) < 1 or any(x.shape != (sum(counts), self._width) for x in states):
            return None
        return file if all(x.dtype == self._dtype for x in states) else None
