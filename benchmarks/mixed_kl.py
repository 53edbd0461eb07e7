"""Price of KL on mixed-in rows over interleaving alone: SmolLM2-135M, LoRA, 5 % of the mix, 20 steps of 8 rows.

Both runs train on the same batches, in turn. The first step of a run, in which the reference runs on all rows, is left
out.
"""

import tempfile
import time
from typing import Any

import torch
from harness import environment, parse_args, statistics, synchronize, write_csv
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.data.load import load_rows
from trl_emguard.models.shipped import SMOLLM2, resolve_model


RUNS = ("interleave++", "interleave++,kl")
STEPS = 20


class Clock(TrainerCallback):
    """Callback that keeps the moment of every step's end."""

    def __init__(self, device: str):
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())


def seconds_of(defense: str, device: str, steps: int) -> float:
    """Train once, and return the seconds of all steps but the first."""
    path, clock = resolve_model(SMOLLM2), Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        args = EMGuardConfig(
            output_dir=folder,
            defense=defense,
            interleave_dataset="general_instruct_scored",
            interleave_fraction=0.05,
            per_device_train_batch_size=8,
            max_steps=steps + 1,
            max_length=128,
            learning_rate=2e-4,
            activation_checkpointing=False,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = EMGuardTrainer(
            path,
            args,
            train_dataset=load_rows("plants_careless", "train"),
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    return clock.ends[-1] - clock.ends[0]


def main() -> None:
    args = parse_args(__doc__)
    steps = 2 if args.quick else STEPS
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(min(args.rounds, 3)):
        for name in RUNS:
            seconds[name].append(seconds_of(name, args.device, steps))
    rows = [
        {"kind": "mixed rows", "variant": name, **statistics(seconds, name, RUNS[:1]), **environment(args.device)}
        for name in RUNS
    ]
    for row in rows:
        print(f"{row['variant']:16} {row['seconds']} s for {steps} steps, ratio {row['ratio']}")
    write_csv(args.results / f"mixed-kl-{args.device}.csv", rows)


if __name__ == "__main__":
    main()
