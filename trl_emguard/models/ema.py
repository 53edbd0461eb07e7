"""Exponential moving average of the weights that a run trains, as a baseline or a remedy without a second training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io.files import written_whole
from .identity import fingerprint
from .sharding import sharding_engine


EMA_FOLDER = "ema"
STATE_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Keeps an exponential moving average (EMA) of the trained weights, and saves it under `<output_dir>/ema`.

    After update t, θ̄ ← d·θ̄ + (1 − d)·θ in fp32, with d = min(decay, (1 + t) / (10 + t)). So the average is one over
    about the last ninth of the run so far, until d reaches `decay`: at 0.995 after 1,790 updates. Without this
    warm-up, 0.995 would leave 92 % of a run of 16 steps at its start. The warm-up is that of TensorFlow's
    `ExponentialMovingAverage(num_updates)`.

    Training only is watched: a run with the callback equals the one without it, bit for bit. The two factors of a LoRA
    update are averaged each by itself. The state lies in every checkpoint, so a run that resumes gives the same
    average.

    ```python
    >>> trainer = EMGuardTrainer(model, args, train_dataset=rows, peft_config=lora, callbacks=[EMACallback()])
    ```

    Args:
        decay: largest share of the old average that an update keeps.

    Raises:
        ValueError: a decay outside of [0, 1), weights that are sharded over ranks, or a checkpoint to resume from that
            holds no average of its weights.
    """

    def __init__(self, decay: float = 0.995):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1.")
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            _check_whole(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        _check_whole(model)
        self.average = {
            name: weight.detach().to(torch.float32, copy=True)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        if state.global_step:
            self._resume(args, state.global_step, model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        updates = state.global_step
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for weight, average in self._pairs(model):
            average.lerp_(weight.float(), 1 - decay)

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.should_save:
            with written_whole(_checkpoint(args.output_dir, state.global_step) / STATE_FILE) as scratch:
                content = {name: average.contiguous() for name, average in self.average.items()}
                save_file(content, scratch, {"decay": repr(self.decay), "weights": fingerprint(model)})

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if not args.should_save:
            return
        averages = {id(weight): average.to(weight.dtype) for weight, average in self._pairs(model)}
        content = model.state_dict()
        # A weight that two modules share has two names.
        content |= {
            name: averages[id(weight)]
            for name, weight in model.named_parameters(remove_duplicate=False)
            if id(weight) in averages
        }
        folder = Path(args.output_dir) / EMA_FOLDER
        model.save_pretrained(folder, state_dict=content)
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yield each averaged weight with its average."""
        for name, weight in model.named_parameters():
            if name in self.average:
                yield weight, self.average[name]

    def _resume(self, args: Any, step: int, model: nn.Module) -> None:
        """Take the average over from the checkpoint whose weights the model has now."""
        folders = [_checkpoint(args.output_dir, step), Path(str(args.resume_from_checkpoint))]
        for path in (folder / STATE_FILE for folder in folders):
            if not path.is_file():
                continue
            try:
                with safe_open(path, "pt") as file:
                    facts, found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint.") from error
            if facts.get("weights") != fingerprint(model) or found.keys() != self.average.keys():
                continue
            if facts["decay"] != repr(self.decay):
                raise ValueError(
                    f"EMACallback has decay={self.decay}, and {path} was averaged with decay={facts['decay']}: resume "
                    "with that."
                )
            for name, average in self.average.items():
                average.copy_(found[name])
            return
        raise ValueError(
            f"EMACallback cannot resume: {folders[0]} holds no {STATE_FILE} of the weights that the run resumes with. "
            "The checkpoint was written without the callback, is of another run, or lies outside of output_dir. "
            "Resume from one that holds an average, or without the callback."
        )


def _checkpoint(output_dir: str, step: int) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _check_whole(model: nn.Module) -> None:
    engine = sharding_engine(model)
    if engine is not None:
        raise ValueError(
            f"EMACallback does not work under {engine}, where a rank holds only a part of each weight: train on one "
            "device, under DDP or ZeRO-2, or leave it out."
        )
