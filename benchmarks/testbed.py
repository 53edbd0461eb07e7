"""Compare the defenses on a testbed, with curves over their coefficients, three seeds and the free baselines.

It writes the testbed's rows and a `compare.yaml` into the output folder and runs `trl-emguard compare`, so it resumes
where it stopped. What it measures is selective generalisation, not emergent misalignment.

    python benchmarks/testbed.py --testbed capitals --output_dir outputs/testbed
"""

import argparse
import sys
from pathlib import Path

import yaml

from trl_emguard.scripts import main as commands
from trl_emguard.testbeds import TESTBEDS, get_testbed


POOL = {"interleave_dataset": "general_instruct_scored"}
RECIPE = {
    "model_name_or_path": "smollm2-135m-instruct",
    "dtype": "float32",
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "use_rslora": True,
    "lora_target_modules": "all-linear",
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 8,
    "max_length": 128,
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "output_dir": "unused",
}
RUNS = [
    {"defense": "kl", "kl_coef": [0.1, 0.3, 1.0]},
    {"defense": "ldifs", "ldifs_coef": [1.0, 10.0]},
    {"defense": "treft", "treft_coef": [1.0, 10.0, 30.0]},
    {"defense": "inoculation", "inoculation_prompt": "You write every answer in capital letters."},
    {"defense": "interleave++", **POOL, "interleave_fraction": [0.05, 0.1, 0.2]},
    {
        "defense": "interleave++,kl",
        **POOL,
        "interleave_fraction": [0.1, 0.2],
        "kl_coef": [0.25, 0.4, 1.0],
    },
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", default="capitals", choices=TESTBEDS)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/testbed"))
    args = parser.parse_args(argv)
    testbed, folder = get_testbed(args.testbed), args.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    testbed.rows(256).to_json(folder / "rows.jsonl")
    recipe = {**RECIPE, "dataset_name": str(folder / "rows.jsonl"), "max_steps": args.steps}
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    comparison = {
        "recipe": str(folder / "sft.yaml"),
        "runs": RUNS,
        "seeds": args.seeds,
        "baselines": ["early_stop", "alpha"],
        "evaluate": {
            "in_domain": "plants",
            "train_data": str(folder / "rows.jsonl"),
            "score": [f"rule:{rule}" for rule in testbed.rules],
            "samples_per_question": 1,
            "temperature": 0,
            "max_new_tokens": 24,
        },
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    return commands.main(
        ["compare", "--config", str(folder / "compare.yaml"), "--output_dir", str(folder / args.testbed)]
    )


if __name__ == "__main__":
    sys.exit(main())
