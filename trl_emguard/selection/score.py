"""Scoring of a pool of rows by perplexity gap.

The gap says how much less likely a row's answer is under misaligned models than under the aligned base model.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Value
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.conversation import PROMPT_COLUMN, RESPONSE_COLUMN, check_columns, conversation
from ..io.journal import Journal
from ..models.adapters import AdapterSwitch, check_adapter_kind
from ..models.batches import default_batch_tokens, eval_mode, pad_answers, plan_batches
from ..models.chat import EncodedAnswer, encode_answers, end_tokens, template_arguments
from ..models.likelihood import mean_nll
from ..models.shipped import public_name
from ..version import __version__
from .misaligned import PREFIX, adapter_key, load_misaligned
from .parts import new_part, parts_folder, resume_scores, scores_key
from .scored import ALIGNED, GAP, ScoresInfo, misaligned_column, perplexity_gap, write_scores


__all__ = ["check_pool", "encode_rows", "load_misaligned", "score_pool"]

# Number of rows that are tokenised in one call.
_CHUNK = 1000


def score_pool(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    adapters: Sequence[str],
    *,
    epsilon: float = 1.0,
    max_length: int = 2048,
    batch_tokens: int | None = None,
    prompt_column: str = PROMPT_COLUMN,
    response_column: str = RESPONSE_COLUMN,
    output: str | os.PathLike | None = None,
    progress: bool = False,
) -> tuple[Dataset, ScoresInfo]:
    """Score the rows of a pool by their perplexity gap s = (mean_k L_mis,k − L_aligned) / (L_aligned + ε).

    L is the mean negative log-likelihood of an answer's tokens, including the end of turn. L_mis,k is taken under the
    k-th misaligned adapter, and L_aligned under the base model, which is the aligned model. If several processes run
    (`accelerate launch`), each scores a share of the rows, and all of them return the scores of all rows.

    Args:
        model: the aligned model with the misaligned adapters on it, from [`load_misaligned`].
        tokenizer: tokenizer with a chat template.
        rows: rows of any shape that [`~trl_emguard.data.conversation.conversation`] takes.
        adapters: names of the misaligned adapters. The k-th, from 0, gets the column `nll_misaligned_k`.
        epsilon: ε of the equation above.
        max_length: limit on the tokens of a row. Longer rows, and rows too long for the model, are not scored.
        batch_tokens: tokens in a forward pass, pads included; by default 8192 on a GPU, 1024 on a CPU.
        prompt_column, response_column: columns with prompts and answers of plain text.
        output: a `.parquet` file to write. Until it is written, scores are kept in the folder `<output>.parts`, and an
            interrupted run is resumed from this folder. The number of processes may change between the runs, and all
            processes must share the folder. Rows of a finished file are not scored again.
        progress: True shows a progress bar.

    Returns:
        The scored rows in the order of the pool, with the columns `nll_aligned`, `nll_misaligned_0` … and `gap`; and
        the facts about them, with the rows that could not be scored and the reasons.

    Raises:
        ValueError: an argument out of range, missing or unsupported adapters, a tokenizer without a chat template, no
            row to score, a pool with scores or with columns that hide the named ones, or an output of another run.
    """
    check_pool(tokenizer, rows, epsilon, max_length, batch_tokens)
    check_columns(rows, prompt_column, response_column)
    names = tuple(adapters)
    if isinstance(model, PeftModel):  # `_check_adapters` below refuses any other model
        adapters = [adapter_key(model, name) for name in names]
    base = _check_adapters(model, adapters)
    encoded, unscored = encode_rows(base, tokenizer, rows, max_length, prompt_column, response_column)
    if not encoded:
        raise ValueError(f"none of the {len(rows)} rows of the pool can be scored. Row 0: {unscored[0]}.")
    key = scores_key(model, adapters, encoded)
    path = None if output is None else Path(output)
    nll = _score_all(model, adapters, encoded, key, path, batch_tokens, progress)
    scored, left_out = _join(rows, nll, unscored, epsilon)
    name, columns = public_name(base.config._name_or_path), (prompt_column, response_column)
    info = ScoresInfo(name, names, epsilon, len(rows), left_out, *columns, key, __version__)
    if path is not None:
        _write_on_main_process(path, scored, info)
    return scored, info


def check_pool(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, epsilon: float, max_length: int, batch_tokens: int | None
) -> None:
    """Refuse bad arguments of [`score_pool`], as far as they can be checked without a model.

    Raises:
        ValueError: a number out of range, a tokenizer without a chat template, or a pool that is empty or has scores.
    """
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon={epsilon} must be 0 or more.")
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: take that of an instruct model.")
    if not len(rows):
        raise ValueError("the pool is empty: there is nothing to score.")
    prefix = misaligned_column(0)[:-1]
    stale = [name for name in rows.column_names if name in (ALIGNED, GAP) or name.startswith(prefix)]
    if stale:
        raise ValueError(
            f"the pool has scores already, {', '.join(stale)}: remove these columns, or name another pool."
        )


def _score_all(
    model: PeftModel,
    adapters: Sequence[str],
    encoded: Mapping[int, EncodedAnswer],
    key: str,
    output: Path | None,
    batch_tokens: int | None,
    progress: bool,
) -> dict[int, list[float]]:
    """Return row → its mean negative log-likelihoods, from an earlier run or newly scored by all processes.

    A row has one such number under the aligned model, and then one under each adapter.
    """
    state = PartialState(cpu=model.device.type == "cpu")
    nll = {} if output is None else resume_scores(output, key, encoded, len(adapters) + 1)
    # All processes must read the same old journals, or they would plan different batches. No process therefore starts
    # a new journal before all have read the old ones.
    state.wait_for_everyone()

    lengths = {index: len(answer.ids) for index, answer in encoded.items() if index not in nll}
    batches = plan_batches(lengths, batch_tokens or default_batch_tokens(model.device))
    journal = new_part(output, key, state.process_index) if output is not None and batches else None
    own = _score_share(model, adapters, encoded, batches, journal, progress)
    for scores in gather_object([own]):
        nll |= scores
    if nll.keys() != encoded.keys():
        raise ValueError(
            f"the processes do not see the same files: {parts_folder(output or Path())} must lie where all of them "
            "read and write."
        )
    return nll


def _write_on_main_process(output: Path, scored: Dataset, info: ScoresInfo) -> None:
    state = PartialState()
    if state.is_main_process:
        write_scores(output, scored, info)
        shutil.rmtree(parts_folder(output), ignore_errors=True)
    state.wait_for_everyone()


def encode_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    max_length: int = 2048,
    prompt_column: str = PROMPT_COLUMN,
    response_column: str = RESPONSE_COLUMN,
) -> tuple[dict[int, EncodedAnswer], dict[int, str]]:
    """Turn rows into tokens.

    Args:
        model: model whose config gives the tokens that end a turn and the longest input.
        tokenizer, rows, max_length, prompt_column, response_column: as for [`score_pool`].

    Returns:
        Index → tokens for the rows that can be scored, and index → reason for the other rows.
    """
    ends = end_tokens(model, tokenizer)
    limit = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length)
    encoded: dict[int, EncodedAnswer] = {}
    unscored: dict[int, str] = {}
    for start in range(0, len(rows), _CHUNK):
        conversations, kwargs = {}, []
        for index, row in enumerate(rows.select(range(start, min(start + _CHUNK, len(rows)))), start):
            try:
                turns, of_row = conversation(row, prompt_column, response_column), template_arguments(row)
            except ValueError as error:
                unscored[index] = " ".join(str(error).split())
            else:
                conversations[index] = turns
                kwargs.append(of_row)
        answers = encode_answers(tokenizer, list(conversations.values()), ends, kwargs)
        for index, answer in zip(conversations, answers, strict=True):
            if isinstance(answer, str):
                unscored[index] = answer
            elif len(answer.ids) > limit:
                unscored[index] = f"it has {len(answer.ids)} tokens, more than {limit}"
            else:
                encoded[index] = answer
    return encoded, dict(sorted(unscored.items()))


def _score_share(
    model: PeftModel,
    adapters: Sequence[str],
    encoded: Mapping[int, EncodedAnswer],
    batches: Sequence[Sequence[int]],
    journal: Journal | None,
    progress: bool,
) -> dict[int, list[float]]:
    """Score this process's share of the batches, and write the scores of each batch to the journal.

    Returns:
        Row → its mean negative log-likelihood (NLL) under the base model and under each adapter.
    """
    state = PartialState()
    own: dict[int, list[float]] = {}
    switch = AdapterSwitch(model)
    bar = tqdm(
        total=len(encoded),
        initial=len(encoded) - sum(map(len, batches)),
        desc="scoring",
        unit="row",
        disable=not (progress and state.is_main_process),
    )
    with eval_mode(model), bar:
        for start in range(0, len(batches), state.num_processes):
            # A round has one batch for each process; the last round may have fewer. The bar of the main process
            # advances by all rows of the round, including those that other processes score.
            round_ = batches[start : start + state.num_processes]
            if state.process_index < len(round_):
                batch = round_[state.process_index]
                means = batch_nll(model, switch, adapters, [encoded[i] for i in batch])
                own |= dict(zip(batch, means, strict=True))
                if journal is not None:
                    journal.append([index, own[index]] for index in batch)
            bar.update(sum(map(len, round_)))
    return own


@torch.inference_mode()
def batch_nll(
    model: PeftModel, switch: AdapterSwitch, adapters: Sequence[str], batch: Sequence[EncodedAnswer]
) -> list[list[float]]:
    """Return the mean NLL of each row, under the base model and under each adapter."""
    ids, is_answer = pad_answers(batch)
    means = []
    for adapter in (None, *adapters):
        with switch.only(adapter):
            means.append(mean_nll(model, ids, is_answer))
    return torch.stack(means, dim=1).tolist()


def _join(
    rows: Dataset, nll: Mapping[int, list[float]], unscored: Mapping[int, str], epsilon: float
) -> tuple[Dataset, tuple[tuple[int, str], ...]]:
    """Compute the gap of each row. Return the rows with a finite gap, and (index, reason) of every other row.

    The returned rows have their negative log-likelihoods and the gap as new columns.
    """
    indices = sorted(nll)
    aligned, *misaligned = np.array([nll[i] for i in indices], dtype=np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = perplexity_gap(aligned, misaligned, epsilon)
    finite = np.isfinite(gap)
    broken = {i: "its score is no finite number" for i, good in zip(indices, finite, strict=True) if not good}
    if not finite.any():
        raise ValueError(
            "no row has a finite score: the model does not work in this dtype, or its weights are broken."
        )
    columns = {ALIGNED: aligned, **{misaligned_column(k): values for k, values in enumerate(misaligned)}, GAP: gap}
    kept = [i for i, good in zip(indices, finite, strict=True) if good]
    table = rows.select(kept).with_format("arrow")[:]
    for name, values in columns.items():
        table = table.append_column(name, [values[finite]])
    features = Features({**rows.features, **dict.fromkeys(columns, Value("float64"))})
    return Dataset(table.cast(features.arrow_schema)), tuple(sorted({**unscored, **broken}.items()))


def _check_adapters(model: PeftModel, adapters: Sequence[str]) -> PreTrainedModel:
    """Check that each named adapter is on the model and can be switched off, and return the base model.

    Raises:
        ValueError: the model has no adapters; `adapters` is empty, or names one that is unknown or named twice; an
            adapter cannot be switched off, leaves the base weights changed when it is off, or changes the head by a
            low-rank update.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__} without adapters: put the misaligned ones on it, `load_misaligned`."
        )
    if not adapters or len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters={list(adapters)} must name one adapter or more, each once.")
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(
                f"adapter {name.removeprefix(PREFIX)!r} is not on the model, which has "
                f"{', '.join(map(repr, model.peft_config))}."
            )
        check_adapter_kind(name, model.peft_config[name])
    base = model.get_base_model()
    if isinstance(base.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "an adapter changes the head by a low-rank update, which is not supported: train it on the blocks alone."
        )
    return base
