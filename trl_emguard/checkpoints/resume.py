"""Search for the checkpoint that a run resumes from."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from peft import PeftConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .manifest import EARLIER_RUN, MANIFEST, checkpoint_files, find_flaw


logger = get_logger(__name__)

# Names of the files in which Trainer saves the weights of a whole model, or the index of their shards. An adapter's
# weights have other file names.
WHOLE_WEIGHTS = {
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
}
# Fields of a LoRA adapter's config that say which layers it has and how its weights become an update of the base
# model's weights. A resume with other values would rescale what was learned, or leave a part of it out.
ADAPTER_FIELDS = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "modules_to_save"),
)
# Fields in whose lists the order counts: token i has row i of the weights, and layers are stacked in their order. PEFT
# only looks up names or layers in the other lists, and writes them in any order.
ORDERED_FIELDS = ("layer_replication", "trainable_token_indices")


def checkpoint_folder(output_dir: str | os.PathLike, step: int) -> str:
    """Return the path of the checkpoint that a run writes at a step."""
    return os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def asks_for_newest(resume_from_checkpoint: str | os.PathLike | bool) -> bool:
    """Return whether the user asks for the newest checkpoint: by `True`, or by `"true"` on a command line."""
    return str(resume_from_checkpoint).lower() == "true"


def holds_adapter(folder: str | os.PathLike) -> bool:
    """Return True if a checkpoint has an adapter's weights, and no weights of a whole model.

    From a folder with both, Trainer loads the whole model's weights if they are one file, and ignores the adapter's.
    """
    names = checkpoint_files(Path(folder)).keys()
    return not names & WHOLE_WEIGHTS and any(name.split("/")[-1].startswith("adapter_model.") for name in names)


def why_other_adapter(folder: str | os.PathLike, adapters: Mapping[str, PeftConfig]) -> str | None:
    """Return why a checkpoint's LoRA adapters are not those of a model; `None` if they are, or if it stores no config.

    The text continues a message that begins with the checkpoint's name.

    Args:
        folder: folder of the checkpoint.
        adapters: name → config of the model's adapters.
    """
    for name, config in adapters.items():
        # PEFT gives each adapter a folder of its name, except for the adapter "default".
        file = Path(folder, "" if name == "default" else name, "adapter_config.json")
        if config.peft_type != "LORA" or not file.is_file():
            continue
        now, then = config.to_dict(), json.loads(file.read_text(encoding="utf-8"))
        values = [(field, then.get(field, now.get(field)), now.get(field)) for field in ADAPTER_FIELDS]
        differing = (value for value in values if _field(value[0], value[1]) != _field(value[0], value[2]))
        other = "; ".join(_told(*value) for value in differing)
        if other:
            return f"holds an adapter of another config ({other}). Resume with the same config, or start anew."
    return None


def _field(name: str, value: Any) -> Any:
    """Return a field of an adapter's config in a form that is the same in memory and in a file."""
    value = json.loads(json.dumps(value, default=list))  # turns sets and tuples into lists
    if value is False or value in ("", [], {}):
        return None
    return sorted(value, key=str) if isinstance(value, list) and name not in ORDERED_FIELDS else value


def _are_names(value: Any) -> bool:
    return isinstance(value, list | set | tuple) and all(isinstance(name, str) for name in value)


def _told(field: str, before: Any, after: Any) -> str:
    """Return text on a field that differs. PEFT may name hundreds of layers, of which a few are told."""
    if not (_are_names(before) and _are_names(after) and max(len(before), len(after)) > 8):
        return f"{field}={before!r}, and not {after!r}"
    sides = {"the checkpoint": {*before} - {*after}, "this run": {*after} - {*before}}
    texts = [
        f"{', '.join(sorted(names)[:3])}{', …' * (len(names) > 3)} only in {side}"
        for side, names in sides.items()
        if names
    ]
    return f"{field}: {'; '.join(texts)}"


def checkpoint_steps(output_dir: str | os.PathLike) -> list[int]:
    """Return the steps of all checkpoints in a run's folder, including corrupt ones, the newest first."""
    matches = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(output_dir).glob("*/")]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def is_of_earlier_run(checkpoint: str | os.PathLike) -> bool:
    """Return True if a later run in the same folder has marked a checkpoint as one of an earlier run."""
    return os.path.isfile(os.path.join(checkpoint, EARLIER_RUN))


def mark_earlier_runs(output_dir: str | os.PathLike, step: int) -> None:
    """Mark checkpoints whose step is later than the run's own: an earlier run has left them in the folder.

    Args:
        output_dir: folder of the run.
        step: step that the run has reached; 0 at the start of a new run, which marks all checkpoints.
    """
    for folder in (checkpoint_folder(output_dir, later) for later in checkpoint_steps(output_dir) if later > step):
        if not is_of_earlier_run(folder):
            try:
                # Trainer deletes the checkpoints with the oldest times first, so a mark must not make one newer.
                before = os.stat(folder)
                Path(folder, EARLIER_RUN).write_text("A later run in this folder began before this step.\n", "utf-8")
                os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
            except OSError as error:
                # Another user's checkpoint, for example. The run itself can go on.
                logger.warning(f"{folder} is of an earlier run, and cannot be marked as such ({error}).")


def nothing_to_resume(asked: Any, output_dir: str, holds: str = "no checkpoint: leave") -> ValueError:
    """Return the error for a run that asks for the newest checkpoint, and finds none that it can resume from."""
    return ValueError(
        f"resume_from_checkpoint={asked}, but output_dir={output_dir!r} holds {holds} it out to start anew."
    )


def newest_whole_checkpoint(
    output_dir: str | os.PathLike,
    up_to: int | None = None,
    why_foreign: Callable[[str], str | None] | None = None,
) -> tuple[int | None, dict[str, str]]:
    """Find the newest whole checkpoint: one that was written completely, is undamaged, and is of the latest run.

    Args:
        output_dir: folder of the run.
        up_to: latest step to consider; by default all steps are considered.
        why_foreign: function that gets a whole checkpoint's folder. It returns the reason why the checkpoint belongs
            to another run, or `None` if the checkpoint may belong to this run. By default no checkpoint is refused.

    Returns:
        The step of the checkpoint, or `None` if there is no such checkpoint. Beside the step, name → flaw of the newer
        checkpoints that were refused: they are corrupt, or belong to another run or to an earlier run in this folder.
    """
    corrupt: dict[str, str] = {}
    for step in checkpoint_steps(output_dir):
        if up_to is not None and step > up_to:
            continue
        folder = checkpoint_folder(output_dir, step)
        flaw = find_flaw(folder)
        if flaw is None and why_foreign is not None:
            flaw = why_foreign(folder)
        if flaw is None and is_of_earlier_run(folder):
            flaw = "it is of an earlier run in this folder; name it to resume from it"
        if flaw is None:
            return step, corrupt
        corrupt[f"{PREFIX_CHECKPOINT_DIR}-{step}"] = flaw
    return None, corrupt


def find_flaw_on_all(folder: str | os.PathLike, should_look: bool) -> str | None:
    """Check a checkpoint on every machine, and return the first flaw, or `None`. Every rank must call this function.

    Args:
        folder: folder of the checkpoint.
        should_look: True on one rank of each machine. This rank reads the checkpoint from its machine's disk.
    """
    return next(filter(None, gather_object([find_flaw(folder)] if should_look else [])), None)


def checkpoint_to_resume(
    asked: Any, output_dir: str, should_look: bool, why_foreign: Callable[[str], str | None] | None = None
) -> str:
    """Return the checkpoint to resume from: complete and undamaged on every machine. Every rank must call this.

    Args:
        asked: the user's `resume_from_checkpoint`: a folder, or `True` for the newest checkpoint.
        output_dir: folder in which the newest checkpoint is searched.
        should_look: True on one rank of each machine. This rank reads checkpoints from its machine's disk.
        why_foreign: function as for [`newest_whole_checkpoint`]. Only the search for the newest checkpoint uses this
            function, and skips checkpoints of other runs. A folder that the user names is not checked by it.

    Raises:
        FileNotFoundError: `asked` is no folder.
        ValueError: the named checkpoint is corrupt, or the search finds no whole checkpoint.
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
    """Return the newest checkpoint, complete and undamaged on every machine, that `why_foreign` does not refuse."""
    up_to = None
    while True:
        found = gather_object([newest_whole_checkpoint(output_dir, up_to, why_foreign)] if should_look else [])
        steps = {step for step, _ in found}
        corrupt = ", ".join(f"{name} ({flaw})" for _, names in found for name, flaw in names.items())
        if None in steps:
            holds = f"no whole checkpoint of this run, only {corrupt}. Leave" if corrupt else "no checkpoint: leave"
            raise nothing_to_resume(asked, output_dir, holds)
        if corrupt:
            logger.warning(
                f"{output_dir} holds checkpoints that are corrupt or of another run, which are not resumed from: "
                f"{corrupt}. (If you changed a corrupt one on purpose, delete its {MANIFEST}.)"
            )
        up_to = min(steps)
        if len(steps) == 1:
            return checkpoint_folder(output_dir, up_to)
