"""Measures of what a fine-tuned model has learned, inside and outside the domain of its training data.

They need models and rows, but no trainer.
"""

from ..models.likelihood import answer_nll
from ..models.load import load_model
from .candidates import Candidate, from_adapters, load_candidates
from .questions import Question, QuestionSet, load_questions
from .results import ResultRow, Results
from .rules import register_rule
from .run import EvaluationOptions, evaluate


__all__ = [
    "Candidate",
    "EvaluationOptions",
    "Question",
    "QuestionSet",
    "ResultRow",
    "Results",
    "answer_nll",
    "evaluate",
    "from_adapters",
    "load_candidates",
    "load_model",
    "load_questions",
    "register_rule",
]
