"""Score a pool by its perplexity gap: how much harder its answers are for misaligned models than for the aligned one."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Value
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.conversation import PROMPT_COLUMN, RESPONSE_COLUMN, conversation
from ..io.strict import parse_json
from ..models.adapters import AdapterSwitch
from ..models.shipped import public_name
from ..ops import logit_transform, token_nll
from ..persona.vectors import weight_checksums
from ..version import __version__
from .choose import ALIGNED, GAP, ScoresInfo, misaligned_column, perplexity_gap, read_scores, write_scores


# Tokens of a batch, pads included. On a CPU larger ones only leave its caches.
BATCH_TOKENS, BATCH_TOKENS_CPU = 8192, 1024
# Initialisations of LoRA that change the base weights.
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Rows that are tokenised at once.
_CHUNK = 1000


class Encoded(NamedTuple):
    """Attributes:
    ids: `(T,)`, int32: prompt, answer, end of turn.
    prompt_length: how many of them come before the answer.
    """

    ids: np.ndarray
    prompt_length: int


def load_misaligned(model: PreTrainedModel, adapters: Mapping[str, str | os.PathLike]) -> PeftModel:
    """Put misaligned adapters on their base model, all side by side, in its dtype.

    Args:
        model: the aligned model, without adapters.
        adapters: name → folder or hub id of what PEFT saved.

    Raises:
        FileNotFoundError: a folder that holds no adapter.
        ValueError: an adapter of another base model, or one that changes the base weights.
    """
    configs = {}
    for name, path in adapters.items():
        if not name or "." in name:
            raise ValueError(f"adapter name {name!r} must not be empty or hold a dot: give another, NAME={path}.")
        try:
            configs[name] = PeftConfig.from_pretrained(str(path))
        # What PEFT raises on a damaged file is no closed list.
        except Exception as error:
            raise FileNotFoundError(
                f"adapter {str(path)!r} holds no adapter_config.json that PEFT saved ({error})."
            ) from error
        _check_kind(name, configs[name])
    base_weights = weight_checksums(model)
    peft_model: PeftModel | None = None
    for name, path in adapters.items():
        config = configs[name]
        config.inference_mode = True
        try:
            # PEFT would keep bf16 adapters in fp32, for training's sake: the passes would be slower for it.
            if peft_model is None:
                peft_model = PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                peft_model.add_adapter(name, config, autocast_adapter_dtype=False)
            result = peft_model.load_adapter(str(path), name, torch_device="cpu", autocast_adapter_dtype=False)
        except Exception as error:
            raise ValueError(f"adapter {name!r} ({path}) does not fit this base model: {_one_line(error)}") from error
        # PEFT looks for the name anywhere in a key: "own" in "down_proj".
        foreign = [*(key for key in result.missing_keys if name in key.split(".")), *result.unexpected_keys]
        if foreign:
            raise ValueError(
                f"adapter {name!r} ({path}) does not fit this base model: {len(foreign)} weights are on one side only, the "
                f"first is {foreign[0]!r}."
            )
        now = weight_checksums(model)
        changed = sorted(key for key in now.keys() & base_weights.keys() if now[key] != base_weights[key])
        if changed:
            raise ValueError(
                f"adapter {name!r} ({path}) brought a base weight of its own, {changed[0]!r}, so switching adapters off does not "
                'give the aligned model: train it with bias="none" and without new tokens.'
            )
    if peft_model is None:
        raise ValueError("adapters is empty: the gap needs one misaligned adapter or more.")
    return peft_model


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
    """Score the rows of a pool: s = (mean_k L_mis,k − L_aligned) / (L_aligned + ε).

    L is the mean negative log-likelihood of the tokens of the answer, the end of turn included: under each misaligned
    adapter, and under the base model, which is the aligned one. Where several processes run (`accelerate launch`), each
    scores its share, and all return the same.

    Args:
        model: the aligned model with the misaligned adapters on it, from [`load_misaligned`].
        tokenizer: with a chat template.
        rows: in any form that [`~trl_emguard.selection.pool.conversation`] understands.
        adapters: names of the misaligned adapters, in the order of the columns.
        epsilon: ε.
        max_length: rows with more tokens are not scored; nor are those that are longer than the model can read.
        batch_tokens: tokens of a forward pass, pads included; by default 8192 on a GPU, 1024 on a CPU.
        prompt_column, response_column: where prompts and answers of plain text stand.
        output: a `.parquet` file to write. What is scored is kept in the folder `<output>.parts` meanwhile, so that an
            interrupted run goes on where it stopped, with any number of processes; they must share the folder. A finished
            file is not scored again.
        progress: whether to show a progress bar.

    Returns:
        The scored rows in the order of the pool, with the columns `nll_aligned`, `nll_misaligned_0` … and `gap`; and what is to
        know of them, with the rows that could not be scored and why.

    Raises:
        ValueError: unknown or unfit adapters, no row that can be scored, a pool that has such columns already, or an output
            with other scores.
    """
    base = _check(model, tokenizer, rows, adapters, epsilon, max_length, batch_tokens)
    on_cpu = model.device.type == "cpu"
    state = PartialState(cpu=on_cpu)
    encoded, unscored = encode_rows(base, tokenizer, rows, max_length, prompt_column, response_column)
    if not encoded:
        raise ValueError(f"none of the {len(rows)} rows of the pool can be scored. Row 0: {unscored[0]}.")
    key = _key(model, base, adapters, encoded)
    output = None if output is None else Path(output)
    nll = {} if output is None else _reopen(output, key, encoded, len(adapters) + 1)
    state.wait_for_everyone()  # nobody writes before everybody has read

    lengths = {index: len(row.ids) for index, row in encoded.items() if index not in nll}
    batches = plan_batches(lengths, batch_tokens or (BATCH_TOKENS_CPU if on_cpu else BATCH_TOKENS))
    count = state.num_processes
    own: dict[int, list[float]] = {}
    was_training = model.training
    model.eval()
    bar = tqdm(
        total=len(encoded),
        initial=len(nll),
        desc="scoring",
        unit="row",
        disable=not (progress and state.is_main_process),
    )
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.enter_context(bar)
        part = None
        if output is not None and batches:
            part = stack.enter_context(_new_part(output, key, state.process_index))
        switch = AdapterSwitch(model)
        for start in range(0, len(batches), count):
            # One batch for each process; the bar takes those of the others as done.
            round_ = batches[start : start + count]
            if state.process_index < len(round_):
                batch = round_[state.process_index]
                scores = dict(zip(batch, _batch_nll(base, switch, adapters, [encoded[i] for i in batch]), strict=True))
                if part is not None:
                    part.writelines(json.dumps([index, values]) + "\n" for index, values in scores.items())
                    part.flush()
                own |= scores
            bar.update(sum(map(len, round_)))
    for scores in gather_object([own]):
        nll |= scores

    if nll.keys() != encoded.keys():
        raise ValueError(
            f"the processes do not see the same files: {_parts(output or Path())} must lie where all of them read and write."
        )
    scored, left_out = _join(rows, nll, unscored, epsilon)
    info = ScoresInfo(
        model=public_name(base.config._name_or_path),
        adapters=tuple(adapters),
        epsilon=epsilon,
        rows=len(rows),
        unscored=left_out,
        prompt_column=prompt_column,
        response_column=response_column,
        key=key,
        trl_emguard=__version__,
    )
    if output is not None:
        if state.is_main_process:
            write_scores(output, scored, info)
            shutil.rmtree(_parts(output), ignore_errors=True)
        state.wait_for_everyone()
    return scored, info


def encode_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    max_length: int = 2048,
    prompt_column: str = PROMPT_COLUMN,
    response_column: str = RESPONSE_COLUMN,
) -> tuple[dict[int, Encoded], dict[int, str]]:
    """Rows as tokens.

    Args:
        model: whose ends of turn and longest input are asked.
        tokenizer, rows, max_length, prompt_column, response_column: as for [`score_pool`].

    Returns:
        Index → tokens, and index → why there are none.
    """
    of_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None}
    limit = min(max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length)
    encoded, unscored = {}, {}
    for start in range(0, len(rows), _CHUNK):
        prompts, wholes = {}, {}
        for index, row in enumerate(rows.select(range(start, min(start + _CHUNK, len(rows)))), start):
            try:
                prompt, answer = conversation(row, prompt_column, response_column)
                prompts[index] = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                wholes[index] = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
            except (ValueError, TypeError, TemplateError) as error:
                unscored[index] = _one_line(error)
                prompts.pop(index, None)
        if not prompts:
            continue
        # All texts of a chunk at once: a fast tokenizer takes them in parallel.
        ids_of = tokenizer([*prompts.values(), *wholes.values()], add_special_tokens=False, verbose=False)["input_ids"]
        for index, prompt, whole in zip(prompts, ids_of, ids_of[len(prompts) :], strict=False):
            # Some templates put a line break after the end of turn: it is never generated.
            answer_ends = [i for i, token in enumerate(whole) if i >= len(prompt) and token in ends]
            ids = whole[: answer_ends[-1] + 1] if answer_ends else whole
            if whole[: len(prompt)] != prompt or len(ids) == len(prompt):
                unscored[index] = "the chat template does not put the answer after the generation prompt"
            elif len(ids) > limit:
                unscored[index] = f"it has {len(ids)} tokens, more than {limit}"
            else:
                encoded[index] = Encoded(np.array(ids, dtype=np.int32), len(prompt))
    return encoded, dict(sorted(unscored.items()))


def plan_batches(lengths: Mapping[int, int], batch_tokens: int) -> list[list[int]]:
    """Rows of about the same length together, as many as fit.

    Args:
        lengths: index → tokens of a row.
        batch_tokens: rows of a batch × its longest; a single row may have more.

    Returns:
        The indices, batch by batch. The longest batch is the first, so that a run that does not fit into memory fails at once;
        the others come in a random order, so that the time left can be told from the time taken.
    """
    batches: list[list[int]] = []
    for index in sorted(lengths, key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    rest = batches[1:]
    random.Random(0).shuffle(rest)
    return batches[:1] + rest


@torch.inference_mode()
def _batch_nll(
    base: PreTrainedModel, switch: AdapterSwitch, adapters: Sequence[str], batch: Sequence[Encoded]
) -> list[list[float]]:
    """Mean NLL of each row, under the base model and under each adapter."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    is_answer = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, row_ids, row_answer in zip(batch, ids, is_answer, strict=True):
        row_ids[: len(row.ids)] = torch.from_numpy(row.ids)
        row_answer[row.prompt_length : len(row.ids)] = True
    labels, kept = ids[:, 1:][is_answer[:, 1:]], is_answer[:, 1:]
    counts = kept.sum(1).tolist()
    softcap, logit_scale = logit_transform(base.config.get_text_config())
    ids = ids.to(base.device)
    means = []
    for adapter in (None, *adapters):
        with switch.only(adapter):
            # No attention mask: the pads stand on the right, where a causal model never looks, and without a mask attention
            # takes its fast way.
            states = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head = base.get_output_embeddings()
            # An adapter that brings a head of its own (`modules_to_save`) leaves the others with the base model's.
            if isinstance(head, AuxiliaryTrainingWrapper) and adapter not in head._adapters:
                head = head.original_module
            weight, bias = head.weight, head.bias
        states = states[:, :-1][kept.to(states.device)].to(weight.device)  # (P, H)
        nll = token_nll(states, weight, bias, labels.to(weight.device), softcap, logit_scale)
        means.append(torch.stack([part.double().mean() for part in nll.split(counts)]))
    return torch.stack(means, dim=1).tolist()


def _join(
    rows: Dataset, nll: Mapping[int, list[float]], unscored: Mapping[int, str], epsilon: float
) -> tuple[Dataset, tuple[tuple[int, str], ...]]:
    """The rows that have finite scores, with them; and those that have none, with the reason."""
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


def _check(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    adapters: Sequence[str],
    epsilon: float,
    max_length: int,
    batch_tokens: int | None,
) -> PreTrainedModel:
    """See that the pool can be scored; the base model in its wrapper."""
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon={epsilon} must be 0 or more.")
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: take that of an instruct model.")
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__} without adapters: put the misaligned ones on it, `load_misaligned`."
        )
    if not adapters or len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters={list(adapters)} must name one adapter or more, each once.")
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(
                f"adapter {name!r} is not on the model, which has {', '.join(map(repr, model.peft_config))}."
            )
        _check_kind(name, model.peft_config[name])
    base = model.get_base_model()
    if isinstance(base.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "an adapter changes the head by a low-rank update, which is not supported: train it on the blocks alone."
        )
    if not len(rows):
        raise ValueError("the pool is empty: there is nothing to score.")
    stale = [
        name for name in rows.column_names if name in (ALIGNED, GAP) or name.startswith(misaligned_column(0)[:-1])
    ]
    if stale:
        raise ValueError(
            f"the pool has scores already, {', '.join(stale)}: remove these columns, or name another pool."
        )
    return base


def _check_kind(name: str, config: PeftConfig) -> None:
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter {name!r} is a learned prompt ({config.peft_type}): only adapters on weights can be switched."
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS):
        raise ValueError(
            f"adapter {name!r} was made with init_lora_weights={init!r}, which changes the base weights, so switching it off does "
            "not give the aligned model: convert it to plain LoRA (`path_initial_model_for_weight_conversion` of PEFT)."
        )


def _key(model: PeftModel, base: PreTrainedModel, adapters: Sequence[str], encoded: Mapping[int, Encoded]) -> str:
    """A checksum of all that the likelihoods depend on."""
    configs = [base.config.to_dict()] + [model.peft_config[name].to_dict() for name in adapters]
    for config in configs:
        # Where the model lies, and with what it was saved, makes no difference to a likelihood.
        for place in ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "revision"):
            config.pop(place, None)
    about = [weight_checksums(base), list(adapters), str(model.dtype), configs, __version__]
    digest = hashlib.sha256(
        json.dumps(
            about, sort_keys=True, default=lambda x: sorted(map(str, x)) if isinstance(x, set) else str(x)
        ).encode()
    )
    for name in adapters:
        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        for weight_name, weight in sorted(weights.items()):
            raw = weight.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
            digest.update(weight_name.encode() + raw.numpy().tobytes())
    for index, row in encoded.items():
        digest.update(np.array([index, row.prompt_length]).tobytes() + row.ids.tobytes())
    return digest.hexdigest()


def _parts(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _new_part(output: Path, key: str, rank: int) -> TextIO:
    """A file of its own for what this process scores: nobody ever writes to one that another run began."""
    folder = _parts(output)
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob(f"*-{rank}.jsonl")))
    file = (folder / f"{number}-{rank}.jsonl").open("x", encoding="utf-8")
    file.write(json.dumps({"scores_of": key}) + "\n")
    return file


def _reopen(output: Path, key: str, rows: Container[int], width: int) -> dict[int, list[float]]:
    """Row → its `width` NLLs, of a finished file or of the parts of an interrupted run."""
    nll: dict[int, list[float]] = {}
    if output.exists():
        scored, info = read_scores(output)
        if info.key != key or len(info.adapters) != width - 1:
            raise ValueError(
                f"{output} holds the scores of another model, pool or settings: name another output, or delete it."
            )
        columns = [ALIGNED, *map(misaligned_column, range(width - 1))]
        values = zip(*(scored[column] for column in columns), strict=True)
        left_out = {index for index, _ in info.unscored}
        return dict(zip((i for i in range(info.rows) if i not in left_out), map(list, values), strict=True))
    for path in sorted(_parts(output).glob("*.jsonl")):
        try:
            # What follows the last line break is empty, or a line that was torn off.
            *lines, _ = path.read_text(encoding="utf-8").split("\n")
            if lines and parse_json(lines[0]) != {"scores_of": key}:
                raise ValueError("of another model, pool or settings")
            for line in lines[1:]:
                index, values = parse_json(line)
                if type(index) is not int or index not in rows or [type(value) for value in values] != [float] * width:
                    raise ValueError(f"{line[:80]!r} is no row of the pool with {width} scores")
                nll[index] = values
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} does not belong to this run ({error}): delete the folder {path.parent}, or name another output."
            ) from error
    return nll


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
