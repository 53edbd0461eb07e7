"""Manifest of a checkpoint: the list of its files, and the check of a checkpoint against that list.

Trainer writes a checkpoint file by file, and resumes from the checkpoint with the highest step. A run that is killed
while it writes a checkpoint would thus resume from half a checkpoint. Therefore `manifest.json` in a checkpoint's
folder lists the checkpoint's files. The manifest is first written without the list. When all ranks have written their
files, a manifest with the list replaces the first one. A checkpoint is corrupt if its files do not match the list, or
if there is no list yet.

File sizes are always compared, but checksums only for files up to 64 MiB. A change inside a larger file that keeps its
size goes unnoticed.

A checkpoint that another trainer wrote has no manifest. In this case the names and the structure of its files are
checked, which reveals missing and truncated files.
"""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..io.files import to_disk, written_whole
from ..io.strict import parse_json


MANIFEST = "manifest.json"
# Trainer's option `enable_jit_checkpoint` puts this file into a checkpoint while it writes the checkpoint, and then
# deletes the file.
JIT_SENTINEL = "checkpoint-is-incomplete.txt"
# A later run in the same folder puts this file into the checkpoints that an earlier run has left there.
EARLIER_RUN = "earlier_run.txt"
# Larger files are compared by size alone, because reading a checkpoint of 100 GB takes minutes.
CHECKSUM_BYTES = 64 * 2**20
# Parts of the training state in a checkpoint. Each entry is the beginning of the names of a part's files (or folder).
# Trainer saves all parts, or no part if `save_only_model` is set, so a checkpoint with only some parts is incomplete.
# The check for missing parts leaves out `OPTIMIZER`, because a complete checkpoint may lack it.
STATE_PARTS = ("optimizer", "scheduler", "rng_state")


# The part of the training state that a complete checkpoint may lack. Trainer can resume without the optimizer's files,
# and users delete these files to save space, because they are larger than the weights.
OPTIMIZER = "optimizer"


def begin_checkpoint(folder: str | os.PathLike) -> None:
    """Mark a checkpoint's folder as unfinished, and delete the files that an earlier run left in the folder."""
    folder = Path(folder)
    _write_manifest(folder, None)
    for path in folder.iterdir():
        # If machines share this disk, one process of each machine runs this loop on the same folder. Another process
        # may just be writing its manifest, so its temporary file must stay. That process may also have deleted a file.
        if path.name == MANIFEST or path.name.startswith(f".{MANIFEST}."):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def finish_checkpoint(folder: str | os.PathLike) -> None:
    """Mark a checkpoint as complete. Call this function after every process has written its files.

    Raises:
        OSError: a file's bytes do not reach the disk, for example because the disk is full.
    """
    folder = Path(folder)
    files = {}
    for name, path in checkpoint_files(folder).items():
        to_disk(path)
        files[name] = [path.stat().st_size, _checksum(path)]
    _write_manifest(folder, files)


def find_flaw(folder: str | os.PathLike) -> str | None:
    """Return a text that says why a checkpoint is corrupt, or `None` if no flaw is found."""
    folder = Path(folder)
    if not folder.is_dir():
        return "it is no folder"
    try:
        if not (folder / MANIFEST).is_file():
            return _flaw_without_manifest(checkpoint_files(folder))
        return _flaw_by_manifest(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    except OSError as error:
        return f"it cannot be read ({error})"


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Return the path of each file of a checkpoint, by the file's name relative to the checkpoint's folder.

    Model cards (`.md`), scratch files (`.tmp`), the manifest, `JIT_SENTINEL` and `EARLIER_RUN` are left out.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".md", ".tmp"))
    left_out = [folder / name for name in (MANIFEST, JIT_SENTINEL, EARLIER_RUN)]
    return {path.relative_to(folder).as_posix(): path for path in paths if path not in left_out}


def _write_manifest(folder: Path, files: dict[str, list] | None) -> None:
    with written_whole(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _checksum(path: Path) -> str | None:
    return f"{zlib.crc32(path.read_bytes()):08x}" if path.stat().st_size <= CHECKSUM_BYTES else None


def _flaw_by_manifest(folder: Path) -> str | None:
    files = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    if not files:
        return "it was never finished"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            if name.startswith(OPTIMIZER):
                continue
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if checksum is not None and _checksum(path) != checksum:
            return f"{name} has changed"
    return None


def _flaw_without_manifest(files: dict[str, Path]) -> str | None:
    # Trainer's main process writes `trainer_state.json` last, so a checkpoint without it is unfinished.
    if TRAINER_STATE_NAME not in files:
        return f"{TRAINER_STATE_NAME} is missing"
    for name, path in files.items():
        try:
            missing = _missing_shard(path, files) if path.suffix == ".json" else None
            _open(path)
        # Damaged bytes raise errors of many types.
        except (OSError, ValueError, AttributeError, RecursionError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{name} is damaged or cut short ({type(error).__name__}: {error})"
        if missing is not None:
            return f"{missing} is missing"
    return _missing_part(files)


def _missing_shard(path: Path, files: Collection[str]) -> str | None:
    """Return the name of a weights file that the JSON file `path` lists and `files` lacks, or `None`.

    Only an index of weights lists such files. Any other JSON file is only parsed.

    Raises:
        ValueError, AttributeError, RecursionError: the JSON file is damaged.
    """
    content = json.loads(path.read_text(encoding="utf-8"))  # other libraries may write JSON that `parse_json` refuses
    shards = content.get("weight_map", {}).values() if path.name.endswith(".index.json") else ()
    return min(set(shards) - set(files), default=None)


def _open(path: Path) -> None:
    """Raise an error if a file with weights or with a training state is truncated."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # compares the header with the file's size
            pass
    elif path.suffix in (".pt", ".pth", ".bin") and not _is_pickle(path):
        zipfile.ZipFile(path).close()  # reads the zip directory at the file's end, which a truncated file lacks


def _is_pickle(path: Path) -> bool:
    """Return True if a file is a pickle, the format that torch wrote before version 1.6.

    Such a file is no zip archive, so it has no zip directory that could be checked.
    """
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _missing_part(files: dict[str, Path]) -> str | None:
    """Return a sentence on missing weights, training state or DeepSpeed files, or `None` if none are missing."""
    folders = {name.split("/")[0] for name in files if "/" in name}
    if "latest" in files or any(name.startswith("global_step") for name in folders):
        # This is a DeepSpeed checkpoint, in which the file `latest` names the folder with DeepSpeed's files.
        tag = files["latest"].read_text(encoding="utf-8").strip() if "latest" in files else None
        return None if tag in folders else "the folder that `latest` names is missing" if tag else "latest is missing"
    weights = [name for name in files if name.endswith((".safetensors", ".bin")) and name != TRAINING_ARGS_NAME]
    if not weights and not any(name.startswith("pytorch_model") for name in folders):
        return "there are no weights"
    missing = [
        part
        for part in STATE_PARTS
        if part != OPTIMIZER and not any(name.startswith(part) for name in files.keys() | folders)
    ]
    return f"{missing[0]} is missing" if 0 < len(missing) < len(STATE_PARTS) - 1 else None
