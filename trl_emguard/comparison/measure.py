"""Evaluation of a comparison's adapters, all on one base model in memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..data.conversation import Conversation
from ..evaluation.candidates import load_candidates, without_effect
from ..evaluation.questions import QuestionSet
from ..evaluation.results import Results
from ..evaluation.run import EvaluationOptions, evaluate
from .runs import Trained


def measure(
    model: str,
    trained: Sequence[Trained],
    sets: Sequence[QuestionSet],
    options: EvaluationOptions,
    train_rows: Sequence[Conversation],
    folder: Path,
) -> tuple[list[Trained], Results]:
    """Evaluate the runs that have an adapter.

    Args:
        model: the base model.
        trained: runs and baselines.
        sets, options, train_rows: as for [`~trl_emguard.evaluation.run.evaluate`].
        folder: folder of the evaluation's files, which an interrupted one resumes from.

    Returns:
        The runs, an adapter that changes nothing shown as a failure, and the results.

    Raises:
        ValueError: no run has an adapter.
    """
    adapters = {run.key: run.adapter for run in trained if run.adapter is not None}
    if not adapters:
        raise ValueError(f"every run failed. The first: {trained[0].error}")
    candidates, tokenizer = load_candidates(model, adapters=adapters)
    idle = set(without_effect(candidates, tokenizer))
    kept = [candidate for candidate in candidates if candidate.name not in idle]
    trained = [
        replace(run, adapter=None, error="its adapter changes nothing") if run.key in idle else run for run in trained
    ]
    return trained, evaluate(kept, tokenizer, sets, options, train_rows, folder, progress=True)
