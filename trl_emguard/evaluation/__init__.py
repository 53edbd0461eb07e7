"""What a run has learned, in domain and out of it. Works on models and rows, never on a trainer."""

from .likelihood import answer_nll, load_model


__all__ = ["answer_nll", "load_model"]
