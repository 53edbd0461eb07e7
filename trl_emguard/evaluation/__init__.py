"""Measures of what a run has learned, in domain and out of it. They need models and rows, no trainer."""

from ..models.likelihood import answer_nll
from ..models.load import load_model


__all__ = ["answer_nll", "load_model"]
