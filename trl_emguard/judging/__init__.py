"""Rates that a judge gives to sampled answers: prompts, reading of scores, metrics, judges local and served."""

from .metrics import Thresholds
from .run import Judge, JudgeOptions, judge_answers, open_judge
from .scores import Judgement
from .served import JudgeError


__all__ = ["Judge", "JudgeError", "JudgeOptions", "Judgement", "Thresholds", "judge_answers", "open_judge"]
