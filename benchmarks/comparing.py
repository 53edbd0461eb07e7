"""A comparison as the benchmarks run it: one recipe for SmolLM2-135M, a list of runs, a folder that resumes."""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from trl_emguard.io.files import locked
from trl_emguard.models.random_adapter import random_adapter
from trl_emguard.scripts import main as commands


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


def write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Write a recipe of `trl-emguard sft`: `RECIPE` with what differs from it."""
    path.write_text(yaml.safe_dump(RECIPE | recipe, sort_keys=False))


def compare(
    folder: Path,
    recipe: dict[str, Any],
    runs: list[dict[str, Any]],
    seeds: list[int],
    evaluate: dict[str, Any],
    benign: bool = False,
) -> int:
    """Write a comparison's files into a folder, and run it there. It resumes where it stopped.

    Args:
        folder: folder of the comparison.
        recipe: what differs from `RECIPE`.
        runs: option sets.
        seeds: seeds of the training.
        evaluate: options of `trl-emguard evaluate`.
        benign: True to also train each run on a benign task, arithmetic with permuted operators.

    Returns:
        The command's exit status.

    Raises:
        ValueError: another process runs a comparison in this folder.
    """
    is_steered = any(run["defense"] == "steering" for run in runs)
    comparison = {
        "recipe": str(folder / "sft.yaml"),
        "runs": runs,
        "seeds": seeds,
        "baselines": ["early_stop", "alpha", *(["random_vector"] if is_steered else [])],
        "evaluate": evaluate,
        **({"benign_task": "permuted_operators"} if benign else {}),
    }
    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    # A comparison that is running would read changed files for its later runs.
    with locked("--output_dir", report):
        write_recipe(folder / "sft.yaml", recipe)
        (folder / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    return commands.main(["compare", "--config", str(folder / "compare.yaml"), "--output_dir", str(report)])


def markdown(
    report: Path,
    columns: dict[str, tuple[str, str]],
    cell: Callable[[list[dict[str, Any]]], str],
    left_out: Collection[str] = (),
) -> list[str]:
    """Return the figures of plain questions in a `report.json` as lines of Markdown, one for each run.

    Args:
        report: the file.
        columns: heading → set and metric.
        cell: function from the rows of a figure, one for each seed, to its text.
        left_out: names of runs to leave out.
    """
    found: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in json.loads(report.read_text(encoding="utf-8"))["rows"]:
        if row["family"] == "plain" and row["run"] not in left_out:
            found.setdefault(row["run"], {}).setdefault((row["set"], row["metric"]), []).append(row)
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return lines + [
        f"| {run} | " + " | ".join(cell(rows[key]) for key in columns.values()) + " |" for run, rows in found.items()
    ]


def adapter_runs(folder: Path, recipe: dict[str, Any], rows: Path) -> list[dict[str, Any]]:
    """Return runs with an inoculation adapter and with a random one, and train the former if it is not there.

    The adapters' folders have a hash of recipe and rows in their names, so other rows or steps train another adapter.

    Args:
        folder: folder of the comparison.
        recipe: what differs from `RECIPE`.
        rows: rows with the unwanted trait.

    Raises:
        SystemExit: the training failed, with its exit status; it has printed its error.
    """
    content = json.dumps(RECIPE | recipe | {"dataset_name": rows.read_text(encoding="utf-8")}, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:8]
    trait, control = folder / f"trait_adapter-{key}", folder / f"random_adapter-{key}"
    if not (trait / "adapter_config.json").is_file():
        write_recipe(folder / "trait.yaml", recipe | {"dataset_name": str(rows), "output_dir": str(trait)})
        status = commands.main(["sft", "--config", str(folder / "trait.yaml")])
        if status:
            raise SystemExit(status)
    if not (control / "adapter_config.json").is_file():
        random_adapter(trait, control)
    run = {"defense": "inoculation_adapter"}
    return [
        {**run, "name": "inoculation_adapter", "inoculation_adapter": str(trait)},
        {**run, "name": "inoculation_adapter random", "inoculation_adapter": str(control)},
    ]


def chosen(runs: list[dict[str, Any]], defenses: list[str] | None, one_strength: bool) -> list[dict[str, Any]]:
    """Return the runs of the named defenses, all of them if none is named, and of each the first strength if asked."""
    runs = [run for run in runs if defenses is None or run["defense"] in defenses]
    if not one_strength:
        return runs
    return [{name: v[:1] if isinstance(v, list) else v for name, v in run.items()} for run in runs]
