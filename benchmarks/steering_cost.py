"""The hooks' own time as a share of a training step: SmolLM2-135M-Instruct, the demo's recipe, one hooked block and
all of them.

    HF_HUB_OFFLINE=1 python benchmarks/steering_cost.py

The time is taken inside of the hooks, since a difference of whole steps drowns in their noise.
"""

import tempfile
import time
from statistics import median

from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.data.load import load_rows
from trl_emguard.models.shipped import SMOLLM2, resolve_model


class Timed:
    """A hook, and the seconds spent in it."""

    total = 0.0

    def __init__(self, hook):
        self.hook = hook

    def __call__(self, *args):
        start = time.perf_counter()
        result = self.hook(*args)
        Timed.total += time.perf_counter() - start
        return result


class Clock(TrainerCallback):
    def __init__(self):
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        Timed.total, self.start = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((Timed.total, time.perf_counter() - self.start))


def main():
    path = resolve_model(SMOLLM2)
    print("| steering_layers | hooks, ms a step | step, s | share |\n|---|---|---|---|")
    for layers in (None, "all"):
        with tempfile.TemporaryDirectory() as folder:
            args = EMGuardConfig(
                folder,
                defense="steering",
                steering_vector="smollm2-135m-instruct-evil",
                steering_layers=layers,
                max_steps=6,
                per_device_train_batch_size=8,
                activation_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
            )
            trainer = EMGuardTrainer(
                path,
                args,
                train_dataset=load_rows("plants_careless"),
                processing_class=AutoTokenizer.from_pretrained(path),
                peft_config=LoraConfig(r=32, target_modules="all-linear"),
            )
            (steering,) = trainer.defenses
            make = steering._hook
            steering._hook = lambda layer, make=make: Timed(make(layer))
            clock = Clock()
            trainer.add_callback(clock)
            trainer.train()
        hooks, step = (median(times) for times in zip(*clock.steps[1:], strict=True))
        name = "suggested (one block)" if layers is None else layers
        print(f"| {name} | {1000 * hooks:.2f} | {step:.2f} | {hooks / step:.2%} |")


if __name__ == "__main__":
    main()
