"""Search for the checkpoint that a run resumes from."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .manifest import MANIFEST, checkpoint_files, find_flaw


logger = get_logger(__name__)

# Files to which Trainer saves all weights of a model.
WHOLE_WEIGHTS = {
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
}


def checkpoint_folder(output_dir: str | os.PathLike, step: int) -> str:
    """Return the folder of the checkpoint of a step."""
    return os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def asks_for_newest(resume_from_checkpoint: str | os.PathLike | bool) -> bool:
    """Return whether the newest checkpoint is asked for: with `True`, or `"true"` from a command line."""
    return str(resume_from_checkpoint).lower() == "true"


def holds_adapter(folder: str | os.PathLike) -> bool:
    """Return whether a checkpoint has adapter weights and no whole model, which Trainer would load instead."""
    names = checkpoint_files(Path(folder)).keys()
    return not names & WHOLE_WEIGHTS and any(name.split("/")[-1].startswith("adapter_model.") for name in names)


def newest_whole_checkpoint(
    output_dir: str | os.PathLike,
    up_to: int | None = None,
    why_foreign: Callable[[str], str | None] | None = None,
) -> tuple[int | None, dict[str, str]]:
    """Find the newest whole checkpoint.

    Args:
        output_dir: folder of the run.
        up_to: latest step that is considered; all by default.
        why_foreign: function from a complete checkpoint to the reason why it belongs to another run, or `None`.

    Returns:
        The checkpoint's step, or `None`; and the newer checkpoints, which are corrupt or belong to another run, as
        name -> flaw.
    """
    matches = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*/")]
    corrupt: dict[str, str] = {}
    for step in sorted((int(match[1]) for match in matches if match), reverse=True):
        if up_to is not None and step > up_to:
            continue
        folder = checkpoint_folder(output_dir, step)
        flaw = find_flaw(folder)
        if flaw is None and why_foreign is not None:
            flaw = why_foreign(folder)
        if flaw is None:
            return step, corrupt
        corrupt[f"{PREFIX_CHECKPOINT_DIR}-{step}"] = flaw
    return None, corrupt


def find_flaw_on_all(folder: str | os.PathLike, should_look: bool) -> str | None:
    """Return what is wrong with a checkpoint on any machine, or `None`. Every rank must call this function.

    Args:
        should_look: True on one rank of each machine, which looks at that machine's disk.
    """
    return next(filter(None, gather_object([find_flaw(folder)] if should_look else [])), None)


def checkpoint_to_resume(
    asked: Any, output_dir: str, should_look: bool, why_foreign: Callable[[str], str | None] | None = None
) -> str:
    """Return the checkpoint to resume from, which is whole on every machine. Every rank must call this function.

    Args:
        asked: the user's `resume_from_checkpoint`: a folder, or `True` for the newest.
        output_dir: folder in which the newest is searched.
        should_look: True on one rank of each machine, which looks at that machine's disk.
        why_foreign: function from a complete checkpoint to the reason why it belongs to another run, or `None`. The
            newest checkpoint is searched among those of this run.

    Raises:
        FileNotFoundError: `asked` is no folder.
        ValueError: the checkpoint is corrupt, or there is no whole one.
    """
    if asks_for_newest(asked):
        return _newest_on_all(asked, output_dir, should_look, why_foreign)
    if not os.path.isdir(asked):
        raise FileNotFoundError(
            f"resume_from_checkpoint={str(asked)!r} is not a folder: name a checkpoint folder, or `true`."
        )
    flaw = find_flaw_on_all(asked, should_look)
    if flaw:
        raise ValueError(
            f"resume_from_checkpoint={str(asked)!r} is a corrupt checkpoint ({flaw}), as a run leaves it that is "
            "interrupted while it writes. Name another, or `true` for the newest whole one in output_dir. (If you "
            f"changed it on purpose, delete its {MANIFEST}.)"
        )
    return asked


def _newest_on_all(
    asked: Any, output_dir: str, should_look: bool, why_foreign: Callable[[str], str | None] | None
) -> str:
    """Return the newest checkpoint that is whole on every machine."""
    up_to = None
    while True:
        found = gather_object([newest_whole_checkpoint(output_dir, up_to, why_foreign)] if should_look else [])
        steps = {step for step, _ in found}
        corrupt = ", ".join(f"{name} ({flaw})" for _, names in found for name, flaw in names.items())
        if None in steps:
            holds = f"no whole checkpoint of this run, only {corrupt}. Leave" if corrupt else "no checkpoint: leave"
            raise ValueError(
                f"resume_from_checkpoint={asked}, but output_dir={output_dir!r} holds {holds} it out to start anew."
            )
        if corrupt:
            logger.warning(
                f"{output_dir} holds checkpoints that are corrupt or of another run, which are not resumed from: "
                f"{corrupt}. (If you changed one on purpose, delete its {MANIFEST}.)"
            )
        up_to = min(steps)
        if len(steps) == 1:
            return checkpoint_folder(output_dir, up_to)
