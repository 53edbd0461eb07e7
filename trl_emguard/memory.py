"""Estimates of a run's memory and network traffic, imported from [`trl_emguard.planning.memory`]."""

from .planning.memory import Engine, Run, Shape, Weights, count_weights, memory_per_rank, network_per_step, peak


__all__ = ["Engine", "Run", "Shape", "Weights", "count_weights", "memory_per_rank", "network_per_step", "peak"]
