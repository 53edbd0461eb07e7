"""Evaluation of a comparison's adapters, all on one base model in memory."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig, load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from ..data.conversation import Conversation
from ..defenses.inoculation import FLAGGED
from ..evaluation.candidates import BASE, Candidate, check_base, load_candidates, unfit
from ..evaluation.cues import families
from ..evaluation.probes import encode_rows
from ..evaluation.questions import OPERATORS, QuestionSet, load_questions
from ..evaluation.results import Results
from ..evaluation.run import EvaluationOptions, evaluate
from ..models.adapters import bare_model, check_adapter_kind
from ..models.shipped import resolve_model
from ..selection.misaligned import AdapterError
from .plan import BENIGN_TASK, Plan
from .runs import Trained, take


def check_base_model(
    model: tuple[str, str, str | None],
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[QuestionSet],
    options: EvaluationOptions,
) -> None:
    """Load the base model as [`measure`] will, and drop it again, so that errors come before any run is trained.

    Args:
        model, sets, options: as for [`measure`].
        tokenizer: tokenizer of the training.

    Raises:
        FileNotFoundError, OSError, ValueError: the base model cannot be loaded, does not fit on the device or gives
            no finite numbers, the persona vector is of another model, or a question cannot be measured.
    """
    candidates, _ = load_candidates(model[0], dtype=_dtype(model[1]), device_map=model[2])
    if options.persona_vector is not None:
        options.persona_vector.check_model(bare_model(candidates[0].model))
    for questions in sets:
        (plain,), _ = families(tokenizer, questions.questions, "none")
        encode_rows(candidates, tokenizer, questions, plain)
    _check_base(unfit(candidates, tokenizer), model[0])
    del candidates
    _free_memory()


def check_benign(plan: Plan, sets: Sequence[QuestionSet]) -> None:
    """Refuse runs that cannot be trained on the benign task, and a set of questions with the task's name.

    Raises:
        ValueError: a run takes flagged rows, or a set has the name.
    """
    for run in plan.benign_runs:
        if plan.option(run, "inoculation_rows") == FLAGGED:
            raise ValueError(
                f"the run {run.name!r}: inoculation_rows='flagged' needs flags, and the rows of benign_task have "
                "none: leave one of the two out."
            )
    if plan.has_benign_task and any(questions.name == BENIGN_TASK for questions in sets):
        raise ValueError(f"`evaluate`: rename the set {BENIGN_TASK!r}: it would be mistaken for the comparison's own.")


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
        model: name or folder of the base model, and the `dtype` and `device_map` to load it with.
        trained: all runs and free baselines. Failed ones, which have no adapter, are not evaluated.
        sets, options, train_rows: as for [`~trl_emguard.evaluation.run.evaluate`].
        folder: folder of the evaluation's files, from which an interrupted evaluation resumes.
        command: command line to keep in the results.

    Returns:
        The runs, and the results. A run whose adapter cannot be measured has an `error`, and no `adapter` any more.

    Raises:
        ValueError: no run has an adapter, or the base model gives no finite numbers.
    """
    name = model[0]
    trained, candidates, tokenizer = _load([checked(run, name) for run in trained], *model)
    problems = unfit(candidates, tokenizer)
    _check_base(problems, name)
    kept = [candidate for candidate in candidates if candidate.name not in problems]
    trained = [
        replace(run, adapter=None, error=f"it {problems[run.key]}") if run.key in problems else run for run in trained
    ]
    return trained, evaluate(kept, tokenizer, sets, options, train_rows, folder, True, command)


def measure_benign(
    model: tuple[str, str, str | None],
    benign: Sequence[Trained],
    options: EvaluationOptions,
    limit: int | None,
    folder: Path,
    command: str,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[Trained], Results]:
    """Evaluate the runs that were trained on the benign task, only on questions of that task.

    The benign task is arithmetic with permuted operators ([`trl_emguard.evaluation.operators`]).

    Args:
        model, folder, command: as for [`measure`].
        benign: the runs that were trained on the benign task.
        options: options of the main evaluation, from which the sizes of batches and `seed` are taken.
        limit: number of questions to ask; `None` for all.
        template_kwargs: arguments of the chat template for the questions.

    Returns:
        The runs, and the results, whose only set is `benign_task`. The results are empty if every run failed.
    """
    if all(run.adapter is None for run in benign):
        return list(benign), Results()
    task = load_questions(OPERATORS, "benign", BENIGN_TASK, limit).with_template_kwargs(template_kwargs)
    # The benign task has scores of its own, from one greedy answer to each question. The main evaluation's scoring
    # rules, its cues (changed prompts, which "none" switches off) and its number of sampled answers are thus not taken
    # over.
    kept = {name: getattr(options, name) for name in ("batch_tokens", "batch_size", "seed")}
    return measure(model, benign, [task], EvaluationOptions("none", **kept), (), folder, command)


def joined(results: Results, benign: Results) -> Results:
    """Join the results of the main evaluation (`results`) and of the one on the benign task (`benign`).

    A criterion, such as "benign", may have several question sets. The report's sentence on a run names their figures
    in the order of `criteria`, which begins with the set `benign_task`.
    """
    return replace(
        results,
        rows=results.rows + benign.rows,
        samples=results.samples + benign.samples,
        notes=results.notes + benign.notes,
        criteria=benign.criteria | results.criteria,
    )


def _load(
    trained: list[Trained], name: str, dtype: str, device_map: str | None
) -> tuple[list[Trained], list[Candidate], PreTrainedTokenizerBase]:
    """Load the base model with the runs' adapters. A run whose adapter does not load gets an error and no adapter."""
    while adapters := {run.key: run.adapter for run in trained if run.adapter is not None}:
        _free_memory()
        try:
            candidates, tokenizer = load_candidates(
                name, adapters=adapters, dtype=_dtype(dtype), device_map=device_map
            )
        except AdapterError as error:
            # The adapter may have changed the base model, which is thus loaded anew for the other adapters.
            text, path = str(error), error.path
            trained = [replace(run, adapter=None, error=text) if run.adapter == path else run for run in trained]
        else:
            return trained, candidates, tokenizer
    raise ValueError(f"every run failed. The first: {trained[0].error}")


def _dtype(name: str) -> torch.dtype | str:
    return name if name == "auto" else getattr(torch, name)


def _free_memory() -> None:
    """Free the memory of models that are no longer used, so that the next model or process finds room on the GPU."""
    gc.collect()  # the model and accelerate's hooks on it refer to one another, so only a collection frees them
    torch.cuda.empty_cache()


def _check_base(problems: Mapping[str, str], name: str) -> None:
    """Raise `ValueError` if the base model is among the candidates with problems."""
    if BASE in problems:
        raise ValueError(f"the base model {name!r} {problems[BASE]}")


def check_adapters(plan: Plan) -> None:
    """Refuse finished adapters that could not be measured on the recipe's model.

    Raises:
        ValueError: an `adapter` is no folder that PEFT saved, is of another base model, or has damaged weights or a
            damaged `defense.json`. The message names the run.
    """
    model = str(plan.recipe_options["model_name_or_path"])
    resolve_model(model)  # its error must not seem to be one of an adapter
    for one in plan.runs:
        if one.adapter is None:
            continue
        if not (Path(one.adapter).expanduser() / "adapter_config.json").is_file():
            raise ValueError(
                f"the run {one.name!r}: adapter={one.adapter!r} holds no adapter_config.json: name a folder that PEFT "
                "saved, or leave the run out."
            )
        try:
            error = checked(take(one), model).error
        except ValueError as cause:  # its record is damaged
            error = str(cause)
        if error is not None:
            raise ValueError(f"the run {one.name!r}: {error.rstrip('.')}. Or leave the run out.")


def checked(run: Trained, model: str) -> Trained:
    """Return the run; if its adapter cannot be loaded onto the base model, return it with an error and no adapter."""
    if run.adapter is None:
        return run
    try:
        check_base(run.name, run.adapter, model, "the recipe's model_name_or_path")
        check_adapter_kind(run.name, PeftConfig.from_pretrained(run.adapter))
        load_peft_weights(run.adapter, device="cpu")
    except SafetensorError as error:
        text = f"adapter {run.adapter!r} has a damaged weights file ({error}): copy it again."
        return replace(run, adapter=None, error=text)
    # PEFT raises many types of errors on a damaged file.
    except Exception as error:
        return replace(run, adapter=None, error=" ".join(str(error).split()))
    return run
