"""Compare the defenses on real data that makes large models emergently misaligned, with the free baselines.

The data are not a part of the project. The folder holds `DOMAIN/train.jsonl` and `DOMAIN/eval.jsonl` for each domain,
rows with `messages`. It trains SmolLM2-135M on rows of one domain and measures general questions with a sound and
a misaligned answer in one style, held-out rows of the domain, and rows of the other domain.

    python benchmarks/em.py --data EM --domain medical --seeds 0 1
    python benchmarks/em.py --data EM --seeds 0 --defenses kl     # a part, which the whole takes over later
"""

import argparse
import sys
from pathlib import Path

from comparing import POOL, adapter_runs, chosen, compare

from trl_emguard.data.load import load_rows


DOMAINS = ("medical", "security")
BATCH = 8
RUNS = [
    {"defense": "kl", "kl_coef": [0.1, 0.4, 1.6]},
    {"defense": "ldifs", "ldifs_coef": [1.0, 10.0]},
    {"defense": "treft", "treft_coef": [10.0]},
    {"defense": "inoculation"},
    {"defense": "steering", "steering_vector": "smollm2-135m-instruct-evil", "steering_coef": [2.0]},
    {"defense": "interleave++", **POOL, "interleave_fraction": [0.05, 0.1]},
    {"defense": "interleave++,kl", **POOL, "interleave_fraction": [0.1], "kl_coef": [0.4, 1.6]},
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--domain", default=DOMAINS[0], choices=DOMAINS)
    parser.add_argument("--rows", type=int, default=400, help="training rows (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--defenses", nargs="+", help="defenses to run; by default all")
    parser.add_argument("--bf16", action="store_true", help="train in bf16 autocast")
    parser.add_argument("--limit", type=int, default=72, help="questions of each set (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/em"))
    args = parser.parse_args(argv)
    folder = args.output_dir.resolve() / args.domain
    folder.mkdir(parents=True, exist_ok=True)
    (other,) = set(DOMAINS) - {args.domain}
    rows, other_rows = (write_rows(args.data / domain, args.rows, folder) for domain in (args.domain, other))
    evaluate = {
        "general": ["values", str((args.data / other / "eval.jsonl").resolve())],
        "in_domain": str((args.data / args.domain / "eval.jsonl").resolve()),
        "train_data": str(rows),
        "limit": args.limit,
    }
    recipe = {"dataset_name": str(rows), "max_steps": args.rows // BATCH, "max_length": 512, "bf16": args.bf16}
    runs = list(RUNS)
    if args.defenses is None or "inoculation_adapter" in args.defenses:
        runs += adapter_runs(folder, recipe, other_rows)
    return compare(folder, recipe, chosen(runs, args.defenses), args.seeds, evaluate)


def write_rows(data: Path, count: int, folder: Path) -> Path:
    """Write training rows of a domain into the comparison's folder."""
    path = folder / f"{data.name}.jsonl"
    load_rows(str(data / "train.jsonl")).shuffle(seed=0).select(range(count)).to_json(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
