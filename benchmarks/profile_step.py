"""What a training step's time goes to: plain, defended by kl, and the paper's way, operator by operator.

    python benchmarks/profile_step.py

The first point of benchmarks/steps.py on CPU (SmolLM2-135M, LoRA, 8 × 124 tokens), one step of each after three that
are not looked at, by torch's profiler, which costs a little itself. It explains a ratio of `make bench`; it is none.
"""

import tempfile
import time

import torch
from steps import POINTS, STOCK, make_trainer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_emguard.models.shipped import resolve_model


LOOKED_AT = 4
# Parts of a step, by the operators that they are made of. The first that fits is taken.
PARTS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product",),
    "softmax over the vocabulary": (
        "_log_softmax",
        "logsumexp",
        "_softmax",
        "exp",
        "log",
        "kl_div",
        "xlogy",
        "nll_loss",
    ),
    "copies and casts": ("copy_", "cat", "clone", "contiguous", "fill_", "zero_", "index", "_index_put_impl_"),
}


class Look(TrainerCallback):
    """Profiles one step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == LOOKED_AT - 1:
            self.start = time.perf_counter()
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == LOOKED_AT:
            self.profiler.stop()
            self.seconds = time.perf_counter() - self.start


def part_of(operator: str) -> str:
    name = operator.removeprefix("aten::")
    return next((part for part, names in PARTS.items() if name.startswith(names)), "else")


def main() -> None:
    point = POINTS["cpu"][0]
    path = resolve_model(point.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for variant in (STOCK, "kl", "paper kl"):
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(variant, point, base, tokenizer, folder, "cpu")
            trainer.args.max_steps = LOOKED_AT
            look = Look()
            trainer.add_callback(look)
            trainer.train()
        seconds = dict.fromkeys([*PARTS, "else"], 0.0)
        for event in look.profiler.key_averages():
            seconds[part_of(event.key)] += event.self_cpu_time_total / 1e6
        told = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items())
        print(f"{variant}: {look.seconds:.2f} s in all; {told}", flush=True)
        largest = sorted(look.profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:8]
        for event in largest:
            print(f"    {event.self_cpu_time_total / 1e6:6.2f} s  {event.count:6} calls  {event.key}", flush=True)


if __name__ == "__main__":
    main()
