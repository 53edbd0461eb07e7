"""A run on two ranks is the run in one process: the same losses, the same evidence, the same weights."""

from pathlib import Path

import pytest
from methods import tunings

from .engines import DEFENSES, ENGINES, Cell, differences, launch


MATRIX = [
    Cell(defense, tuning, checkpointing)
    for defense in DEFENSES
    for tuning in tunings(defense)
    for checkpointing in (False, True)
]
SCHEDULES = {"kl_coef": "1.0->0.1", "treft_coef": "1.0->0.1", "steering_coef": "1.0->0.5"}
FLAGGED = {"inoculation_rows": "flagged"}
# Conditions under which engines, or ranks, differ from each other.
CONDITIONS = [
    # A rank without labels, and micro-batches without a mixed-in row: no rank may wait for another.
    Cell("kl,ldifs", unlabelled=True, options={"train_sampling_strategy": "sequential"}),
    Cell("kl,ldifs", "full", True, unlabelled=True, options={"train_sampling_strategy": "sequential"}),
    Cell("interleave++,kl", options={"kl_tokens": "interleaved", "interleave_fraction": 0.05}),
    # Models with a head of their own: untied, trained beside an adapter, and both.
    Cell("kl", "full", True, "qwen2"),
    Cell("kl,ldifs", "lora", False, "qwen2", lora={"modules_to_save": ["lm_head"]}),
    # The reference is an adapter.
    Cell("kl", lora={"init_lora_weights": False}),
    Cell("kl", options={"kl_tokens": "all"}),
    # One epoch of packs: at its end ranks get packs twice, while one process makes a smaller batch.
    Cell("kl,ldifs", options={"packing": True, "max_length": 64, "max_steps": 4}),
    Cell("kl", "full", options={"max_length": 36}),
    # DeepSpeed trains bf16 weights, and one process has fp32 weights under autocast.
    Cell("kl,ldifs", options={"bf16": True}),
    Cell("kl", "full", True, options={"bf16": True}),
    Cell("ldifs,steering", options={"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}),
    Cell("interleave++,kl", resumed=True, options={"save_strategy": "steps", "save_steps": 3}),
    Cell("treft,inoculation_adapter", resumed=True, options={"save_strategy": "steps", "save_steps": 3}),
    Cell("kl", "full", resumed=True, options={"save_strategy": "steps", "save_steps": 3}),
    # Coefficients that change: each rank must take the same one in each step, in a resumed run as well.
    Cell(
        "kl,ldifs,treft,steering",
        resumed=True,
        options={**SCHEDULES, "ldifs_coef": "0.1->1.0", "save_strategy": "steps", "save_steps": 3},
    ),
    Cell("kl", resumed=True, options={"kl_target": 0.01, "save_strategy": "steps", "save_steps": 3}),
    Cell("inoculation", options=FLAGGED),
]
# Every defense, tuning and mode of checkpointing runs on every engine that treats it differently.
SLICE = {
    "ddp": [
        Cell("ldifs", "full", True, options={"ldifs_coef": "1.0->0.1"}),
        Cell("interleave++,kl,inoculation_adapter", "lora", False),
        Cell("kl", options={"push_to_hub": True, "save_strategy": "steps", "save_steps": 3}),
        # Rows of text leave the vision tower of a model that also sees without a gradient.
        Cell("kl", "full", True, "Mistral3"),
    ],
    "zero2": [
        Cell("kl", "full", False, options={"kl_target": 0.01}),
        Cell("inoculation", "lora", True),
        Cell("inoculation", options=FLAGGED),
    ],
    "zero3": [
        Cell("kl", "lora", True),
        Cell("interleave++,kl", "full", False),
        Cell("kl,steering,treft,inoculation_adapter", "lora", True, options=SCHEDULES),
    ],
    "fsdp2": [
        Cell("kl", "full", True, options={"kl_coef": "1.0->0.1"}),
        Cell("ldifs", "lora", False),
        Cell("steering,treft", "full", False),
        Cell("inoculation_adapter", "lora", True),
    ],
}


def check(engine: str, cells: list[Cell], folder: Path, timeout: int) -> None:
    alone = launch("one", cells, folder / "one", timeout)
    seen = launch(engine, cells, folder / engine, timeout)
    found = []
    for cell in cells:
        assert len(alone[cell.id]) == 1, (folder / "one" / "log.txt").read_text()[-3000:]
        assert "error" not in alone[cell.id][0], alone[cell.id][0]["error"]
        found += differences(engine, cell, folder / engine, folder / "one", seen[cell.id], alone[cell.id][0])
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_slice_of_the_matrix(tmp_path, engine):
    check(engine, SLICE[engine], tmp_path, timeout=280)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_whole_model_is_saved_from_shards(tmp_path, monkeypatch):
    """Save the model whole with accelerate's default for FSDP2, by which checkpoints hold a shard of each rank."""
    monkeypatch.setitem(ENGINES["fsdp2"]["fsdp_config"], "fsdp_state_dict_type", "SHARDED_STATE_DICT")
    saving = {"save_strategy": "steps", "save_steps": 3}
    check("fsdp2", [Cell("kl", "full", resumed=True, options=saving), Cell("kl")], tmp_path, timeout=280)


@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_matrix(tmp_path, engine):
    check(engine, MATRIX, tmp_path, timeout=850)


@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_conditions(tmp_path, engine):
    check(engine, CONDITIONS, tmp_path, timeout=850)
