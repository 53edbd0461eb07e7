"""Test the formulas for memory and network: weights are counted, engines divide them, and measurements are close."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, lora, make_model, make_trainer

from trl_emguard.planning.memory import (
    Engine,
    Run,
    Shape,
    count_weights,
    memory_per_rank,
    optimizer_states,
    peak,
)
from trl_emguard.planning.network import network_per_step


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling  # noqa: E402


SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
RUN = Run(rows=4, length=128, kept=256, guarded=True, has_divergence=True, compute_itemsize=4)


@pytest.fixture(scope="module")
def llama():
    """Return tuning -> weights and shape of a small Llama."""
    models = {"lora": get_peft_model(scaling.small_model(), scaling.lora()), "full": scaling.small_model()}
    return {tuning: (count_weights(model), Shape.of(model.config)) for tuning, model in models.items()}


# ---- what is counted ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tuning", ["lora", "full", "head"])
def test_weights_are_counted_on_the_meta_device_as_they_are(architecture, tuning):
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = make_model(architecture, torch.bfloat16)
        if tuning == "head":
            model.requires_grad_(False)
            model.get_output_embeddings().requires_grad_(True)
        if tuning == "lora":
            model = get_peft_model(model, lora())
        counts.append(count_weights(model))
        if device == "cpu":
            parameters = list(model.parameters())  # a tied weight counts once
            assert counts[0].total == sum(p.numel() for p in parameters)
            assert counts[0].trained == sum(p.numel() for p in parameters if p.requires_grad)
            assert counts[0].bytes == sum(p.nbytes for p in parameters)
            assert counts[0].trains_head == (tuning != "lora")
            assert counts[0].base == sum(p.numel() * 2 for name, p in model.named_parameters() if "lora_" not in name)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "published"),
    [("Qwen2.5-7B", 7_615_616_512), ("Qwen2.5-32B", 32_763_876_352), ("Llama-3.1-70B", 70_553_706_496)],
)
def test_large_shapes_have_their_published_size(name, published):
    assert count_weights(scaling.meta_model(name, "full")).total == published


def test_four_bits_are_packed():
    whole, packed = (count_weights(scaling.meta_model("Qwen2.5-7B", tuning)) for tuning in ("lora", "qlora"))
    assert packed.total == whole.total
    assert packed.trained == whole.trained
    blocks = whole.frozen - packed.frozen
    assert 0.73 < blocks / (whole.frozen - 2 * 2 * 152064 * 3584) < 0.75  # embedding and head stay as they are


# ---- engines ----


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("engine", ["one process", "ddp", *SHARDED])
def test_an_engine_divides_what_it_divides(llama, tuning, engine):
    weights, shape = llama[tuning]
    run = replace(RUN, reference="model" if tuning == "full" else "adapters off")
    two, eight = (memory_per_rank(weights, shape, run, Engine(engine, n)) for n in (2, 8))
    divided = {
        "weights": engine in ("zero3", "fsdp2"),
        "reference": engine in ("zero3", "fsdp2"),
        "gradients": engine in ("zero2", "zero3", "fsdp2"),
        "optimizer states": engine in SHARDED,
        "update": engine in SHARDED,
    }
    for name in two:
        assert two[name] == pytest.approx((4 if divided.get(name) else 1) * eight[name], abs=4), name
    assert (eight["gathered weights"] > 0) == (engine in ("zero3", "fsdp2"))
    assert peak(eight, run) <= peak(two, run) <= sum(two.values())


def test_adapters_off_is_free_and_a_model_is_not(llama):
    (adapted, shape), (full, _) = llama["lora"], llama["full"]
    for engine in (Engine("one process"), Engine("ddp", 4), Engine("zero2", 4)):
        free = memory_per_rank(adapted, shape, replace(RUN, reference="adapters off"), engine)
        assert free["reference"] == 0
        assert memory_per_rank(full, shape, replace(RUN, reference="model"), engine)["reference"] == full.base
        cached = memory_per_rank(full, shape, replace(RUN, reference="model", cached=True), engine)
        assert cached["reference"] == full.head


def test_fsdp_with_accumulation_keeps_whole_gradients(llama):
    weights, shape = llama["full"]
    once, often = (memory_per_rank(weights, shape, replace(RUN, micro_batches=m), Engine("fsdp2", 4)) for m in (1, 2))
    assert often["gradients"] == pytest.approx(4 * once["gradients"], abs=4)


def test_weights_under_bf16(llama):
    """DeepSpeed casts everything to bf16, and FSDP2 keeps trained weights in fp32."""
    weights, shape = llama["full"]
    run = replace(RUN, compute_itemsize=2)
    two = replace(weights, itemsize=2)
    for engine, given, size in (("zero2", weights, 2), ("fsdp2", two, 4), ("ddp", two, 2)):
        items = memory_per_rank(given, shape, run, Engine(engine, 1))
        assert items["weights"] == size * weights.trained


@pytest.mark.parametrize("engine", ["one process", "ddp", *SHARDED])
def test_one_rank_sends_nothing(llama, engine):
    weights, _ = llama["full"]
    assert not any(network_per_step(weights, RUN, Engine(engine, 1)).values())


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_references_pass_gathers_the_weights_once_more(llama, engine, micro_batches):
    weights, _ = llama["lora"]
    run = replace(RUN, micro_batches=micro_batches, reference="none")
    plain, defended = (
        network_per_step(weights, replace(run, reference=r), Engine(engine, 4)) for r in ("none", "adapters off")
    )
    assert sum(defended.values()) - sum(plain.values()) == round(weights.bytes * micro_batches * 3 / 4)
    cached = network_per_step(weights, replace(run, reference="adapters off", cached=True), Engine(engine, 4))
    assert cached == plain
    # Only DeepSpeed gathers recomputed blocks again.
    anew = network_per_step(weights, replace(run, checkpointing=False), Engine(engine, 4))
    assert (anew != plain) == (engine == "zero3")


# ---- compared with measurements ----


@pytest.mark.parametrize(
    ("optimizer", "count"), [("sgd", 0), ("adamw_torch", 2), ("adamw_torch_fused", 2), ("rmsprop", 1)]
)
def test_optimizer_states_are_counted(tmp_path, optimizer, count):
    trainer = make_trainer(tmp_path, optim=optimizer, max_steps=1)
    trainer.train()
    held = sum(
        x.nbytes for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim
    )
    weights = count_weights(trainer.model)
    assert held == 4 * count * weights.trained
    assert held == weights.trained * optimizer_states(optimizer, weights.itemsize, Engine("one process"))


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True, 3])  # 3 is every third block
@pytest.mark.parametrize("bf16", [False, True])
def test_saved_activations_are_near(tuning, checkpointing, bf16):
    row = scaling.measured_activations(tuning, checkpointing, bf16)
    assert abs(scaling.error(row)) < 0.03


@pytest.mark.parametrize(
    ("tuning", "checkpointing"), [("lora", False), pytest.param("full", True, marks=pytest.mark.long)]
)
def test_a_step_is_near(tuning, checkpointing):
    held, added = scaling.measured_step(tuning, checkpointing, "kl")
    assert abs(scaling.error(held)) < 0.01
    assert abs(scaling.error(added)) < 0.2


# ---- the page ----


def test_the_page_shows_the_measurements(tmp_path):
    shutil.copy(ROOT / "docs" / "scaling.md", tmp_path)
    before = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    scaling.write_page(scaling.RESULTS, tmp_path)
    assert (tmp_path / "scaling.md").read_text(encoding="utf-8") == before


def test_the_csv_agrees_with_the_formulas(llama):
    """A changed formula needs another run of the benchmark. One shape is compared."""
    rows = scaling.pick(scaling.read_csv(scaling.RESULTS / "memory-formula.csv"), shape="Qwen2.5-7B", tuning="lora")
    assert len(rows) == len(scaling.ENGINES) * len(scaling.DEFENSES)
    model = scaling.meta_model("Qwen2.5-7B", "lora")
    weights, shape = count_weights(model), Shape.of(model.config)
    for row in rows:
        run, engine = scaling.planned(row["defense"], "lora", shape.layers), scaling.ENGINES[row["engine"]]
        items = memory_per_rank(weights, shape, run, engine)
        assert row["peak_gib"] == scaling.gib(peak(items, run))
        assert row["network_gib"] == scaling.gib(sum(network_per_step(weights, run, engine).values()))
        assert all(row[f"{name.replace(' ', '_')}_gib"] == scaling.gib(size) for name, size in items.items())


def test_the_page_names_missing_measurements():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "nothing on this page was measured on one" in text
    assert all(f"| {engine} |" in text for engine in scaling.ENGINES if engine != "zero1")
