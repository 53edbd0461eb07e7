"""Launching cells on two CPU ranks of an engine, and comparing them with one process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from methods import KINDS, METHODS, save_adapter, save_vector
from safetensors.torch import load_file
from tiny import make_model, save_model, save_seeing_model

from trl_emguard.models.identity import weight_checksums


DEFENSES = (*KINDS, "interleave++,kl")
# Names in the log and in the evidence that do not depend on the number of ranks.
LOGS = {"loss", "grad_norm", "loss_ce", "num_tokens", "mean_token_accuracy"}.union(*(m.logs for m in METHODS.values()))
# Coefficients are logged where they change.
LOGS |= {"kl_coef", "ldifs_coef", "treft_coef", "steering_coef"}
COUNTS = {count for method in METHODS.values() for count in method.counts}
RANKS = 2
# Tolerance of logged values (relative above 1) and of weights, in fp32.
TOLERANCE = 1e-4
# Tolerances in bf16, 3 and 1.7 times the largest difference that was measured. A logged value may differ by this
# share of the largest one of its name, and weights by this share of the distance that training has moved them.
BF16_LOGS, BF16_WEIGHTS = 0.05, 0.1
# Passes of the reference beside the steps, in a run of six steps with a save.
WATCHES = 6
WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Cell:
    """A run of six steps on ragged rows.

    Attributes:
        options: options that replace the worker's own.
        lora: values that replace those of the adapter's configuration.
        unlabelled: True gives rank 1 rows without a label.
        resumed: True trains once more from the checkpoint of the third step, and compares that run.
    """

    defense: str
    tuning: str = "lora"
    checkpointing: bool = False
    architecture: str = "llama"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    lora: dict[str, Any] = field(default_factory=dict, hash=False)
    unlabelled: bool = False
    resumed: bool = False

    @property
    def is_bf16(self) -> bool:
        return bool(self.options.get("bf16"))

    @property
    def id(self) -> str:
        more = [f"{name}={value}" for name, value in {**self.options, **self.lora}.items()]
        marks = {"checkpointing": self.checkpointing, "unlabelled": self.unlabelled, "resumed": self.resumed}
        return "-".join(
            [self.defense, self.tuning, self.architecture, *[name for name, on in marks.items() if on], *more]
        )


# The engines of recipes/accelerate_configs, with the settings that a CPU needs.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"distributed_type": "MULTI_GPU", "use_cpu": True},
    "zero2": {"distributed_type": "DEEPSPEED", "zero_stage": 2},
    "zero3": {"distributed_type": "DEEPSPEED", "zero_stage": 3},
    "fsdp2": {
        "distributed_type": "FSDP",
        "use_cpu": True,
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
        },
    },
}


def launch(engine: str, cells: list[Cell], folder: Path, timeout: int) -> dict[str, list[dict[str, Any]]]:
    """Train the cells on an engine, one process for `"one"` and two ranks otherwise.

    Returns:
        Cell id → results of each rank. A cell that failed, and those after it, have fewer.
    """
    folder.mkdir(parents=True)
    vector = save_vector(folder / "vector.safetensors", weights=weight_checksums(make_model()))
    job = {
        "engine": engine,
        "cells": [{"id": cell.id, **asdict(cell)} for cell in cells],
        "models": {name: _save_model(folder / name, name) for name in {cell.architecture for cell in cells}},
        "vector": vector,
        "adapter": save_adapter(folder / "adapter"),
        "output": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(WORKER), str(folder / "job.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if engine != "one":
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(_accelerate_file(engine, folder)),
        ]
        command = [*launcher, *command[1:]]
        environment |= {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {}
    log = folder / "log.txt"
    with log.open("w") as stream:
        subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=timeout, check=False)
    seen = {}
    for cell in cells:
        files = [folder / f"{cell.id}.{rank}.json" for rank in range(RANKS)]
        seen[cell.id] = [json.loads(path.read_text()) for path in files if path.exists()]
    return seen


def _save_model(folder: Path, architecture: str) -> str:
    return (save_seeing_model if architecture == "Mistral3" else save_model)(folder, architecture)


def _accelerate_file(engine: str, folder: Path) -> Path:
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "num_processes": RANKS,
        "main_process_port": 0,
    }
    settings |= ENGINES[engine]
    stage = settings.pop("zero_stage", None)
    if stage is not None:
        zero = {
            "stage": stage,
            "overlap_comm": False,  # it wants streams
            # Small weights are sharded as well.
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        (folder / "deepspeed.json").write_text(
            json.dumps({"zero_optimization": zero, **dict.fromkeys(auto, "auto"), "bf16": {"enabled": "auto"}})
        )
        settings["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "zero3_init_flag": stage == 3,
        }
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def differences(engine: str, cell: Cell, folder: Path, one: Path, seen: list[dict], alone: dict) -> list[str]:
    """Return the differences between a run on two ranks and the same run in one process, in words.

    Args:
        folder, one: folders of the two runs' models.
        seen, alone: results of their ranks.
    """
    if len(seen) < RANKS or "error" in seen[0] or "error" in seen[1]:
        errors = [rank["error"] for rank in seen if "error" in rank]
        return [f"{cell.id}: {errors[0] if errors else 'was not reached'}"]
    found = [*_of_ranks(engine, cell, seen, alone), *_of_logs(cell, seen, alone), *_of_weights(cell, folder, one)]
    record, expected = (json.loads((run / cell.id / "defense.json").read_text()) for run in (folder, one))
    for term, evidence in expected["evidence"].items():
        if any(evidence.get(count) != record["evidence"][term].get(count) for count in COUNTS):
            found.append(f"{cell.id}: evidence {record['evidence'][term]} instead of {evidence}")
    return found


def _of_ranks(engine: str, cell: Cell, seen: list[dict], alone: dict) -> list[str]:
    found = []
    if [rank["ranks"] for rank in seen] != [RANKS] * RANKS:
        found.append(f"{cell.id}: ran on {seen[0]['ranks']} ranks")
    if [rank["engine"] for rank in seen] != [engine] * RANKS:
        found.append(f"{cell.id}: was trained by {seen[0]['engine']}")
    sharded = ENGINES[engine].get("zero_stage") == 3 or "fsdp_config" in ENGINES[engine]
    for rank in seen:
        if rank["pushed"] != (alone["pushed"] if rank is seen[0] else []):
            found.append(f"{cell.id}: a rank pushed the model of the steps {rank['pushed']}")
        for model, share in rank["held"].items():
            # A rank may hold half, and a little more if a weight cannot be halved.
            if sharded and share > 0.6:
                found.append(f"{cell.id}: a rank held {share:.0%} of the weights of the {model}")
        # An evaluation calls modules in another order, with or without a defense. So do the passes that watch the
        # reference: two before the first step, one after it, one at each save and one at the end.
        allowed = WATCHES + sum("eval_loss" in entry for entry in rank["history"])
        if rank["invalidated"] > allowed:
            found.append(f"{cell.id}: DeepSpeed threw {rank['invalidated']} prefetch traces away")
    return found


def _of_logs(cell: Cell, seen: list[dict], alone: dict) -> list[str]:
    found = []
    for key in sorted(LOGS):
        ours, theirs = ([entry[key] for entry in run["history"] if key in entry] for run in (seen[0], alone))
        if len(ours) != len(theirs) or any(
            abs(a - b) > _allowed(cell, key, b, theirs) for a, b in zip(ours, theirs, strict=True)
        ):
            found.append(f"{cell.id}: {key} {ours} instead of {theirs}")
    if not [entry for entry in seen[0]["history"] if "loss" in entry]:
        found.append(f"{cell.id}: no loss was logged")
    return found


def _allowed(cell: Cell, key: str, value: float, values: list[float]) -> float:
    """Return how far a logged value may be from `value`, one of the `values` of a run in one process."""
    if not cell.is_bf16:
        return TOLERANCE * max(1, abs(value))
    # The tiny model predicts few tokens, and a single one more is a large share of them.
    return BF16_LOGS * (1 if key == "mean_token_accuracy" else max(map(abs, values)))


def _of_weights(cell: Cell, folder: Path, one: Path) -> list[str]:
    name = "adapter_model.safetensors" if cell.tuning == "lora" else "model.safetensors"
    ours, theirs = (load_file(run / cell.id / name) for run in (folder, one))
    start = load_file(one / cell.architecture / "model.safetensors") if cell.tuning == "full" else {}
    if cell.tuning == "full" and cell.architecture == "llama":
        for weights in (ours, theirs, start):
            # A tied head shares the embeddings' weight, and some engines write it a second time.
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    if ours.keys() != theirs.keys():
        return [f"{cell.id}: weights {sorted(ours.keys() ^ theirs.keys())}"]
    if cell.is_bf16:
        # An adapter's matrices A begin at random values, and its matrices B at 0.
        moved = [name for name in theirs if cell.tuning == "full" or "lora_B" in name]
        error = _norm(ours[name] - theirs[name] for name in moved)
        share = error / _norm(theirs[name] - start.get(name, 0) for name in moved)
        return [] if share <= BF16_WEIGHTS else [f"{cell.id}: weights differ by {share:.0%} of their move"]
    worst = max(theirs, key=lambda name: (ours[name] - theirs[name]).abs().max())
    error = (ours[worst] - theirs[worst]).abs().max()
    return [] if error <= TOLERANCE else [f"{cell.id}: {worst} differs by {error:.2g}"]


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return torch.cat([tensor.flatten().float() for tensor in tensors]).norm().item()
