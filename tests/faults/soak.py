"""Train a tiny model for thousands of steps with everything on. Memory stays flat, and nothing is left open.

Two runs in one process: 2,000 steps with `interleave++,kl,ldifs,steering,inoculation`, a LoRA adapter, gradient
checkpointing, an evaluation every 50 steps, and a checkpoint every 100 of which two are kept; and 500 steps that read
their reference from disk. An epoch has 10 steps, so samplers, iterators and mixed-in rows are made anew very
often.

Between the end of the warm-up, a fifth of a run, and its end

- the resident memory must grow by less than 2 %. It is read after a garbage collection and glibc's `malloc_trim`:
  what the allocator keeps for later use is no leak, and comes and goes by megabytes;
- the open file descriptors, the memory-mapped files, the threads, the child processes, the hooks on the model's
  modules and the live tensors must not grow at all. (The number of all Python objects is shown and not judged: the
  run's log is kept for its end.)

After a run no decoder block may have a hook. (transformers leaves one on the embeddings, for gradient checkpointing.)

`make soak` runs it, `--steps` makes it shorter or longer. The exit status is 1 if something grew.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import torch
from methods import EVERYTHING, run_options
from private import hooks_of
from rich.console import Console
from rich.table import Table
from tiny import lora, make_rows, make_trainer
from transformers import TrainerCallback

from trl_emguard.models.blocks import decoder_blocks


LINES = 10  # lines of a table
WARM_UP = 2  # lines of the warm-up
# Each sample is taken at the end of an epoch. Within one, the next batch already holds tensors.
EPOCH = 10
BATCH = 4
ALLOWED = 0.02
FLAT = ("descriptors", "mapped", "threads", "children", "hooks", "tensors")


def measure(model: torch.nn.Module) -> dict[str, float]:
    """Count the memory, handles and objects that the process holds right now."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every libc has it
    if trim is not None:
        trim(0)
    process = psutil.Process()
    objects = gc.get_objects()
    return {
        "memory": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "mapped": len(process.memory_maps()),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "hooks": len(hooks_of(*model.modules())),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in objects),
        "objects": len(objects),
    }


class Gauge(TrainerCallback):
    """Callback that measures after every so many steps, before logging, evaluation and saving."""

    def __init__(self, every: int):
        self.every = every
        self.lines: dict[int, dict[str, float]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.lines[state.global_step] = measure(model)


def soak(title: str, folder: Path, steps: int, **options) -> list[str]:
    """Train, print the samples, and return the quantities that grew."""
    gauge = Gauge(steps // LINES)
    trainer = make_trainer(
        folder,
        rows=make_rows(EPOCH * BATCH),
        peft=lora(),
        eval_dataset=make_rows(8),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        activation_checkpointing=True,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=min(50, steps // LINES),
        save_strategy="steps",
        save_steps=min(100, steps // LINES),
        save_total_limit=2,
        **options,
    )
    trainer.add_callback(gauge)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    lines = gauge.lines
    table = Table("step", "memory, MiB", *FLAT, "objects", title=f"{title}: {steps} steps in {seconds:.0f} s")
    for step, line in lines.items():
        table.add_row(str(step), f"{line['memory']:.1f}", *(str(line[key]) for key in (*FLAT, "objects")))
    Console(width=120).print(table)
    warm, end = list(lines.values())[WARM_UP - 1], lines[steps]
    growth = end["memory"] / warm["memory"] - 1
    print(f"memory after the warm-up: {growth:+.2%} ({ALLOWED:.0%} are allowed)", flush=True)
    faults = [f"{title}: memory grew by {growth:.2%}"] if growth >= ALLOWED else []
    faults += [f"{title}: {key} grew from {warm[key]} to {end[key]}" for key in FLAT if end[key] > warm[key]]
    left = len(hooks_of(*decoder_blocks(trainer.model.get_base_model()).modules()))
    if left:
        faults.append(f"{title}: {left} hooks are left on the decoder blocks")
    if len(list(folder.glob("checkpoint-*"))) != 2:
        faults.append(f"{title}: not two checkpoints are kept")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=2000, help="of the first run (default: %(default)s)")
    args = parser.parse_args()
    unit = 4 * LINES * EPOCH
    if args.steps < unit or args.steps % unit:
        parser.error(f"--steps={args.steps} must be a multiple of {unit}.")
    warnings.simplefilter("ignore")  # PEFT warns at every checkpoint, since the tiny model has no config on a hub
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["TRL_EMGUARD_CACHE"] = str(folder / "cache")
        # With the options of a short run, thousands of steps would move the model far away.
        options = {"interleave_redraw": True, "steering_coef": 0.5, "kl_coef": 0.1, "interleave_fraction": 0.05}
        faults = soak("everything", folder / "everything", args.steps, **run_options(EVERYTHING, folder, **options))
        faults += soak(
            "cached reference", folder / "cached", args.steps // 4, defense="kl,ldifs", cache_reference=True
        )
    for fault in faults:
        print(f"make soak: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
