"""Parts that the tests of `trl-emguard sft` share: the files that a run reads, and its command line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tiny import make_rows, save_model


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows to a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_inputs(folder: Path, rows: int = 16) -> Path:
    """Write the tiny model and ragged rows under the names that [`make_argv`] uses."""
    save_model(folder / "model")
    write_rows(folder / "rows.jsonl", make_rows(rows))
    return folder


def make_argv(inputs: Path, *more: Any, **options: Any) -> list[str]:
    """Return the command line of a short LoRA run on a CPU, with `options` and further words."""
    options = {
        "model_name_or_path": inputs / "model",
        "dataset_name": inputs / "rows.jsonl",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": "true",
        "activation_checkpointing": "true",  # TRL's default, under the name that transformers kept
        "bf16": "false",
        "use_peft": "true",
        "lora_r": 4,
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        "ldifs_layers": "every:2",
        "optim": "sgd",
        "save_strategy": "no",
        **options,
    }
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)] + [str(word) for word in more]


def without(argv: list[str], option: str) -> list[str]:
    """Return a command line without an option and its value."""
    at = argv.index(option)
    return argv[:at] + argv[at + 2 :]
