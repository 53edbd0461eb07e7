"""Whole and torn checkpoints: which of them a run can go on from.

Trainer writes a checkpoint file by file, and looks for the one with the highest number. So a run that was killed while it wrote
would go on from half a checkpoint, or not at all. Here `manifest.json` in the folder says what belongs to it: it is written
before everything else, without files, and replaced at the end, when all ranks are done, by one that lists them all. A folder that
does not agree with its manifest is torn.

A file's size is compared, and its checksum up to 64 MiB: a larger file that keeps its size and changes inside goes unnoticed.
A checkpoint without a manifest, of another trainer, is judged by the structure of its files, which finds what is missing or cut
short.
"""

import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io.files import to_disk, written_whole
from ..io.strict import parse_json


logger = get_logger(__name__)

MANIFEST = "manifest.json"
# Of larger files only the size is compared: to read a checkpoint of 100 GB takes minutes.
CHECKSUM_BYTES = 64 * 2**20


def begin_checkpoint(folder: str | os.PathLike) -> None:
    """Mark a folder as torn, and empty it of what an earlier run left there: its files are about to be written."""
    folder = Path(folder)
    _write_manifest(folder, None)
    for path in folder.iterdir():
        if path.name != MANIFEST:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def finish_checkpoint(folder: str | os.PathLike) -> None:
    """Mark a folder as whole: every process has written its files.

    Raises:
        OSError: a file does not reach the disk.
    """
    folder = Path(folder)
    files = {}
    for name, path in _files(folder).items():
        to_disk(path)
        files[name] = [path.stat().st_size, _checksum(path)]
    _write_manifest(folder, files)


def why_torn(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint; `None` if it is whole."""
    folder = Path(folder)
    if not folder.is_dir():
        return "it is no folder"
    manifest = folder / MANIFEST
    try:
        if not manifest.is_file():
            return _flaw(_files(folder))
        files = parse_json(manifest.read_text(encoding="utf-8"))["files"]
        if not files:
            return "it was never finished"
        for name, (size, checksum) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if checksum is not None and _checksum(path) != checksum:
                return f"{name} has changed"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def newest_whole_checkpoint(
    output_dir: str | os.PathLike, up_to: int | None = None
) -> tuple[int | None, dict[str, str]]:
    """Look for the newest whole checkpoint.

    Args:
        output_dir: of the run.
        up_to: leave out those of later steps.

    Returns:
        Its step, or `None`; and the newer ones, which are torn, by name, with what is wrong with them.
    """
    matches = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*/")]
    torn: dict[str, str] = {}
    for step in sorted((int(match[1]) for match in matches if match), reverse=True):
        if up_to is not None and step > up_to:
            continue
        flaw = why_torn(checkpoint_folder(output_dir, step))
        if flaw is None:
            return step, torn
        torn[f"{PREFIX_CHECKPOINT_DIR}-{step}"] = flaw
    return None, torn


def checkpoint_to_resume(asked: Any, output_dir: str, looks: bool) -> str:
    """The checkpoint that a run goes on from, whole in either case. Every rank calls it.

    Args:
        asked: the user's `resume_from_checkpoint`, a folder or what asks for the newest.
        output_dir: where the newest is looked for.
        looks: whether this rank does: one of every machine, since each may have a disk of its own.

    Raises:
        FileNotFoundError: `asked` is no folder.
        ValueError: it is torn, or there is no whole one.
    """
    if not asks_for_newest(asked):
        if not os.path.isdir(asked):
            raise FileNotFoundError(
                f"resume_from_checkpoint={str(asked)!r} is not a folder: name a checkpoint folder, or `true`."
            )
        flaws = [flaw for flaw in gather_object([why_torn(asked)] if looks else []) if flaw]
        if flaws:
            raise ValueError(
                f"resume_from_checkpoint={str(asked)!r} is a torn checkpoint ({flaws[0]}), as a run leaves it that ends while "
                "it is written. Name another, or `true` for the newest whole one in output_dir. (If you changed it on purpose, "
                f"delete its {MANIFEST}.)"
            )
        return asked
    up_to = None
    while True:
        found = gather_object([newest_whole_checkpoint(output_dir, up_to)] if looks else [])
        steps = {step for step, _ in found}
        torn = ", ".join(f"{name} ({flaw})" for _, names in found for name, flaw in names.items())
        if None in steps:
            holds = f"no whole checkpoint, only torn ones: {torn}. Leave" if torn else "no checkpoint: leave"
            raise ValueError(
                f"resume_from_checkpoint={asked}, but output_dir={output_dir!r} holds {holds} it out to start anew."
            )
        if torn:
            logger.warning(
                f"{output_dir} holds torn checkpoints, which are not resumed from: {torn}. (If you changed one on purpose, "
                f"delete its {MANIFEST}.)"
            )
        up_to = min(steps)
        if len(steps) == 1:
            return checkpoint_folder(output_dir, up_to)


def holds_adapter(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint's weights are those of adapters, and not of a whole model, which Trainer would look at first."""
    names = _files(Path(folder))
    whole = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return not names.keys() & set(whole) and any(name.split("/")[-1].startswith("adapter_model.") for name in names)


def checkpoint_folder(output_dir: str | os.PathLike, step: int) -> str:
    return os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def asks_for_newest(resume_from_checkpoint: str | os.PathLike | bool) -> bool:
    """Whether the newest checkpoint is asked for, and not one by its path: `True`, or `"true"` as a command line has it."""
    return str(resume_from_checkpoint).lower() == "true"


def _write_manifest(folder: Path, files: dict[str, list] | None) -> None:
    with written_whole(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> dict[str, Path]:
    """What belongs to a checkpoint, by its name in the folder. Model cards may be edited; scratch files come and go."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".md", ".tmp"))
    return {path.relative_to(folder).as_posix(): path for path in paths if path != folder / MANIFEST}


def _checksum(path: Path) -> str | None:
    return f"{zlib.crc32(path.read_bytes()):08x}" if path.stat().st_size <= CHECKSUM_BYTES else None


def _is_pickle(path: Path) -> bool:
    """Whether torch wrote it in its form of before version 1.6, whose end cannot be told without reading it."""
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _flaw(files: dict[str, Path]) -> str | None:
    """What can be seen to be wrong with a checkpoint that has no manifest."""
    # Trainer writes it last, on the main process.
    if TRAINER_STATE_NAME not in files:
        return f"{TRAINER_STATE_NAME} is missing"
    for name, path in files.items():
        try:
            if path.suffix == ".json":
                content = json.loads(
                    path.read_text(encoding="utf-8")
                )  # other libraries' files, which may do as they like
                shards = content.get("weight_map", {}).values() if name.endswith(".index.json") else ()
                for missing in sorted(set(shards) - files.keys()):
                    return f"{missing} is missing"
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares what the header says with the file's size
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not _is_pickle(path):
                zipfile.ZipFile(path).close()  # reads the directory at the file's end
        # What damaged bytes raise is no closed list.
        except (OSError, ValueError, AttributeError, RecursionError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{name} is damaged or cut short ({type(error).__name__}: {error})"
    folders = {name.split("/")[0] for name in files if "/" in name}
    if "latest" in files or any(name.startswith("global_step") for name in folders):  # DeepSpeed's own
        tag = files["latest"].read_text(encoding="utf-8").strip() if "latest" in files else None
        return None if tag in folders else "the folder that `latest` names is missing" if tag else "latest is missing"
    weights = [name for name in files if name.endswith((".safetensors", ".bin")) and name != TRAINING_ARGS_NAME]
    if not weights and not any(name.startswith("pytorch_model") for name in folders):
        return "there are no weights"
    # All of the training state, or none (`save_only_model`).
    parts = ("optimizer", "scheduler", "rng_state")
    missing_parts = [part for part in parts if not any(name.startswith(part) for name in files.keys() | folders)]
    if 0 < len(missing_parts) < len(parts):
        return f"{missing_parts[0]} is missing"
    return None
