"""Earlier import path of the formulas in [`trl_emguard.planning`] for a run's memory and network traffic."""

from .planning.memory import Engine, Run, Shape, Weights, count_weights, memory_per_rank, peak
from .planning.network import network_per_step


__all__ = ["Engine", "Run", "Shape", "Weights", "count_weights", "memory_per_rank", "network_per_step", "peak"]
