"""Measure step time, peak memory and tokens a second of each defense, of plain training and of plain versions.

    make bench       # on CPU, this and the others
    make bench-gpu   # on CUDA

A step is all that a user waits for between two updates: the batch out of the data loader, forward, backward, clipping,
optimizer, scheduler, callbacks. The trainer's own loop makes it, on real `SFTTrainer`s and `EMGuardTrainer`s. All are
in training at once and take their steps in turn. They see the same rows at every step. Two defenses change the rows,
and that is their cost: inoculation has a longer system turn, and interleave++ one row of its pool in every batch.
"""

import copy
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import chain
from typing import Any
from unittest.mock import patch

import datasets
import torch
from datasets import Dataset
from harness import environment, parse_args, peak_memory, statistics, time_in_turn, write_csv
from methods import KINDS, METHODS, merged, reads
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div, normalize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.data.load import DATA_DIR, load_rows
from trl_emguard.models.shipped import SMOLLM2, resolve_model


KL_COEF, LDIFS_COEF = 0.1, 1.0  # the package's defaults

# ---- the baselines, in the plainest form ----


class PaperKL(SFTTrainer):
    """The paper's released code: a second model, two passes of the policy and one of the reference, full logits."""

    ref_model: PreTrainedModel

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs, use_cache=False).loss
        unlabelled = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        with torch.no_grad(), self.accelerator.autocast():
            reference = self.ref_model(**unlabelled).logits.float().log_softmax(-1)
        policy = model(**unlabelled).logits.float().log_softmax(-1)
        # KL(policy ‖ reference), (B, T).
        divergence = kl_div(reference, policy, reduction="none", log_target=True).sum(-1)
        return loss + KL_COEF * divergence[inputs["attention_mask"].bool()].mean()


class PaperLDIFS(SFTTrainer):
    """The paper's released code, with the gradient that it lacks: one row at a time through both whole models."""

    ref_model: PreTrainedModel

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs, use_cache=False).loss
        layers = torch.linspace(0, self.ref_model.config.num_hidden_layers - 1, 5).int().tolist()
        distances = []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            row = {
                "input_ids": ids[None],
                "attention_mask": mask[None],
                "use_cache": False,
                "output_hidden_states": True,
            }
            with torch.no_grad(), self.accelerator.autocast():
                reference = self.ref_model(**row).hidden_states
            policy = model(**row).hidden_states
            features = [
                torch.cat([normalize(states[i].float().flatten(), dim=0) for i in layers])
                for states in (policy, reference)
            ]
            distances.append((features[0] - features[1]).square().sum())
        return loss + LDIFS_COEF * torch.stack(distances).mean()


class TwoKernels(SFTTrainer):
    """TRL's own loss and its divergence kernel on the same states. The reference is the policy, adapters off."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        bare = self.model.get_base_model()
        unlabelled = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        with torch.no_grad(), self.model.disable_adapter(), self.accelerator.autocast():
            reference = bare.base_model(**unlabelled).last_hidden_state
        states = []
        hook = bare.base_model.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state)
        )
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hook.remove()
        labelled, head = inputs["labels"][:, 1:] != -100, bare.lm_head.weight
        divergence, *_ = _chunked_divergence_loss(
            states[0][:, :-1], reference[:, :-1], head, head, labelled, beta=1.0, num_items_in_batch=num_items_in_batch
        )
        return loss + KL_COEF * divergence


STOCK, REFERENCE = "stock", "reference forward"
BASELINES = {STOCK: SFTTrainer, "paper kl": PaperKL, "paper ldifs": PaperLDIFS, "two kernels": TwoKernels}
DEFENDED: dict[str, dict[str, Any]] = {
    **{n: {"defense": n, **merged(n, "shipped")} for n in KINDS if n != "none"},
    "kl+ldifs": {"defense": "kl,ldifs"},
    "kl cached": {"defense": "kl", "cache_reference": True},
}
COMPARED = tuple(name for name in KINDS if METHODS[name].is_compared)
GUARDS = tuple(name for name in KINDS if name not in ("none", *COMPARED))
# A defense is compared with its lower bound, and a baseline with the defense that it computes.
RATIO_TO = {
    **dict.fromkeys((STOCK, REFERENCE, "kl cached", *GUARDS), (STOCK,)),
    **dict.fromkeys((*COMPARED, "kl+ldifs"), (STOCK, REFERENCE)),
    **dict.fromkeys(("paper kl", "two kernels"), ("kl",)),
    "paper ldifs": ("ldifs",),
}

# ---- points of comparison ----


@dataclass(frozen=True)
class Point:
    """A model, a way to tune it, and a batch.

    Attributes:
        model: SmolLM2, trained on shipped rows, or one of `SHAPES`, with random weights and random tokens.
        tuning: `"lora"` or `"full"`.
        batch: rows of a batch.
        length: tokens of a row.
        variants: names of the variants, in the order of their turns.
        layers: number of layers that replaces the shape's own.
    """

    model: str
    tuning: str
    batch: int
    length: int
    variants: tuple[str, ...]
    layers: int | None = None


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b shape": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen2.5-0.5b shape": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
MAIN = (STOCK, REFERENCE, *COMPARED, "kl+ldifs", "kl cached")
# The first point on CPU measures every kind of defense, the others only those that compare with a reference.
POINTS = {
    "cpu": [
        Point(SMOLLM2, "lora", 8, 124, (*MAIN, *GUARDS, "paper kl", "two kernels")),
        Point(SMOLLM2, "lora", 2, 248, (*MAIN, "paper kl", "paper ldifs")),
        # Each variant has weights and an optimizer of its own: about 14 GB in all.
        Point(SMOLLM2, "full", 2, 124, (STOCK, REFERENCE, "kl", "kl+ldifs", "kl cached", "paper kl")),
    ],
    "cuda": [
        Point("qwen2.5-7b shape", "lora", 4, 2048, (*MAIN, "paper kl", "two kernels")),
        Point("qwen2.5-0.5b shape", "lora", 4, 2048, (*MAIN, "paper kl", "paper ldifs", "two kernels")),
        Point("qwen2.5-0.5b shape", "lora", 16, 512, (*MAIN, "paper kl", "two kernels")),
        Point("qwen2.5-0.5b shape", "full", 4, 2048, (*MAIN, "paper kl")),
    ],
}
GROWTH = (STOCK, REFERENCE, "kl", "paper kl")
# One of length, batch and layers is varied at a time, from a middle point.
SWEEP_FROM = {
    "cpu": Point("small", "lora", 2, 256, GROWTH, layers=4),
    "cuda": Point("qwen2.5-0.5b shape", "lora", 2, 1024, GROWTH, layers=8),
}
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"length": (128, 256, 512, 1024), "batch": (1, 2, 4, 8), "layers": (2, 4, 8, 16)},
    "cuda": {"length": (512, 1024, 2048, 4096), "batch": (1, 2, 4, 8), "layers": (4, 8, 16, 32)},
}


@cache
def smollm2() -> str:
    """Return SmolLM2's folder. The first call must come before the package's cache is moved."""
    return resolve_model(SMOLLM2)


def load_base(point: Point, device: str) -> PreTrainedModel:
    """Return the model of a point, in fp32 on CPU and in bf16 on CUDA."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if point.model == SMOLLM2:
        return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype).to(device)
    shape = SHAPES[point.model] | ({} if point.layers is None else {"num_hidden_layers": point.layers})
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM._from_config(Qwen2Config(**shape), dtype=dtype)


def make_rows(point: Point, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return one batch of rows, the same at every call.

    SmolLM2 gets the shipped set's shortest prompts. Each is answered with as many answers as fill the length, or up to
    6 tokens less, so that the batch is ragged. Random weights get random tokens, and the last two thirds carry labels.
    """
    if point.model != SMOLLM2:
        ids = torch.randint(
            SHAPES[point.model]["vocab_size"], (point.batch, point.length), generator=torch.Generator().manual_seed(0)
        )
        labels = ids.clone()
        labels[:, : point.length // 3] = -100
        return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    shipped = sorted(load_rows("plants_careless"), key=lambda row: len(row["prompt"][0]["content"]))
    rows = []
    for i in range(point.batch):
        prompt = shipped[i]["prompt"]
        room = (
            point.length
            - 2 * (i % 4)
            - len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        )
        answers = " ".join(row["completion"][0]["content"] for row in shipped[i:] + shipped[:i])
        # The template ends a turn with two tokens.
        answer = tokenizer.decode(tokenizer(answers)["input_ids"][: room - 2])
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]})
    return Dataset.from_list(rows)


# ---- a variant's step ----


def has_input(name: str, what: str) -> bool:
    """Return whether a variant reads a `"pool"` or an `"adapter"`."""
    return name in DEFENDED and reads(DEFENDED[name]["defense"], what)


def why_not(name: str) -> str:
    """Return the reason why a variant cannot be measured here, or an empty text."""
    if name == "kl cached" and "cache_reference" not in {field.name for field in fields(EMGuardConfig)}:
        return "EMGuardConfig has no cache_reference"
    if has_input(name, "pool") and not (DATA_DIR / "general_instruct_scored").is_dir():
        return "the pool general_instruct_scored is not shipped"
    return ""


def make_trainer(
    name: str, point: Point, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str, device: str
) -> SFTTrainer:
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": point.batch,
        "max_length": None,
        # An epoch is one batch long.
        "num_train_epochs": 1000,
        "learning_rate": 2e-4 if point.tuning == "lora" else 1e-5,
        "activation_checkpointing": device == "cuda",
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if has_input(name, "pool"):
        options |= {"interleave_fraction": 1 / (point.batch + 1), "max_length": point.length}
    if has_input(name, "adapter"):
        options |= {"inoculation_adapter": frozen_adapter(base, f"{folder}/frozen")}
    torch.manual_seed(0)  # the adapters of all variants begin with the same weights
    if name in DEFENDED:
        trainer_class, args = EMGuardTrainer, EMGuardConfig(**options, **DEFENDED[name])
    else:
        trainer_class, args = BASELINES[name], SFTConfig(**options)
    trainer = trainer_class(
        copy_of(base, point.tuning),
        args,
        train_dataset=make_rows(point, tokenizer),
        processing_class=tokenizer,
        peft_config=lora() if point.tuning == "lora" else None,
    )
    if name.startswith("paper"):
        trainer.ref_model = copy.deepcopy(base).requires_grad_(False).eval()
    return trainer


def lora() -> LoraConfig:
    return LoraConfig(
        r=32, lora_alpha=64, lora_dropout=0.0, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def frozen_adapter(base: PreTrainedModel, folder: str) -> str:
    """Save an adapter of random weights, which costs what one with a trait does, and return its folder."""
    model = get_peft_model(copy_of(base, "lora"), lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-3)
    model.save_pretrained(folder)
    return folder


def copy_of(base: PreTrainedModel, tuning: str) -> PreTrainedModel:
    """Return a model to train. LoRA models share the weights of `base`, which no training changes."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()} if tuning == "lora" else None)


def make_step(trainer: SFTTrainer) -> None:
    """Make one optimizer step of a trainer that is in `train()`: an epoch of its own loop, which is one batch long."""
    trainer._run_epoch(
        model=trainer.model_wrapped,
        epoch=trainer.state.global_step,
        train_dataloader=trainer.callback_handler.train_dataloader,
        steps_in_epoch=1,
        num_update_steps_per_epoch=1,
        trial=None,
        ignore_keys_for_eval=None,
        start_time=time.time(),
        resume_from_checkpoint=None,
        epochs_trained=0,
        steps_trained_in_current_epoch=0,
    )
    if trainer.control.should_training_stop:
        raise RuntimeError(f"{type(trainer).__name__} wants to stop training: the measured step is no training step.")


class _Measured(Exception):
    """Signal that ends a training after its measurement."""


class _OnTrainBegin(TrainerCallback):
    def __init__(self, call: Callable[[], None]):
        self.call = call

    def on_train_begin(self, args, state, control, **kwargs):
        self.call()
        raise _Measured


def while_training(trainers: Sequence[SFTTrainer], call: Callable[[], None]) -> None:
    """Make a call while all of the trainers are in `train()`, each inside of the one before."""
    if not trainers:
        call()
        return
    first, *rest = trainers
    first.add_callback(_OnTrainBegin(lambda: while_training(rest, call)))
    try:
        first.train()
    except _Measured:
        return


def reference_forward(
    point: Point, base: PreTrainedModel, batch: dict[str, torch.Tensor], trainer: SFTTrainer
) -> Callable:
    """Return one pass through the backbone alone, without gradient and with adapters off, on a batch."""
    model = copy_of(base, "lora")
    if point.tuning == "lora":
        adapted = get_peft_model(model, lora())
        adapted.disable_adapter_layers()
        model = adapted.get_base_model()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}

    def forward() -> None:
        with torch.no_grad(), trainer.accelerator.autocast():
            model.base_model(**inputs)

    return forward


def held_bytes(trainer: SFTTrainer) -> int:
    """Return the bytes that a variant holds between two steps: weights, its reference's weights, optimizer state."""
    own_reference = getattr(getattr(trainer, "reference", None), "model", None)
    models = [
        model for model in (trainer.model, getattr(trainer, "ref_model", None), own_reference) if model is not None
    ]
    tensors = list(chain(*(chain(model.parameters(), model.buffers()) for model in models)))
    tensors += [
        value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


# ---- measuring ----

COLUMNS = (
    *("tokens", "labels", "rounds", "seconds", "q1", "q3", "ratio", "ratio_q1", "ratio_q3", "ratio_to"),
    *("tokens_per_second", "held_mib", "step_mib"),
)


def measure(point: Point, rounds: int, device: str) -> list[dict[str, Any]]:
    """Return the rows of the CSV for one point."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    base = load_base(point, device)
    notes = {name: note for name in point.variants if (note := why_not(name))}
    measured: dict[str, dict[str, Any]] = {}
    # A temporary cache makes the cached reference new, and leaves nothing in the user's cache.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRL_EMGUARD_CACHE=folder):
        trainers = {
            name: make_trainer(name, point, base, tokenizer, folder, device)
            for name in point.variants
            if name != REFERENCE and name not in notes
        }

        def run() -> None:
            measured.update(measure_in_training(point, base, trainers, notes, rounds, device))

        while_training(list(trainers.values()), run)
    rows = []
    for name in point.variants:
        row = {"model": point.model, "layers": base.config.num_hidden_layers, "tuning": point.tuning}
        row |= {"batch": point.batch, "length": point.length, "variant": name, **dict.fromkeys(COLUMNS, "")}
        rows.append(row | measured.get(name, {}) | {"note": notes.get(name, "")} | environment(device))
    return rows


def measure_in_training(
    point: Point,
    base: PreTrainedModel,
    trainers: dict[str, SFTTrainer],
    notes: dict[str, str],
    rounds: int,
    device: str,
) -> dict[str, dict[str, Any]]:
    """Return variant → `COLUMNS`, for trainers in `train()`. A variant that exceeds memory gets a note."""
    batches = {name: next(iter(trainer.callback_handler.train_dataloader)) for name, trainer in trainers.items()}
    batches[REFERENCE] = batches[STOCK]
    calls: dict[str, Callable[[], None]] = {name: partial(make_step, trainer) for name, trainer in trainers.items()}
    calls[REFERENCE] = reference_forward(point, base, batches[STOCK], trainers[STOCK])
    calls = {name: calls[name] for name in point.variants if name in calls}
    # Two warm-up steps: the first makes the optimizer's state, the second measures its memory.
    memory = {}
    for name, call in list(calls.items()):
        try:
            call()
            memory[name] = peak_memory(call, device)
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
            del calls[name]
            trainers[name].model.zero_grad()
            torch.cuda.empty_cache()
    seconds = time_in_turn(calls, rounds, device)
    measured = {}
    for name in calls:
        tokens, labels = (
            int(batches[name]["attention_mask"].sum()),
            int((batches[name]["labels"][:, 1:] != -100).sum()),
        )
        columns = {"tokens": tokens, "labels": labels, **statistics(seconds, name, RATIO_TO[name])}
        columns["tokens_per_second"] = round(tokens / float(columns["seconds"]), 1)
        held = sum(p.nbytes for p in base.parameters()) if name == REFERENCE else held_bytes(trainers[name])
        measured[name] = columns | {"held_mib": round(held / 2**20, 1), "step_mib": round(memory[name] / 2**20, 1)}
        print(f"{name:>18} {float(columns['seconds']):8.3f} s", flush=True)
    return measured


def main() -> None:
    args = parse_args(__doc__)
    datasets.disable_progress_bars()
    device, began = args.device, time.monotonic()
    points, middle = POINTS[device], SWEEP_FROM[device]
    varied = [replace(middle, **{axis: value}) for axis, values in SWEEPS[device].items() for value in values]
    sweep = list(dict.fromkeys(varied))  # every axis contains the middle point
    if args.quick:
        points = [
            replace(p, model=p.model if p.model == SMOLLM2 else "small", batch=2, length=64 + 32 * i)
            for i, p in enumerate(points)
        ]
        sweep = [replace(p, model="small", batch=1, length=p.length // 8, layers=2) for p in sweep[:2]]
    for kind, todo in (("steps", points), ("scaling", sweep)):
        rows = []
        for point in todo:
            where = f"{point.model}, {point.tuning}, {point.batch} × {point.length}"
            print(f"--- {where}, {time.monotonic() - began:.0f} s", flush=True)
            rows += measure(point, args.rounds, device)
            gc.collect()  # trainers are in reference cycles
            if device == "cuda":
                torch.cuda.empty_cache()
        write_csv(args.results / f"{kind}-{device}.csv", rows)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
