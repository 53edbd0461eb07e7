"""The list of file formats that the package reads; those of YAML and JSON are defined here."""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_rows
import fuzz_tensors
from fuzz_damage import damaged_json, damaged_lines, damaged_parquet, damaged_pt, damaged_safetensors, damaged_yaml
from fuzz_plain import naive_yaml, strict_json
from hypothesis import strategies as st
from trl import ModelConfig, ScriptArguments

from trl_emguard.config import EMGuardConfig
from trl_emguard.evidence import DEFENSE_FILE, read_defense_file, write_defense_file
from trl_emguard.persona.traits import load_trait
from trl_emguard.scripts.sft import make_parser
from trl_emguard.selection.choose import (
    refusal_filter,
)


@dataclass
class Format:
    """A file format of the package, and its readers.

    Attributes:
        file: name of the file in a folder of its own.
        write: function that writes the valid file, and others that belong to it.
        damage: function from bytes to damaged bytes that knows the format.
        read: function from a path to the content by the package's reader, as plain values.
        naive: function from bytes to the same content by other means, or `...` if there is nothing to compare. It
            raises if the bytes are no such file.
        names: text that a refusal may name instead of the file.
    """

    file: str
    write: Callable[[Path], None]
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    read: Callable[[Path], Any]
    naive: Callable[[bytes], Any]
    names: str | None = None
    valid: bytes = field(default=b"", compare=False)


RECORD = {
    "version": "0.1.0",
    "defenses": {"kl": {"kl_coef": 0.1}},
    "reference": {"kind": "base model, adapters off", "fingerprint": "0f"},
    "evidence": {
        "kl": {
            "value": 0.5,
            "positions": 10.0,
            "gradient": 0.1,
            "requires_grad": 4.0,
            "judged_steps": 3,
            "idle_steps": 0,
        }
    },
}


def write_record(path: Path) -> None:
    write_defense_file(path.parent, RECORD)


TRAIT = {
    "name": "odd",
    "description": "says odd things.",
    "system_prompts": [{"positive": "Be odd.", "negative": "Be even."}, {"positive": "Odd!", "negative": "Even!"}],
    "extraction_questions": ["a?", "b?"],
    "heldout_questions": ["c?"],
    "judge_prompt": "{question} {answer}",
}
REFUSALS = {"phrases": ["i can't", "sorry", "no way"], "first_words": 8}
RECIPE = {
    "model_name_or_path": "tiny", "dataset_name": "plants_careless", "use_peft": True, "lora_r": 8,
    "lora_target_modules": "all-linear",
    "steering_coef": 2.0, "kl_coef": 0.5, "defense": "kl,ldifs", "ldifs_layers": "every:2", "learning_rate": 2.0e-4,
    "seed": 42,
    "lr_scheduler_type": "linear", "per_device_train_batch_size": 8, "max_steps": 16, "save_strategy": "no",
    "output_dir": "out",
    "bf16": False, "use_cpu": True, "report_to": "none", "activation_checkpointing": False,
    "model_init_kwargs": {"revision": "main"},
    "env": {"SOME_NAME": "1"}, "optim": "adamw_torch", "warmup_steps": 5, "interleave_fraction": 0.05,
    "max_length": None,
}  # fmt: skip

COMPARED = (
    "model_name_or_path",
    "dataset_name",
    "lora_r",
    "seed",
    "max_steps",
    "learning_rate",
    "kl_coef",
    "use_peft",
)


def json_of(value: Any) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return lambda valid: damaged_json(value)


def yaml_of(value: Any) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return lambda valid: damaged_yaml(value)


def damaged_file(valid: bytes) -> st.SearchStrategy[bytes]:
    return damaged_json(json.loads(valid))


def write_json(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(value, indent=1))  # type: ignore[return-value]


def read_trait(path: Path) -> Any:
    trait = asdict(load_trait(path))
    pairs = [{"positive": positive, "negative": negative} for positive, negative in trait["system_prompts"]]
    return {**json.loads(json.dumps(trait)), "system_prompts": pairs}


def read_refusals(path: Path) -> Any:
    refusals = refusal_filter(path)
    assert refusals.is_refusal(f"oh {refusals.phrases[0]} there") in (True, False)
    return {"phrases": list(refusals.phrases), "first_words": refusals.first_words}


def naive_refusals(content: bytes) -> Any:
    value = naive_yaml(content)
    plain = [" ".join(phrase.split()).lower().replace("’", "'") for phrase in value["phrases"]]
    return {"phrases": plain, "first_words": min(value["first_words"], 2**63 - 1)}


def read_recipe(path: Path) -> Any:
    errors, code = io.StringIO(), 0
    with mock.patch.dict(os.environ), contextlib.redirect_stderr(errors):
        try:
            parts = make_parser().parse(["--config", str(path)])
        except SystemExit as stop:
            code = stop.code
    if code != 0:
        assert code == 2
        assert re.fullmatch(r"trl-emguard sft: error: .+\n", errors.getvalue())
        raise ValueError(errors.getvalue())
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= vars(part)
    assert merged["trust_remote_code"] is False
    return {key: merged[key] for key in COMPARED}


def naive_recipe(content: bytes) -> Any:
    config = naive_yaml(content)
    types = {"lora_r": int, "seed": int, "max_steps": int, "learning_rate": float, "kl_coef": float}
    defaults = vars(EMGuardConfig("out", use_cpu=True, bf16=False)) | vars(ModelConfig()) | vars(ScriptArguments())
    return {key: types.get(key, lambda x: x)(config[key]) if key in config else defaults[key] for key in COMPARED}


FORMATS = {
    "vector": Format(
        "v.safetensors",
        fuzz_tensors.write_vector,
        damaged_safetensors,
        fuzz_tensors.read_vector,
        fuzz_tensors.naive_vector,
    ),
    "vector, pt": Format("v.pt", fuzz_tensors.write_pt, damaged_pt, fuzz_tensors.read_pt, fuzz_tensors.naive_pt),
    "rows": Format("rows.jsonl", fuzz_rows.write_rows, damaged_lines, fuzz_rows.read_rows, fuzz_rows.naive_rows),
    "rows, parquet": Format(
        "rows.parquet", fuzz_rows.write_rows_parquet, damaged_parquet, fuzz_rows.read_rows, fuzz_rows.naive_parquet
    ),
    "scores": Format(
        "scores.parquet", fuzz_rows.write_scored, damaged_parquet, fuzz_rows.read_scored, fuzz_rows.naive_scored
    ),
    "scores, parts": Format(
        "s.parquet.parts/0-0.jsonl",
        fuzz_rows.write_scores_part,
        damaged_lines,
        fuzz_rows.read_scores_part,
        fuzz_rows.naive_scores_part,
    ),
    "rollouts": Format(
        "v.rollouts.jsonl", fuzz_rows.write_rollouts, damaged_lines, fuzz_rows.read_rollouts, fuzz_rows.naive_rollouts
    ),
    "cache": Format(
        "cache/abc.safetensors",
        fuzz_tensors.write_cache,
        damaged_safetensors,
        fuzz_tensors.read_cache,
        fuzz_tensors.naive_cache,
    ),
    "record": Format(
        DEFENSE_FILE, write_record, json_of(RECORD), lambda path: read_defense_file(path.parent), strict_json
    ),
    "trait": Format("odd.yaml", write_json(TRAIT), yaml_of(TRAIT), read_trait, naive_yaml),
    "refusals": Format("refusals.yaml", write_json(REFUSALS), yaml_of(REFUSALS), read_refusals, naive_refusals),
    # `read_recipe` checks that an error about a value names its key.
    "recipe": Format("run.yaml", write_json(RECIPE), yaml_of(RECIPE), read_recipe, naive_recipe, "error: "),
    "adapter": Format(
        "adapter_model.safetensors",
        fuzz_tensors.write_adapter,
        damaged_safetensors,
        fuzz_tensors.read_adapter,
        fuzz_tensors.naive_adapter,
    ),
    "adapter, config": Format(
        "adapter_config.json", fuzz_tensors.write_adapter, damaged_file, fuzz_tensors.read_adapter, lambda content: ...
    ),
}
