"""The one list of defenses that every suite runs: the options, inputs and results of each.

A suite takes the names that it needs from [`KINDS`], [`COVERING`] or [`METHODS`], and a run's arguments from
[`run_options`]. A new defense is added to `METHODS`; a new kind of defense also to `KINDS` and `COVERING`. The
benchmarks import this list too, so it imports nothing of the package when it is loaded.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """A defense as the tests run it.

    Attributes:
        options: options under which it acts on the tiny model within a few steps.
        off: options that switch it off; empty if none can.
        inputs: files and rows that it reads, of `"vector"`, `"adapter"` and `"pool"`.
        shipped: the same inputs for SmolLM2, as options that name what the package ships.
        logs: names that it adds to the log of every step.
        counts: entries of its evidence that are equal for every number of ranks.
        is_compared: True if it compares the policy with a reference.
        needs_lora: True if it refuses full fine-tuning.
    """

    options: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    shipped: dict[str, Any] = field(default_factory=dict)
    logs: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    is_compared: bool = False
    needs_lora: bool = False


_POOL: dict[str, Any] = {
    "options": {"interleave_fraction": 0.3},
    "off": {"interleave_fraction": 0},
    "inputs": ("pool",),
    "shipped": {"interleave_dataset": "general_instruct_scored"},
    "logs": ("interleaved_fraction",),
    "counts": ("rows_finetune", "rows_interleaved", "acted"),
}
METHODS = {
    "none": Method(),
    "kl": Method(
        options={"kl_coef": 1.0},
        off={"kl_coef": 0.0},
        logs=("kl",),
        counts=("positions", "acted"),
        is_compared=True,
    ),
    "ldifs": Method(
        options={"ldifs_coef": 1.0, "ldifs_layers": "every:2"},
        off={"ldifs_coef": 0.0},
        logs=("ldifs",),
        counts=("positions", "acted"),
        is_compared=True,
    ),
    "treft": Method(
        options={"treft_coef": 1.0},
        off={"treft_coef": 0.0},
        logs=("treft",),
        counts=("acted",),
    ),
    "steering": Method(
        options={"steering_coef": 1.0},
        off={"steering_coef": 0.0},
        inputs=("vector",),
        shipped={"steering_vector": "smollm2-135m-instruct-evil"},
        counts=("layers", "acted"),
    ),
    "inoculation": Method(counts=("rows", "changed", "acted")),
    "inoculation_adapter": Method(
        off={"inoculation_adapter_scale": 0.0},
        inputs=("adapter",),
        counts=("layers", "acted"),
        needs_lora=True,
    ),
    "interleave": Method(**_POOL),
    "interleave+": Method(**_POOL),
    "interleave++": Method(**_POOL),
}
# One name for each kind of defense, and all of them at once.
KINDS = ("none", "kl", "ldifs", "treft", "steering", "inoculation", "inoculation_adapter", "interleave++")
EVERYTHING = "interleave++,kl,ldifs,treft,steering,inoculation,inoculation_adapter"
# Defenses that compare the policy with a reference, alone and together.
COMPARING = ("kl", "ldifs", "kl,ldifs")
# Few runs in which every kind occurs: for suites whose runs take long.
COVERING = ("none", "kl,ldifs", "treft", "interleave", "steering,kl", "inoculation", "inoculation_adapter,kl")


def split(defense: str) -> list[str]:
    """Return the names in the value of `defense`, "none" among them."""
    return defense.split(",")


def merged(defense: str, what: str) -> dict[str, Any]:
    """Return the `options`, `off` or `shipped` of all the methods in the value of `defense`."""
    return {key: value for name in split(defense) for key, value in getattr(METHODS[name], what).items()}


def reads(defense: str, what: str) -> bool:
    """Return whether a run with a defense reads a `"vector"`, an `"adapter"` or a `"pool"`."""
    return any(what in METHODS[name].inputs for name in split(defense))


def tunings(defense: str) -> tuple[str, ...]:
    """Return the ways of tuning that a defense works with, of `"lora"` and `"full"`."""
    return ("lora",) if any(METHODS[name].needs_lora for name in split(defense)) else ("lora", "full")


def save_vector(path: Path, width: int = 32, **metadata: Any) -> str:
    """Write a persona vector of a tiny model, the same at every call; return its path."""
    import torch

    from trl_emguard.persona import PersonaVector

    vectors = torch.arange(5.0 * width).view(5, width).sin()
    PersonaVector(vectors, metadata={"suggested_layer": 2, **metadata}).save(path)
    return str(path)


def save_adapter(folder: Path, model: Any = None, **overrides: Any) -> str:
    """Write a LoRA adapter of a tiny model, the same at every call; return its folder.

    Args:
        folder: folder to write.
        model: the model; by default the tiny Llama.
        overrides: values that replace those of the adapter's configuration.
    """
    import torch
    from peft import get_peft_model
    from tiny import lora, make_model

    model = make_model() if model is None else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        adapted = get_peft_model(model, lora(**{"init_lora_weights": False, "lora_alpha": 2, **overrides}))
    adapted.save_pretrained(folder)
    return str(folder)


def run_options(defense: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Return the options and the pool of a run, for `tiny.make_trainer`; its files are written to `folder`."""
    from tiny import make_pool

    options = {"defense": defense, **merged(defense, "options")}
    if reads(defense, "vector"):
        options["steering_vector"] = save_vector(folder / "vector.safetensors")
    if reads(defense, "adapter"):
        options["inoculation_adapter"] = save_adapter(folder / "adapter")
    if reads(defense, "pool"):
        options["interleave_dataset"] = make_pool()
    return {**options, **more}
