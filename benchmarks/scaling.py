"""Compute memory per rank and network volume per step for 7B, 32B and 70B; compare the formulas with small models.

    python benchmarks/scaling.py

Weights of the large shapes are counted on the meta device, which holds sizes and no numbers. It writes two CSVs and,
from them, the tables of docs/scaling.md.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness import RESULTS, environment, peak_memory, read_csv, write_csv
from peft import get_peft_model
from steps import SHAPES, SMOLLM2, held_bytes, lora, make_step, smollm2, while_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.planning.memory import (
    Engine,
    Run,
    Shape,
    count_weights,
    memory_per_rank,
    peak,
    saved_activations,
)
from trl_emguard.planning.meta import quantized
from trl_emguard.planning.network import network_per_step


DOCS = Path(__file__).parent.parent / "docs"

# Sizes are those of the models' published configs.
CONFIGS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "Qwen2.5-7B": (Qwen2Config, Qwen2ForCausalLM, SHAPES["qwen2.5-7b shape"]),
    "Qwen2.5-32B": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "vocab_size": 152064,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    ),
    "Llama-3.1-70B": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
}
TUNINGS = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}
RANKS = 8
ENGINES = {
    "one process": Engine("one process"),
    **{name: Engine(name, RANKS) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")},  # type: ignore[arg-type]
}
DEFENSES = ("none", "kl", "ldifs", "kl+ldifs", "interleave")
# The micro-batch is the recipes', and half of its tokens are labels.
ROWS, LENGTH, LABELS, ACCUMULATION, SAFE = 4, 2048, 1024, 4, 0.05
GIB = 2**30


# ---- by formula ----


def meta_model(name: str, tuning: str) -> PreTrainedModel:
    """Return a large model ready to train, on the meta device."""
    config_class, model_class, sizes = CONFIGS[name]
    with torch.device("meta"):
        model = model_class(config_class(**sizes, tie_word_embeddings=False)).to(torch.bfloat16)
    if tuning == "qlora":
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = quantized(model, how)
    return model if tuning == "full" else get_peft_model(model, lora())


def planned(defense: str, tuning: str, layers: int) -> Run:
    """Return a run of the recipes' size, in bf16 and with checkpointing."""
    compared = defense in ("kl", "ldifs", "kl+ldifs")
    rows = ROWS + (defense == "interleave")  # a micro-batch gets one row of the pool at most
    return Run(
        rows=rows,
        length=LENGTH,
        kept=rows * LABELS,
        micro_batches=ACCUMULATION,
        guarded=defense != "none",
        reference=("model" if tuning == "full" else "adapters off") if compared else "none",
        has_divergence="kl" in defense,
        layers=layers // 5 if "ldifs" in defense else 0,
    )


def by_formula() -> list[dict[str, Any]]:
    """Return a row for each shape, tuning, engine and defense: GiB of each item, and of the network."""
    rows = []
    for name in CONFIGS:
        for tuning in TUNINGS:
            model = meta_model(name, tuning)
            weights, shape = count_weights(model), Shape.of(model.config)
            for label, engine in ENGINES.items():
                for defense in DEFENSES:
                    run = planned(defense, tuning, shape.layers)
                    memory, network = (
                        memory_per_rank(weights, shape, run, engine),
                        network_per_step(weights, run, engine),
                    )
                    rows.append(
                        {"shape": name, "tuning": tuning, "engine": label, "ranks": engine.ranks, "defense": defense}
                        | {"parameters": weights.total, "trained": weights.trained, "weights_gib": gib(weights.bytes)}
                        | {"peak_gib": gib(peak(memory, run)), "network_gib": gib(sum(network.values()))}
                        | {f"{key.replace(' ', '_')}_gib": gib(size) for key, size in memory.items()}
                        | {f"network_{key.replace(', ', '_')}_gib": gib(size) for key, size in network.items()}
                        | environment("cpu")
                    )
    return rows


def gib(size: float) -> str:
    return f"{size / GIB:.4g}"


# ---- by measurement ----

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
BATCH, TOKENS, SMALL_LABELS = 4, 128, 64


def small_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def small_trainer(folder: str, tuning: str, checkpointing: bool, defense: str) -> EMGuardTrainer:
    """Return a trainer of a small random model in fp32, with rows of one length."""
    ids = torch.randint(3, SMALL["vocab_size"], (BATCH, TOKENS)).tolist()
    labels = [[-100] * (TOKENS - SMALL_LABELS) + row[-SMALL_LABELS:] for row in ids]
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    args = EMGuardConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1000,
        max_length=None,
        activation_checkpointing=checkpointing,
        bf16=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        defense=defense.replace("+", ","),
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    peft = lora() if tuning == "lora" else None
    return EMGuardTrainer(small_model(), args, train_dataset=rows, processing_class=tokenizer, peft_config=peft)


def small_run(tuning: str, checkpointing: int, defense: str) -> Run:
    return replace(
        planned(defense, tuning, SMALL["num_hidden_layers"]),
        rows=BATCH,
        length=TOKENS,
        kept=BATCH * SMALL_LABELS,
        micro_batches=1,
        compute_itemsize=4,
        checkpointing=checkpointing,
    )


def measured_step(tuning: str, checkpointing: bool, defense: str) -> list[dict[str, Any]]:
    """Compare the memory that a real run holds between steps, and that a step adds, with the formula."""
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = small_trainer(folder, tuning, checkpointing, defense)
        weights, shape = count_weights(trainer.model), Shape.of(trainer.model.config)

        def measure() -> None:
            make_step(trainer)
            make_step(trainer)
            seen["held"] = held_bytes(trainer)
            seen["step"] = peak_memory(lambda: make_step(trainer), "cpu")

        while_training([trainer], measure)
    items = memory_per_rank(weights, shape, small_run(tuning, checkpointing, defense), Engine("one process"))
    held = sum(items[key] for key in ("weights", "optimizer states", "reference"))
    what = f"{TUNINGS[tuning]}, {'with' if checkpointing else 'without'} checkpointing, `{defense}`"
    rows = [compared("held between steps", what, held, seen["held"])]
    # An undefended run has TRL's head, which the formula leaves out.
    formula = peak(items, small_run(tuning, checkpointing, defense)) - held
    return rows + [compared("added in a step", what, formula, seen["step"])] * (defense != "none")


def saved_bytes(model: PreTrainedModel, checkpointing: int, bf16: bool) -> int:
    """Return the bytes that a backbone's forward pass saves for the backward pass, without weights."""
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    if checkpointing:
        model.activation_checkpointing_enable(every_n_layers=int(checkpointing))
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A reference is kept, so that no storage's address is given to another. Casts of weights have no tokens.
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape[:1] in ((BATCH,), (BATCH * TOKENS,)):
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, SMALL["vocab_size"], (BATCH, TOKENS))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        bare.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def measured_activations(tuning: str, checkpointing: int, bf16: bool) -> dict[str, Any]:
    """Compare the memory that the forward pass saves with the formula's part for it."""
    model = small_model().to(torch.bfloat16 if bf16 else torch.float32)
    model = model if tuning == "full" else get_peft_model(model, lora())
    weights, shape = count_weights(model), Shape.of(model.config)
    run = replace(small_run(tuning, checkpointing, "none"), compute_itemsize=2 if bf16 else 4)
    formula = saved_activations(weights, shape, run)
    what = f"{TUNINGS[tuning]}, {'with' if checkpointing else 'without'} checkpointing, {'bf16' if bf16 else 'fp32'}"
    return compared("saved for the backward pass", what, formula, saved_bytes(model, checkpointing, bf16))


def other_architectures() -> list[dict[str, Any]]:
    """Compare two models to which the formula was not fitted: biases and grouped heads; and an MLP without a gate."""
    sizes = {"vocab_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 6, "pad_token_id": 0}
    configs = {
        "Qwen2, width 192, 2 of 6 heads": Qwen2Config(
            **sizes, hidden_size=192, intermediate_size=512, num_key_value_heads=2
        ),
        "GPT-NeoX, width 192": GPTNeoXConfig(**sizes, hidden_size=192, intermediate_size=768),
    }
    rows = []
    for what, config in configs.items():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        formula = saved_activations(count_weights(model), Shape.of(config), small_run("full", False, "none"))
        rows.append(compared("other architectures, saved", what, formula, saved_bytes(model, False, bf16=False)))
    return rows


def against_bench() -> list[dict[str, Any]]:
    """Compare whole steps of a real model, measured by `make bench`, with the formula."""
    rows = []
    config = AutoConfig.from_pretrained(smollm2())
    for row in read_csv(RESULTS / "steps-cpu.csv"):
        if row["model"] != SMOLLM2 or row["variant"] not in ("kl", "ldifs", "kl+ldifs"):
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = get_peft_model(model, lora()) if row["tuning"] == "lora" else model
        weights, shape = count_weights(model), Shape.of(config)
        run = replace(
            small_run(row["tuning"], False, row["variant"]),
            rows=int(row["batch"]),
            length=int(row["length"]),
            kept=int(row["labels"]),
            layers=shape.layers // 5 if "ldifs" in row["variant"] else 0,
        )
        items = memory_per_rank(weights, shape, run, Engine("one process"))
        held = sum(items[key] for key in ("weights", "optimizer states", "reference"))
        what = f"{TUNINGS[row['tuning']]}, {row['batch']} × {row['length']} tokens, `{row['variant']}`"
        for kind, formula, column in (("held", held, "held_mib"), ("added", peak(items, run) - held, "step_mib")):
            rows.append(compared(f"SmolLM2-135M, {kind}", what, formula, float(row[column]) * 2**20))
    return rows


def against_deepspeed() -> list[dict[str, Any]]:
    """Compare weights, gradients and optimizer states of full fine-tuning with DeepSpeed's own estimate."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    rows = []
    for name in CONFIGS:
        model = meta_model(name, "full")
        weights, shape = count_weights(model), Shape.of(model.config)
        run = planned("none", "full", shape.layers)
        keys = ("weights", "gradients", "optimizer states", "update")
        for engine in ("zero2", "zero3"):
            items = memory_per_rank(weights, shape, run, ENGINES[engine])
            if engine == "zero2":
                _, theirs = estimate_zero2_model_states_mem_needs(weights.total, RANKS, cpu_offload=False)
            else:
                _, theirs, _ = estimate_zero3_model_states_mem_needs(
                    weights.total, 0, RANKS, cpu_offload=False, cpu_offload_params=False
                )
            rows.append(compared("DeepSpeed's estimate", f"{name}, {engine}", sum(items[key] for key in keys), theirs))
    return rows


def compared(kind: str, what: str, formula: float, measured: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "what": what,
        "formula_mib": f"{formula / 2**20:.5g}",
        "measured_mib": f"{measured / 2**20:.5g}",
    }


def by_measurement() -> list[dict[str, Any]]:
    rows = []
    for tuning in ("lora", "full"):
        for checkpointing in (False, True):
            rows += [measured_activations(tuning, checkpointing, bf16) for bf16 in (False, True)]
    for tuning in ("lora", "full"):
        for checkpointing in (False, True):
            for defense in ("none", "kl", "kl+ldifs"):
                rows += measured_step(tuning, checkpointing, defense)
    rows += other_architectures() + against_bench() + against_deepspeed()
    return [row | environment("cpu") for row in rows]


# ---- the page ----

Row = dict[str, str]


def pick(rows: Sequence[Row], **where: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def counts_table(rows: Sequence[Row]) -> str:
    lines = ["| | parameters | LoRA, r = 32 | weights in bf16, GiB | in 4 bits, GiB |", "|---|---|---|---|---|"]
    for shape in CONFIGS:
        first = {tuning: pick(rows, shape=shape, tuning=tuning)[0] for tuning in TUNINGS}
        cells = [shape, f"{int(first['full']['parameters']):,}", f"{int(first['lora']['trained']):,}"]
        cells += [f"{float(first[tuning]['weights_gib']):.1f}" for tuning in ("full", "qlora")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(rows: Sequence[Row], tuning: str) -> str:
    lines = [f"| {TUNINGS[tuning]} | {' | '.join(f'{shape}: none | kl' for shape in CONFIGS)} |"]
    lines.append("|---|" + "---|---|" * len(CONFIGS))
    for engine in (name for name in ENGINES if name != "zero1"):
        cells = [engine]
        for shape in CONFIGS:
            for defense in ("none", "kl"):
                (row,) = pick(rows, shape=shape, tuning=tuning, engine=engine, defense=defense)
                cells.append(f"{float(row['peak_gib']):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def defenses_table(rows: Sequence[Row]) -> str:
    cases = [(t, e) for t in ("lora", "full") for e in ("ddp", "zero3")]
    lines = [
        f"| Qwen2.5-7B, GiB more | {' | '.join(f'{TUNINGS[t]}, {e}' for t, e in cases)} |",
        "|---|" + "---|" * len(cases),
    ]
    for defense in DEFENSES[1:]:
        cells = [f"`{defense}`"]
        for tuning, engine in cases:
            plain, defended = (
                pick(rows, shape="Qwen2.5-7B", tuning=tuning, engine=engine, defense=name)[0]
                for name in ("none", defense)
            )
            cells.append(f"{float(defended['peak_gib']) - float(plain['peak_gib']):+.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def network_table(rows: Sequence[Row]) -> str:
    lines = [
        f"| GiB a step | {' | '.join(f'{shape}: none | kl' for shape in CONFIGS)} |",
        "|---|" + "---|---|" * len(CONFIGS),
    ]
    for tuning in ("lora", "full"):
        for engine in ("ddp", "zero2", "zero3", "fsdp2"):
            cells = [f"{TUNINGS[tuning]}, {engine}"]
            for shape in CONFIGS:
                for defense in ("none", "kl"):
                    (row,) = pick(rows, shape=shape, tuning=tuning, engine=engine, defense=defense)
                    cells.append(
                        f"{float(row['network_gib']):.3g}"
                        if float(row["network_gib"]) < 1000
                        else f"{float(row['network_gib']):.0f}"
                    )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def error(row: Row) -> float:
    return float(row["formula_mib"]) / float(row["measured_mib"]) - 1


def measured_table(rows: Sequence[Row]) -> str:
    """Return the comparison that is farthest off, for each kind."""
    first = rows[0]
    packages = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "peft", "trl_emguard"))
    lines = [f"{first['processor']}; {first['date']}; {packages}.", ""]
    lines += [
        "| | comparisons | the farthest off | formula, MiB | measured, MiB | error |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found = pick(rows, kind=kind)
        row = max(found, key=lambda row: abs(error(row)))
        cells = [
            kind,
            str(len(found)),
            row["what"],
            *(f"{float(row[name]):,.1f}" for name in ("formula_mib", "measured_mib")),
        ]
        lines.append(f"| {' | '.join(cells)} | {error(row):+.1%} |")
    return "\n".join(lines)


def write_page(results: Path, docs: Path) -> None:
    """Fill in the tables between the markers of docs/scaling.md."""
    formula, measured = read_csv(results / "memory-formula.csv"), read_csv(results / "memory-measured.csv")
    parts = {"counts": counts_table(formula), "defenses": defenses_table(formula), "network": network_table(formula)}
    parts |= {f"memory {tuning}": memory_table(formula, tuning) for tuning in TUNINGS}
    parts["measured"] = measured_table(measured)
    page = docs / "scaling.md"
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{page} has no {begin.strip()} … {end.strip()}")
        text = before + begin + part + "\n" + end + after
    page.write_text(text, encoding="utf-8")


def main() -> None:
    write_csv(RESULTS / "memory-formula.csv", by_formula())
    write_csv(RESULTS / "memory-measured.csv", by_measurement())
    write_page(RESULTS, DOCS)


if __name__ == "__main__":
    main()
