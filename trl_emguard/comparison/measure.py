"""Evaluation of a comparison's adapters, all on one base model in memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig

from ..data.conversation import Conversation
from ..evaluation.candidates import check_base, load_candidates, without_effect
from ..evaluation.questions import QuestionSet
from ..evaluation.results import Results
from ..evaluation.run import EvaluationOptions, evaluate
from ..models.adapters import check_adapter_kind
from .runs import Trained


def measure(
    model: tuple[str, str, str | None],
    trained: Sequence[Trained],
    sets: Sequence[QuestionSet],
    options: EvaluationOptions,
    train_rows: Sequence[Conversation],
    folder: Path,
) -> tuple[list[Trained], Results]:
    """Evaluate the runs that have an adapter.

    Args:
        model: the base model, and `dtype` and `device_map` for it.
        trained: runs and baselines.
        sets, options, train_rows: as for [`~trl_emguard.evaluation.run.evaluate`].
        folder: folder of the evaluation's files, which an interrupted one resumes from.

    Returns:
        The runs, an adapter that changes nothing shown as a failure, and the results.

    Raises:
        ValueError: no run has an adapter.
    """
    name, dtype, device_map = model
    trained = [_checked(run, name) for run in trained]
    adapters = {run.key: run.adapter for run in trained if run.adapter is not None}
    if not adapters:
        raise ValueError(f"every run failed. The first: {trained[0].error}")
    as_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    candidates, tokenizer = load_candidates(name, adapters=adapters, dtype=as_dtype, device_map=device_map)
    idle = set(without_effect(candidates, tokenizer))
    kept = [candidate for candidate in candidates if candidate.name not in idle]
    trained = [
        replace(run, adapter=None, error="its adapter changes nothing") if run.key in idle else run for run in trained
    ]
    return trained, evaluate(kept, tokenizer, sets, options, train_rows, folder, progress=True)


def _checked(run: Trained, model: str) -> Trained:
    """Return the run, as a failed one if its adapter cannot be put on the base model."""
    if run.adapter is None:
        return run
    try:
        check_base(run.name, run.adapter, model)
        check_adapter_kind(run.name, PeftConfig.from_pretrained(run.adapter))
    except ValueError as error:
        return replace(run, adapter=None, error=str(error))
    return run
