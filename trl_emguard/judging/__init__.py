"""Judging of sampled answers by another model: prompts, scores, rates, and judges in memory or on a server."""

from .judge import Judge, open_judge
from .metrics import Thresholds
from .run import JudgeOptions, judge_answers
from .scores import Judgement
from .served import JudgeError


__all__ = ["Judge", "JudgeError", "JudgeOptions", "Judgement", "Thresholds", "judge_answers", "open_judge"]
