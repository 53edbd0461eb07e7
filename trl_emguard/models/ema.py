"""Exponential moving average of the weights that a run trains, as a baseline or a remedy without a second training."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from .callback_state import check_whole, checkpoint_of_step, load_state, save_state


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
        self._is_saved = False  # the checkpoint that is being written has the average

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
        """Write the average into the checkpoint's folder, before [`WholeCheckpoints`] marks it as whole."""
        self._is_saved = True
        save_state(Path(folder) / STATE_FILE, model, self.average, {"decay": repr(self.decay)})

    def on_save(self, args, state, control, model=None, **kwargs):
        # Stock trainers do not call `save_into`.
        if args.should_save and not self._is_saved:
            self.save_into(checkpoint_of_step(args.output_dir, state.global_step), state, model)
        self._is_saved = False

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
