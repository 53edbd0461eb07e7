"""Compare training of this work tree with an older commit: loss logs and weights must be equal, bit for bit.

```bash
python benchmarks/golden.py                  # every case, against the commit before the package was rebuilt
python benchmarks/golden.py --only kl        # the cases whose name contains a text
python benchmarks/golden.py --against HEAD   # the work tree against the last commit
```

The older commit is checked out into a temporary folder. Both trees run in this environment, on this machine, with one
thread.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]

BEFORE = "f95102f"
# The defenses that the older commit knows.
DEFENSES = ("none", "kl", "ldifs", "steering", "inoculation", "interleave++", "kl,ldifs", "interleave++,kl")
STEPS = 5


def run_case(defense: str, tuning: str, folder: Path) -> dict[str, Any]:
    """Train a tiny model for five steps; return its loss logs and its trained weights."""
    import torch
    from peft import LoraConfig
    from tiny_model import make_model, make_pool, make_rows, make_tokenizer

    from trl_emguard import EMGuardConfig, EMGuardTrainer

    options: dict[str, Any] = {}
    if defense == "steering":
        torch.save(torch.randn(5, 32, generator=torch.Generator().manual_seed(3)), folder / "vector.pt")
        options = {"steering_vector": str(folder / "vector.pt"), "steering_layers": "2", "steering_coef": 1.0}
    config = EMGuardConfig(
        output_dir=str(folder),
        defense=defense,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        ldifs_layers="every:2",
        interleave_fraction=0.2,
        # Defaults of the older commit: beside mixed-in rows, both are others now.
        kl_coef=0.1,
        kl_tokens="loss",
        **options,
    )
    trainer = EMGuardTrainer(
        make_model(),
        config,
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if tuning == "lora" else None,
        interleave_dataset=make_pool() if "interleave" in defense else None,
    )
    trainer.train()
    timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    logs = [{k: v for k, v in entry.items() if k not in timings} for entry in trainer.state.log_history]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"logs": logs, "weights": weights}


def run_all(only: str, output: Path) -> None:
    """Run every case in this process, and save the results."""
    import torch

    torch.set_num_threads(1)
    results = {}
    for defense in DEFENSES:
        for tuning in ("lora", "full"):
            name = f"{defense} {tuning}"
            if only in name:
                with tempfile.TemporaryDirectory() as folder:
                    results[name] = run_case(defense, tuning, Path(folder))
    torch.save(results, output)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two results of a case, in words."""
    import torch

    found = []
    for step, (a, b) in enumerate(zip(old["logs"], new["logs"], strict=False), 1):
        found += [
            f"log {step}: {key} {a.get(key)} → {b.get(key)}"
            for key in sorted(a.keys() | b.keys())
            if a.get(key) != b.get(key)
        ]
    if len(old["logs"]) != len(new["logs"]):
        found.append(f"{len(old['logs'])} → {len(new['logs'])} log entries")
    if old["weights"].keys() != new["weights"].keys():
        found.append("other weights are trained")
    else:
        found += [
            f"weight {name}"
            for name, weight in old["weights"].items()
            if not torch.equal(weight, new["weights"][name])
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default=BEFORE, help="commit to compare with (default: %(default)s)")
    parser.add_argument("--only", default="", help="run only cases whose name contains this text")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output is not None:
        run_all(args.only, args.output)
        return 0

    import torch

    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", before, args.against], check=True)
        runs = {}
        try:
            for tree in (before, ROOT):
                output = Path(scratch) / f"{tree.name}.pt"
                paths = os.pathsep.join([str(tree), str(ROOT / "benchmarks")])
                environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                command = [sys.executable, __file__, "--only", args.only, "--output", output]
                run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=scratch)
                runs[tree] = run, output
            codes = [run.wait() for run, _ in runs.values()]  # both must end before either result is read
            if any(codes):
                return 1
            results = {tree: torch.load(output) for tree, (_, output) in runs.items()}
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=True)
    failed = 0
    for name, old in results[before].items():
        found = differences(old, results[ROOT][name])
        failed += bool(found)
        print(f"{name:24}", "equal" if not found else f"DIFFERENT: {'; '.join(found[:4])} ({len(found)} in all)")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
