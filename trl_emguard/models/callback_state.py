"""State of a Trainer callback in checkpoints: a safetensors file beside the weights that the state belongs to."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io.files import written_whole
from .identity import fingerprint
from .sharding import sharding_engine


class CheckpointedCallback(TrainerCallback):
    """Base class of callbacks that have a state in checkpoints.

    Attributes:
        resumes_from: checkpoint that the run resumes from, set by trainers with the mixin
            [`~trl_emguard.checkpoints.whole.WholeCheckpoints`]. In other trainers it stays `None`.
        has_ended: True if the run that is resumed had been stopped by this callback, so that no step is left to train.
    """

    resumes_from: str | os.PathLike | bool | None = None
    has_ended: bool = False

    def check_steps(self, steps: int) -> None:
        """Raise `ValueError` if the callback cannot do its work in a run of so many steps. By default it can."""


def checkpoint_of_step(output_dir: str, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def save_state(path: Path, model: nn.Module, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> None:
    """Write a callback's state into a checkpoint, with a hash of the model's weights that [`load_state`] compares.

    Args:
        path: file in a checkpoint's folder.
        model: model whose weights the checkpoint holds.
        tensors: tensors of the state, by name.
        facts: texts to store with the tensors, by name.
    """
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as scratch:
        save_file(content, scratch, {**facts, "weights": fingerprint(model)})


def load_state(
    callback: CheckpointedCallback,
    file: str,
    args: Any,
    state: Any,
    model: nn.Module,
    names: Collection[str] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and texts that [`save_state`] wrote into the checkpoint whose weights the model now has.

    Args:
        callback: the callback. Its class is named in the error message.
        file: name of the callback's file in a checkpoint's folder.
        args, state, model: arguments that the Trainer gave to the callback.
        names: names that the tensors must have; by default any names.

    Raises:
        ValueError: the file is damaged, or no checkpoint has a file with tensors of these names for the model's
            weights. Three checkpoints are tried: the one that the trainer names, that of the current step in
            `output_dir`, and that of the config's `resume_from_checkpoint`.
    """
    named = [Path(str(folder)) for folder in (callback.resumes_from, args.resume_from_checkpoint)]
    folders = [named[0], checkpoint_of_step(args.output_dir, state.global_step), named[1]]
    for path in (folder / file for folder in folders):
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as content:
                facts = content.metadata() or {}
                found = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint.") from error
        if facts.get("weights") == fingerprint(model) and (names is None or found.keys() == set(names)):
            return found, facts
    raise ValueError(
        f"{type(callback).__name__} cannot resume: the checkpoint of step {state.global_step} holds no {file} of the "
        "weights that the run resumes with. It was written without the callback or is of another run; or it lies "
        "outside of output_dir, and the trainer is not this package's. Resume from one that holds it, or without the "
        "callback."
    )


def check_whole(callback: TrainerCallback, model: nn.Module) -> None:
    """Refuse, with `ValueError`, a model whose weights are sharded over ranks."""
    engine = sharding_engine(model)
    if engine is not None:
        refuse_sharded(callback, engine)


def refuse_sharded(callback: TrainerCallback, engine: str) -> NoReturn:
    """Raise `ValueError` for a callback under an engine that shards the weights over ranks."""
    raise ValueError(
        f"{type(callback).__name__} does not work under {engine}, where a rank holds only a part of each weight: "
        "train on one device, under DDP or ZeRO-2, or leave it out."
    )
