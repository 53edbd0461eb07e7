"""Defenses that mix general instruction rows into training rows: random rows, or rows that a score ranks first."""

from .defense import Interleaving, InterleavingPlus, InterleavingPlusPlus


__all__ = ["Interleaving", "InterleavingPlus", "InterleavingPlusPlus"]
