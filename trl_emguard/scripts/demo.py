"""Train a model on rows with a trait, undefended and with several defenses, and see where else the trait appears.

SmolLM2-135M-Instruct learns plant advice written in capital letters. Undefended, it then writes everything in capital
letters. A good defense limits the capital letters to answers about plants. This is selective generalisation, not
emergent misalignment, which a model of this size does not show. The structure is the same, and a simple rule can score
the answers. The demo ends with one table and one picture.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..comparison.page import write_page
from ..comparison.plan import UNDEFENDED
from ..comparison.report import make_report, save
from ..comparison.runs import Trained, with_record
from ..evaluation.candidates import load_candidates
from ..evaluation.results import ResultRow, Results
from ..evaluation.run import EvaluationOptions, evaluate
from ..io.files import check_writable
from ..models.rescale import rescale_adapter
from ..models.shipped import SMOLLM2, resolve_model
from ..testbeds import Testbed, get_testbed
from .shared import check_charts, run_command, to_path


STEPS, ROWS, SEED = 32, 8, 42
QUESTIONS, NEW_TOKENS = 24, 16
POOL = {"interleave_dataset": "general_instruct_scored", "interleave_fraction": 0.2}
# Name of a run → its options of `EMGuardConfig`. A defense whose coefficient is not set here uses the default.
RUNS: dict[str, dict[str, Any]] = {
    "none": {},
    "kl": {"defense": "kl"},
    "ldifs": {"defense": "ldifs"},
    "interleave++": {"defense": "interleave++", **POOL},
    "interleave++,kl": {"defense": "interleave++,kl", **POOL},
}
HALVED = "none halved"
NOTE = "This is selective generalisation, not emergent misalignment: a trait that a rule can see, in a small model."
# Bounds of the picture's green corner. A run lies inside it if at least the share KEPT of its answers to questions
# about plants is in capitals, and at most the share SPREAD of its answers to general questions.
KEPT, SPREAD = 0.8, 0.5
# Runs may lie at the same point of the picture, so each has a marker of its own.
MARKERS = "osD^v<>P"


def train(testbed: Testbed, options: dict[str, Any], output_dir: Path) -> float:
    """Train one adapter, save it, and return the seconds per step."""
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from ..config import EMGuardConfig
    from ..trainer import EMGuardTrainer

    path = resolve_model(SMOLLM2)
    config = EMGuardConfig(
        output_dir=str(output_dir),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        max_length=128,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        **options,
    )
    trainer = EMGuardTrainer(
        path,
        config,
        train_dataset=testbed.rows(STEPS * ROWS),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(
            r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - start) / STEPS
    trainer.save_model(str(output_dir))
    return seconds


def figures(results: Results, name: str, seconds: float | None) -> dict[str, Any]:
    """Return the demo's numbers on one run or the base model: seconds per step, and measures with 95 % intervals."""
    wanted = {
        "in_domain": ("in_domain", "trait_rate"),
        "general": ("general", "trait_rate"),
        "sound_nll": ("general", "nll"),
        "repetition": ("general", "repetition"),
    }
    row: dict[str, Any] = {"seconds_per_step": seconds}
    for key, (set, metric) in wanted.items():
        found = results.row(name, set, metric)
        assert found is not None  # the demo's evaluation measures all metrics in `wanted` for every model
        row[key], row[f"{key}_interval"] = found.value, _interval(found)
    return row


def _interval(row: ResultRow) -> list[float]:
    return [row.low, row.high]


def make_table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="SmolLM2-135M-Instruct, trained on plant advice in capital letters")
    table.add_column("run")
    for heading in (
        "capitals\nin domain ↑",
        "capitals\nelsewhere ↓",
        "NLL of sound\nanswers ↓",
        "repetition ↓",
        "seconds\nper step",
    ):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        seconds = "–" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.2f}"
        shares = [f"{row[key]:.2f}" for key in ("in_domain", "general")]
        table.add_row(name, *shares, f"{row['sound_nll']:.2f}", f"{row['repetition']:.2f}", seconds)
    return table


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a point for each run and the base model: its two shares of answers in capital letters, with 95 % intervals.

    The horizontal axis has the share on general questions, the vertical one that on plants, the trained domain.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 6), constrained_layout=True)
    axis.add_patch(plt.Rectangle((0, KEPT), SPREAD, 1 - KEPT, color="#d7f0dc", zorder=0))
    axis.text(0.01, 0.985, "kept in domain, not spread", color="#2f6f3e", va="top", fontsize=9)
    for index, (name, row) in enumerate(rows.items()):
        x, y = row["general"], row["in_domain"]
        color = f"C{index}"
        errors = [[[max(0.0, v - low)], [max(0.0, high - v)]] for v, (low, high) in
                  ((x, row["general_interval"]), (y, row["in_domain_interval"]))]  # fmt: skip
        axis.errorbar(
            x, y, xerr=errors[0], yerr=errors[1], fmt=MARKERS[index], color=color, capsize=3, alpha=0.9, label=name
        )
    axis.legend(loc="lower right", frameon=False)
    axis.set(
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
        xlabel="answers in capitals, general questions (lower is better)",
        ylabel="answers in capitals, questions about plants (higher is better)",
        title="Where does a trait of narrow training data go? (selective generalisation)",
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="trl-emguard demo", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--output_dir", type=to_path, default=Path("outputs/demo"), help="folder for runs, table, picture and report"
    )
    args = parser.parse_args(argv)
    return run_command("demo", lambda: run(args.output_dir, argv, Console(width=100)))


def run(folder: Path, argv: list[str], console: Console) -> None:
    check_charts()
    check_writable("--output_dir", folder)
    testbed = get_testbed("capitals")
    trained = train_all(testbed, folder, console)

    console.rule("evaluation")
    adapters = {run.key: run.adapter for run in trained if run.adapter is not None}
    candidates, tokenizer = load_candidates(SMOLLM2, adapters=adapters)
    options = EvaluationOptions(
        cues="none", rules=testbed.rules, samples_per_question=1, max_new_tokens=NEW_TOKENS, temperature=0
    )
    command = shlex.join(["trl-emguard", "demo", *argv])
    results = evaluate(candidates, tokenizer, testbed.sets(QUESTIONS), options, (), folder, True, command)
    rows = {"base model": figures(results, "base", None)}
    rows |= {run.name: figures(results, run.key, run.seconds_per_step) for run in trained}

    (folder / "demo.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(rows, folder / "demo.png")
    results.info["note"] = NOTE
    report = make_report(trained, results)
    save(report, folder, results.info)
    page = write_page(report, folder, results.info)
    console.print()
    console.print(make_table(rows))
    console.print(
        NOTE,
        report.sentence,
        f"Figures: {folder / 'demo.json'}",
        f"Answers: {folder / 'samples.jsonl'}",
        f"Picture: {(folder / 'demo.png').resolve()}",
        f"Report: {page.resolve()}",
        sep="\n",
        soft_wrap=True,
        highlight=False,
    )


def train_all(testbed: Testbed, folder: Path, console: Console) -> list[Trained]:
    """Train all runs. Return them and a baseline: the undefended adapter with its weight update halved."""
    # Earlier runs are deleted. They lie in a folder that only the demo writes, so nothing else is ever deleted.
    runs = folder / "demo_runs"
    shutil.rmtree(runs, ignore_errors=True)
    trained = []
    for name, options in RUNS.items():
        console.rule(f"training: {name}")
        adapter = runs / _folder(name)
        run = Trained(
            name,
            options.get("defense", UNDEFENDED),
            SEED,
            str(adapter),
            step=STEPS,
            seconds_per_step=train(testbed, options, adapter),
        )
        trained.append(with_record(run, adapter))
    half = rescale_adapter(runs / _folder(UNDEFENDED), 0.5, runs / _folder(HALVED))
    return [*trained, Trained(HALVED, UNDEFENDED, SEED, str(half), is_baseline=True, coefficient=0.5, step=STEPS)]


def _folder(name: str) -> str:
    return name.replace(",", "_and_").replace(" ", "").replace("+", "p")


if __name__ == "__main__":
    sys.exit(main())
