"""What a run has learned, in domain and out of it. Works on models and rows, never on a trainer."""

from ..models.likelihood import answer_nll
from ..models.load import load_model


__all__ = ["answer_nll", "load_model"]
