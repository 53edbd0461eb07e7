"""Exponential moving average of trained weights: a model that may be less misaligned, without a second training.

It serves as a baseline that a defense should beat, or as a remedy.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .callback_state import CheckpointedCallback, check_whole, checkpoint_of_step, load_state, save_state


EMA_FOLDER = "ema"
STATE_FILE = "ema.safetensors"


class EMACallback(CheckpointedCallback):
    """Callback that keeps an exponential moving average (EMA) of the trained weights.

    The average is saved to `<output_dir>/ema` at the end of training.

    After update t, the average θ̄ of the weights θ becomes d·θ̄ + (1 − d)·θ in fp32, with
    d = min(decay, (1 + t) / (10 + t)). So the average covers about the last ninth of the updates so far, until d
    reaches `decay`. A decay of 0.995 is reached after 1,790 updates. Without this warm-up of d, and with a decay of
    0.995, the initial weights would still make up 92 % of the average after 16 updates. TensorFlow's
    `ExponentialMovingAverage(num_updates)` has the same warm-up.

    The callback does not change training: the trained weights are the same as without it, bit for bit. A LoRA update's
    two factors are averaged separately. Every checkpoint contains the average, so a resumed run and an uninterrupted
    one give the same average.

    ```python
    >>> trainer = EMGuardTrainer(model, args, train_dataset=rows, peft_config=lora, callbacks=[EMACallback()])
    ```

    Args:
        decay: largest value of d, the share of the old average that an update keeps.

    Raises:
        ValueError: the decay is outside of [0, 1), the weights are sharded over ranks, or the run resumes from a
            checkpoint without an average of its weights or with an average that was made with another decay.
    """

    def __init__(self, decay: float = 0.995):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1.")
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}
        # True from the call of `save_into` for a checkpoint to the end of `on_save` for the same checkpoint, so that
        # `on_save` does not write the average again.
        self._is_saved = False

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            check_whole(self, model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_whole(self, model)
        self._is_saved = False
        self.average = {
            name: weight.detach().to(torch.float32, copy=True)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        if state.global_step:
            found, facts = load_state(self, STATE_FILE, args, state, model, self.average)
            if facts["decay"] != repr(self.decay):
                raise ValueError(
                    f"EMACallback has decay={self.decay}, and the checkpoint of step {state.global_step} was averaged "
                    f"with decay={facts['decay']}: resume with that."
                )
            for name, average in self.average.items():
                average.copy_(found[name])

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        updates = state.global_step
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for weight, average in self._pairs(model):
            average.lerp_(weight.float(), 1 - decay)

    def save_into(self, folder, state, model):
        """Write the average into a checkpoint's folder.

        Trainers with the mixin [`~trl_emguard.checkpoints.whole.WholeCheckpoints`] call this method before they mark
        the folder as complete.
        """
        self._is_saved = True
        save_state(Path(folder) / STATE_FILE, model, self.average, {"decay": repr(self.decay)})

    def on_save(self, args, state, control, model=None, **kwargs):
        # Only trainers with [`WholeCheckpoints`] call `save_into`. For other trainers, the average is written here.
        if args.should_save and not self._is_saved:
            self.save_into(checkpoint_of_step(args.output_dir, state.global_step), state, model)
        self._is_saved = False

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if not args.should_save:
            return
        averages = {id(weight): average.to(weight.dtype) for weight, average in self._pairs(model)}
        content = model.state_dict()
        # A weight that two modules share has two names, and both get the average.
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
