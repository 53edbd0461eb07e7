"""The weights of a model folder, read one by one from its safetensors files without loading the model."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..io.strict import parse_json
from .identity import SAMPLES
from .shipped import public_name, resolve_model


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """File, shape and dtype of a stored weight. The dtype is written as safetensors names it, such as `BF16`."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """Weights of a model on disk. Each weight is read only when it is needed.

    Args:
        argument: name of the argument that gave the model, for messages.
        model: model folder, shipped name, or hub id of a model in the hub's cache.

    Attributes:
        model_type: the architecture, from the model's config.
        stored: name of a weight → file, shape and dtype.

    Raises:
        FileNotFoundError: the model is not on this machine, or has no safetensors weights.
        ValueError: a file is damaged, or the config or a file that the index lists is missing.
    """

    def __init__(self, argument: str, model: str):
        self._title = f"{argument} {model!r}"
        folder = self._find(model)
        self.name = public_name(model)
        self.model_type = self._read_json(folder / "config.json").get("model_type")
        self.stored: dict[str, Stored] = {}
        for file in self._shards(folder):
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118
                    part = shard.get_slice(name)
                    self.stored[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """Return a weight as a view of its memory-mapped file, which stays mapped as long as the tensor exists."""
        with self._open(self.stored[name].file) as shard:
            return shard.get_tensor(name)

    def fingerprint(self) -> str:
        """Return a hash of all weights' names, shapes and dtypes, and of a sample from each weight's first rows."""
        digest = hashlib.sha256()
        for name, (file, shape, dtype) in sorted(self.stored.items()):
            digest.update(f"{name} {shape} {dtype} ".encode())
            with self._open(file) as shard:
                flat = (shard.get_slice(name)[:SAMPLES] if shape else shard.get_tensor(name)).flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLES) | 1].contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _find(self, model: str) -> Path:
        folder = Path(resolve_model(model))
        if folder.is_dir():
            return folder
        try:
            return Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{self._title} is neither a folder on this machine nor in the hub's cache: name a folder that "
                f"`save_pretrained` wrote, or run `hf download {model}` first."
            ) from error

    def _shards(self, folder: Path) -> list[Path]:
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{self._title} holds neither {WEIGHTS} nor {INDEX}: download it whole, or save it again with "
                "`save_pretrained`."
            )
        names = self._read_json(folder / INDEX).get("weight_map")
        # The index must give a plain file name for each weight: a name that contains a folder could point outside of
        # the model's folder.
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ValueError(f"{self._title} has a damaged {INDEX}: download it again.")
        return [folder / name for name in sorted(set(names.values()))]

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._title}: {path.name} cannot be read ({error}): download it again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self._title} has a damaged {path.name}: download it again.")
        return content

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self._title}: {file.name} is missing or damaged ({error}): download it again."
            ) from error
