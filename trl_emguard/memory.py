"""Memory and network of a run by formula; its home is [`trl_emguard.planning.memory`]."""

from .planning.memory import Engine, Run, Shape, Weights, count_weights, memory_per_rank, network_per_step, peak


__all__ = ["Engine", "Run", "Shape", "Weights", "count_weights", "memory_per_rank", "network_per_step", "peak"]
