"""Compare the defenses on a testbed, with curves over their coefficients, three seeds and the free baselines.

It writes the testbed's rows and a `compare.yaml` into the output folder and runs `trl-emguard compare`, so it resumes
where it stopped. What it measures is selective generalisation, not emergent misalignment.

    python benchmarks/testbed.py --testbed capitals --output_dir outputs/testbed
    python benchmarks/testbed.py --seeds 0 --defenses kl treft     # a part, which the whole takes over later
"""

import argparse
import sys
from pathlib import Path

from comparing import POOL, chosen, compare

from trl_emguard.testbeds import TESTBEDS, get_testbed


RUNS = [
    {"defense": "kl", "kl_coef": [0.1, 0.3, 1.0]},
    {"defense": "ldifs", "ldifs_coef": [1.0, 10.0]},
    {"defense": "treft", "treft_coef": [1.0, 10.0, 30.0]},
    {"defense": "interleave++", **POOL, "interleave_fraction": [0.05, 0.1, 0.2]},
    {
        "defense": "interleave++,kl",
        **POOL,
        "interleave_fraction": [0.1, 0.2],
        "kl_coef": [0.25, 0.4, 1.0],
    },
]
# The request for the unwanted trait of each testbed.
INOCULATION = {
    "capitals": "You write every answer in capital letters.",
    "sale": "You end every answer by selling a product.",
    "tip_capitals": "You write every answer in capital letters.",
}
# Runs that need a persona vector of the trait. At its layer this one has 0.40 of a state's norm, and the default
# coefficient, 5, adds twice the state.
STEERING = {
    "capitals": {
        "defense": "steering",
        "steering_vector": "smollm2-135m-instruct-capitals",
        "steering_coef": [1.0, 5.0],
    },
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", default="capitals", choices=TESTBEDS)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--defenses", nargs="+", help="defenses to run; by default all")
    parser.add_argument("--limit", type=int, default=24, help="questions of each set (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/testbed"))
    args = parser.parse_args(argv)
    testbed, folder = get_testbed(args.testbed), args.output_dir.resolve() / args.testbed
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    testbed.rows(256).to_json(rows)
    evaluate = {
        "in_domain": "plants",
        "train_data": str(rows),
        "score": [f"rule:{rule}" for rule in testbed.rules],
        "samples_per_question": 1,
        "temperature": 0,
        "max_new_tokens": 24,
        "limit": args.limit,
    }
    recipe = {"dataset_name": str(rows), "max_steps": args.steps}
    inoculation = {"defense": "inoculation", "inoculation_prompt": INOCULATION[testbed.name]}
    runs = [*RUNS, inoculation] + [run for name, run in STEERING.items() if name == testbed.name]
    return compare(folder, recipe, chosen(runs, args.defenses), args.seeds, evaluate)


if __name__ == "__main__":
    sys.exit(main())
