"""Earlier import path of the formulas in [`trl_emguard.planning`] for a run's memory and network traffic."""

from .planning.memory import (
    Engine,
    Run,
    Shape,
    Weights,
    block_activations,
    compared_states,
    count_weights,
    head_bytes,
    memory_per_rank,
    optimizer_states,
    peak,
    placed,
    saved_activations,
    working_bytes,
)
from .planning.network import network_per_step


__all__ = [
    "Engine",
    "Run",
    "Shape",
    "Weights",
    "block_activations",
    "compared_states",
    "count_weights",
    "head_bytes",
    "memory_per_rank",
    "network_per_step",
    "optimizer_states",
    "peak",
    "placed",
    "saved_activations",
    "working_bytes",
]
