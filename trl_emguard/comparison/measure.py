"""Evaluation of a comparison's adapters, all on one base model in memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, load_peft_weights

from ..data.conversation import Conversation
from ..evaluation.candidates import BASE, check_base, load_candidates, unfit
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
    command: str,
) -> tuple[list[Trained], Results]:
    """Evaluate the runs that have an adapter.

    Args:
        model: the base model, and `dtype` and `device_map` for it.
        trained: runs and baselines.
        sets, options, train_rows: as for [`~trl_emguard.evaluation.run.evaluate`].
        folder: folder of the evaluation's files, which an interrupted one resumes from.
        command: command line to keep in the results.

    Returns:
        The runs, those whose adapter cannot be measured as failed ones, and the results.

    Raises:
        ValueError: no run has an adapter, or the base model gives no finite numbers.
    """
    name, dtype, device_map = model
    trained = [_checked(run, name) for run in trained]
    adapters = {run.key: run.adapter for run in trained if run.adapter is not None}
    if not adapters:
        raise ValueError(f"every run failed. The first: {trained[0].error}")
    as_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    candidates, tokenizer = load_candidates(name, adapters=adapters, dtype=as_dtype, device_map=device_map)
    problems = unfit(candidates, tokenizer)
    if BASE in problems:
        raise ValueError(f"the base model {name!r} {problems[BASE]}")
    kept = [candidate for candidate in candidates if candidate.name not in problems]
    trained = [
        replace(run, adapter=None, error=f"it {problems[run.key]}") if run.key in problems else run for run in trained
    ]
    return trained, evaluate(kept, tokenizer, sets, options, train_rows, folder, True, command)


def _checked(run: Trained, model: str) -> Trained:
    """Return the run, as a failed one if its adapter cannot be put on the base model."""
    if run.adapter is None:
        return run
    try:
        check_base(run.name, run.adapter, model)
        check_adapter_kind(run.name, PeftConfig.from_pretrained(run.adapter))
        load_peft_weights(run.adapter, device="cpu")
    # PEFT raises many types of errors on a damaged file.
    except Exception as error:
        return replace(run, adapter=None, error=" ".join(str(error).split()))
    return run
