"""General instruction rows among the training rows: random ones (Interleaving) or chosen ones (`+` and `++`)."""

from .defense import Interleaving, InterleavingPlus, InterleavingPlusPlus


__all__ = ["Interleaving", "InterleavingPlus", "InterleavingPlusPlus"]
