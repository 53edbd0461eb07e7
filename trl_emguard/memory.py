"""Earlier import path of [`trl_emguard.planning.memory`], which estimates a run's memory and network traffic."""

from .planning.memory import Engine, Run, Shape, Weights, count_weights, memory_per_rank, network_per_step, peak


__all__ = ["Engine", "Run", "Shape", "Weights", "count_weights", "memory_per_rank", "network_per_step", "peak"]
