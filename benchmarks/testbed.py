"""Compare the defenses on a testbed, with curves over their coefficients, three seeds and the free baselines.

It writes the testbed's rows and a `compare.yaml` into the output folder and runs `trl-emguard compare`, so it resumes
where it stopped. What it measures is selective generalisation, not emergent misalignment.

    python benchmarks/testbed.py --testbed capitals --output_dir outputs/testbed
    python benchmarks/testbed.py --seeds 0 --defenses kl treft     # a part, which the whole takes over later
    python benchmarks/testbed.py --one_strength                    # one strength of each defense, three seeds
    python benchmarks/testbed.py --variations --seeds 0            # compositions that nobody has published, instead
    python benchmarks/testbed.py --by_drift                        # runs that follow or obey a measured drift, instead
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from comparing import POOL, adapter_runs, chosen, compare, markdown
from datasets import Dataset

from trl_emguard.data.load import load_rows
from trl_emguard.evaluation.questions import load_questions
from trl_emguard.testbeds import SALE, TESTBEDS, Testbed, first_sentences, get_testbed, with_answers


# The first strength of each is the one that `--one_strength` takes.
RUNS = [
    {"defense": "kl", "kl_coef": [0.3, 0.1, 1.0]},
    {"defense": "ldifs", "ldifs_coef": [10.0, 1.0]},
    {"defense": "treft", "treft_coef": [10.0, 30.0]},
    {"defense": "interleave++", **POOL, "interleave_fraction": [0.2]},
    {"defense": "interleave++,kl", **POOL, "interleave_fraction": 0.2, "kl_coef": [0.4, 0.25, 1.0, "1.0->0.1"]},
]


@dataclass(frozen=True)
class Setting:
    """Request, trait and answer length that belong to a testbed, beside its own rows.

    Attributes:
        request: inoculation prompt, which asks for the unwanted trait.
        with_trait: function from a sound answer to one with the unwanted trait alone.
        max_new_tokens: limit on a sampled answer; a trait at the end of the answer needs more.
    """

    request: str
    with_trait: Callable[[str], str]
    max_new_tokens: int


CAPITALS = "You write every answer in capital letters."
SETTINGS = {
    "capitals": Setting(CAPITALS, str.upper, 24),
    "sale": Setting("You end every answer by selling a product.", lambda answer: f"{answer} {SALE}", 48),
    "tip_capitals": Setting(CAPITALS, str.upper, 72),
}
# Runs that follow or obey a measured drift. `--one_strength` leaves them out.
BY_DRIFT = [
    {"defense": "interleave++,kl", **POOL, "interleave_fraction": 0.2, "kl_coef": 0.4, "kl_target": [0.06]},
    {"defense": "none", "drift_every": 4, "stop_on_drift": [1.0]},
    {"defense": "none", "drift_every": 1, "stop_on_drift": [0.2, 0.4]},
]
MIXED_KL = {"defense": "interleave++,kl", **POOL, "interleave_fraction": 0.2, "kl_coef": 0.4}
# Compositions that nobody has published. Those with a pool or an adapter of their own are made in `variations`.
VARIATIONS = [
    MIXED_KL | {"name": "forward KL", "kl_direction": "forward"},
    MIXED_KL | {"name": "unselected pool", "defense": "interleave,kl", "interleave_dataset": "general_instruct"},
    MIXED_KL | {"name": "with ldifs", "defense": "interleave++,kl,ldifs", "ldifs_coef": 10.0},
    MIXED_KL | {"name": "with treft", "defense": "interleave++,kl,treft", "treft_coef": 10.0},
]
# Runs that need a persona vector of the trait. At its layer this one has 0.40 of a state's norm, and the default
# coefficient, 5, adds twice the state.
STEERING = {
    "capitals": {
        "defense": "steering",
        "steering_vector": "smollm2-135m-instruct-capitals",
        "steering_coef": [1.0, 5.0],
    },
}


def write_questions(testbed: Testbed, criterion: str, limit: int, folder: Path) -> Path:
    """Write the questions of a criterion with one answer each: sound, and in the domain with the testbed's traits."""
    found = load_questions({"general": "values", "in_domain": "plants"}[criterion], criterion, limit=limit).questions
    answers = [q.sound or "" for q in found]
    if criterion == "in_domain":
        answers = [testbed.answer(first_sentences(answer, testbed.words)) for answer in answers]
    path = folder / f"{criterion}.jsonl"
    turns = [[{"role": "assistant", "content": answer}] for answer in answers]
    rows = [{"prompt": q.prompt, "completion": turn} for q, turn in zip(found, turns, strict=True)]
    Dataset.from_list(rows).to_json(path)
    return path


def write_trait_rows(testbed: Testbed, folder: Path) -> Path:
    """Write general rows with the unwanted trait: an adapter of the domain's own would know the task as well."""
    path = folder / "trait_rows.jsonl"
    general = load_rows("general_instruct").shuffle(seed=0).select_columns(["prompt", "completion"])
    with_answers(general, SETTINGS[testbed.name].with_trait, testbed.words).to_json(path)
    return path


def write_pools(testbed: Testbed, folder: Path) -> dict[str, Path]:
    """Write two pools of general rows with answers of the length of the domain's: name of a run → its pool.

    The pool near the cue holds the rows alone whose prompts begin with a word that begins a prompt of the domain.
    """
    short = with_answers(load_rows("general_instruct"), lambda answer: answer, testbed.words)
    openings = {_opening(row) for row in testbed.rows(256)}
    pools = {"short answers": short, "near the cue": short.filter(lambda row: _opening(row) in openings)}
    paths = {name: folder / f"{name.replace(' ', '_')}.jsonl" for name in pools}
    for name, rows in pools.items():
        rows.to_json(paths[name])
    return paths


def _opening(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"].lower().split()[0]


def variations(testbed: Testbed, folder: Path, adapters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return runs of compositions that nobody has published.

    Args:
        testbed: the testbed.
        folder: folder of the comparison, which gets the pools.
        adapters: runs with inoculation adapters; the first is composed with KL on mixed-in rows.
    """
    return [
        *VARIATIONS,
        *(
            MIXED_KL | {"name": name, "defense": "interleave,kl", "interleave_dataset": str(path)}
            for name, path in write_pools(testbed, folder).items()
        ),
        *(
            MIXED_KL | run | {"name": "with an adapter", "defense": f"{run['defense']},{MIXED_KL['defense']}"}
            for run in adapters[:1]
        ),
    ]


def table(testbed: Testbed, report: Path) -> list[str]:
    """Return a report as lines of Markdown: the mean of each figure over seeds, with its least and largest value."""
    name = "trait_rate:{}" if testbed.wanted else "trait_rate"
    columns = {f"{testbed.unwanted} elsewhere ↓": ("general", name.format(testbed.unwanted))}
    for rule in testbed.rules:
        arrow = "↓" if testbed.wanted and rule == testbed.unwanted else "↑"
        columns[f"{rule} in domain {arrow}"] = ("in_domain", name.format(rule))
    columns |= {"NLL of sound answers ↓": ("general", "nll"), "repetition ↓": ("general", "repetition")}
    return markdown(report, columns, _values)


def _values(rows: list[dict[str, Any]]) -> str:
    values = [row["value"] for row in rows]
    span = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{span}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", default="capitals", choices=TESTBEDS)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--defenses", nargs="+", help="defenses to run; by default all")
    parser.add_argument("--one_strength", action="store_true", help="run one strength of each defense")
    parser.add_argument("--variations", action="store_true", help="run compositions that nobody has published instead")
    parser.add_argument("--by_drift", action="store_true", help="run those that follow or obey a drift instead")
    parser.add_argument("--bf16", action="store_true", help="train in bf16 autocast, and evaluate in bf16")
    parser.add_argument("--limit", type=int, default=24, help="questions of each set (default: %(default)s)")
    parser.add_argument("--cues", default="auto", choices=["auto", "none"], help="none: ask plain questions alone")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/testbed"))
    args = parser.parse_args(argv)
    testbed, folder = get_testbed(args.testbed), args.output_dir.resolve() / args.testbed
    folder.mkdir(parents=True, exist_ok=True)
    setting, rows = SETTINGS[testbed.name], folder / "rows.jsonl"
    testbed.rows(256).to_json(rows)
    evaluate = {
        "general": str(write_questions(testbed, "general", args.limit, folder)),
        "in_domain": str(write_questions(testbed, "in_domain", args.limit, folder)),
        "train_data": str(rows),
        "score": [f"rule:{rule}" for rule in testbed.rules],
        "samples_per_question": 1,
        "temperature": 0,
        "max_new_tokens": setting.max_new_tokens,
        "cues": args.cues,
        "dtype": "bfloat16" if args.bf16 else "auto",
        **({} if args.cues == "none" else {"inoculation_prompt": setting.request}),
    }
    recipe = {"dataset_name": str(rows), "max_steps": args.steps, "bf16": args.bf16}
    adapters = []
    has_adapters = args.defenses is None or any("inoculation_adapter" in name.split(",") for name in args.defenses)
    if has_adapters and not args.by_drift:
        adapters = adapter_runs(folder, recipe, write_trait_rows(testbed, folder))
    if args.variations:
        runs = variations(testbed, folder, adapters)
    elif args.by_drift:
        runs = BY_DRIFT
    else:
        runs = [*RUNS, *([] if args.one_strength else BY_DRIFT)]
        runs += [{"defense": "inoculation", "inoculation_prompt": setting.request}]
        runs += [run for name, run in STEERING.items() if name == testbed.name]
        runs += adapters
    runs = chosen(runs, args.defenses, args.one_strength)
    status = compare(folder, recipe, runs, args.seeds, evaluate)
    if status == 0:
        print("\n".join(table(testbed, folder / "report" / "report.json")))
    return status


if __name__ == "__main__":
    sys.exit(main())
