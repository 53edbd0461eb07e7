"""Interleaving, Interleaving+ and Interleaving++: general instruct rows among the training rows."""

from .defense import Interleaving, InterleavingPlus, InterleavingPlusPlus


__all__ = ["Interleaving", "InterleavingPlus", "InterleavingPlusPlus"]
