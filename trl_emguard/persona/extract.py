"""Make a persona vector of a model: rollouts under pairs of system prompts, filtered, and the difference of their means."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..io.files import written_whole
from ..io.strict import parse_json
from ..models.chat import check_system_turn
from ..models.shipped import public_name
from ..version import __version__
from .states import answer_states, left_pad, prompt_states
from .traits import Trait
from .vectors import PersonaVector, random_like, weight_checksums


SIDES = ("positive", "negative")
RANDOM_CONTROLS = 20

# (question, answer) → 0 … 100
Judge = Callable[[str, str], float]


@dataclass(frozen=True)
class Rollout:
    """One answer of the model.

    Attributes:
        pair: which pair of system prompts.
        question: which extraction question.
        side: `"positive"` or `"negative"`: the prompt of the pair that it was given under.
        answer: its text, for people to read.
        answer_ids: its tokens, without the end of turn.
    """

    pair: int
    question: int
    side: str
    answer: str
    answer_ids: list[int]


@dataclass(frozen=True)
class Extraction:
    """What [`extract_vector`] returns.

    Attributes:
        vector: the persona vector.
        rollouts: all answers, in the order of the plan.
        kept: `(pair, question)` of the extraction pairs that the vector is made of.
        heldout_positive: `(N, L + 1, H)`, states at the last prompt token of the held-out questions under the prompts that
            ask for the trait.
        heldout_negative: the same under those that ask for its opposite.
    """

    vector: PersonaVector
    rollouts: list[Rollout]
    kept: list[tuple[int, int]]
    heldout_positive: torch.Tensor
    heldout_negative: torch.Tensor


@torch.no_grad()
def extract_vector(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 40,
    seed: int = 0,
    judge: Judge | None = None,
    rollouts_file: str | os.PathLike | None = None,
    progress: bool = False,
) -> Extraction:
    """Extract the persona vector of a trait (Chen et al., 2507.21509).

    1. Every extraction question is answered under both prompts of every pair, sampled at temperature 1.
    2. A (pair, question) is kept if its two answers show the trait and its opposite. Without a judge: if each of the two is
       likelier, in mean log-probability per token, under its own system prompt than under the other of the pair. With
       one: if the first scores 50 or more, and the second less.
    3. v(l) is the mean over the kept positive answers of the state after block l, averaged over the answer's tokens, minus
       the same over the kept negative answers. It is not normalised.
    4. Every held-out question is put under both prompts of every pair, and the state at the last prompt token, from which the
       answer begins, is projected on v(l). Suggested is the layer at which the two sides lie farthest apart: the difference
       of their means over their pooled standard deviation. The layer is chosen on these questions, so the separation at it is
       a little optimistic.

    Args:
        model: causal language model. The adapters of a PEFT model act as they stand.
        tokenizer: with a chat template that has a system turn.
        trait: prompts and questions, from [`load_trait`].
        max_new_tokens: the longest answer.
        batch_size: answers that are generated, or read, at once.
        seed: of the sampling. Every batch has its own, so a run that was interrupted and goes on gives what one without a
            break gives.
        judge: `(question, answer)` → 0 … 100, how strongly the answer shows the trait; `trait.judge_prompt` is written for it.
        rollouts_file: JSONL file that keeps the answers as they are made. A run with the same file, model, trait and settings
            goes on where the last one stopped.
        progress: whether to show progress bars.

    Raises:
        ValueError: a tokenizer without a chat template or system turn, a rollouts file of another run, or nothing left to
            make a vector of.
    """
    if min(max_new_tokens, batch_size) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be 1 or more.")
    check_system_turn(tokenizer, "a persona vector")
    weights = weight_checksums(model.get_base_model() if isinstance(model, PeftModel) else model)
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    was_training = model.training
    model.eval()
    try:
        rollouts = _roll_out(model, tokenizer, trait, settings, weights, rollouts_file, progress)

        def read(chosen: Sequence[Rollout], other_side: bool, desc: str) -> tuple[torch.Tensor, list[float]]:
            rows = []
            for r in chosen:
                side = SIDES[1 - SIDES.index(r.side)] if other_side else r.side
                prompt = _prompt_ids(
                    tokenizer, trait.system_prompts[r.pair], side, trait.extraction_questions[r.question]
                )
                rows.append((prompt, r.answer_ids))
            return answer_states(model, rows, batch_size, desc if progress else None)

        by_side = {side: [r for r in rollouts if r.side == side] for side in SIDES}
        states: dict[str, torch.Tensor] = {}
        shows: dict[str, list[bool]] = {}  # whether each answer shows what its system prompt asks for
        for side in SIDES:
            states[side], own = read(by_side[side], False, f"reading {side} answers")
            if judge is None:
                _, other = read(by_side[side], True, f"weighing {side} answers")
                shows[side] = [a < b for a, b in zip(own, other, strict=True)]
            else:
                scores = [judge(trait.extraction_questions[r.question], r.answer) for r in by_side[side]]
                shows[side] = [(score >= 50) == (side == "positive") for score in scores]
        both = [bool(a.answer_ids and b.answer_ids) for a, b in zip(*by_side.values(), strict=True)]
        kept = [i for i, flags in enumerate(zip(both, *shows.values(), strict=True)) if all(flags)]
        if not kept:
            raise ValueError(
                f"none of the {len(both)} pairs of answers shows the trait {trait.name!r} on one side and its opposite on "
                "the other: this model does not follow these system prompts. Try a longer `max_new_tokens`, or other prompts."
            )

        heldout = {}
        for side in SIDES:
            prompts = [
                _prompt_ids(tokenizer, pair, side, q) for pair in trait.system_prompts for q in trait.heldout_questions
            ]
            heldout[side] = prompt_states(model, prompts, batch_size, f"held-out {side} prompts" if progress else None)
    finally:
        model.train(was_training)

    positive, negative = (states[side][kept] for side in SIDES)
    vectors = positive.mean(0) - negative.mean(0)  # (L + 1, H)
    separations = [
        separation(vectors[layer], *(heldout[side][:, layer] for side in SIDES)) for layer in range(len(vectors))
    ]
    metadata = {
        "trait": trait.name,
        "model": public_name(model.config._name_or_path),
        "weights": weights,
        "suggested_layer": max(range(1, len(vectors)), key=lambda layer: separations[layer][1]),
        "pairs": len(both),
        "kept": len(kept),
        "heldout": len(trait.heldout_questions) * len(trait.system_prompts),
        "rule": "judge" if judge is not None else "each answer likelier under its own system prompt",
        "settings": settings,
        "auroc": [area for area, _ in separations],
        "separation": [distance for _, distance in separations],
        "state_norms": torch.cat([positive, negative]).norm(dim=-1).mean(0).tolist(),
        "trl_emguard": __version__,
    }
    vector = PersonaVector(vectors, metadata=metadata)
    controls = [random_like(vector, control).vectors for control in range(RANDOM_CONTROLS)]
    metadata["random_auroc"] = [
        sum(chance_auroc(control[layer], *(heldout[side][:, layer] for side in SIDES)) for control in controls)
        / len(controls)
        for layer in range(len(vectors))
    ]
    return Extraction(
        vector,
        rollouts,
        [(by_side["positive"][i].pair, by_side["positive"][i].question) for i in kept],
        *heldout.values(),
    )


def separation(vector: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> tuple[float, float]:
    """How well projections on a vector tell two groups of states apart.

    Args:
        vector: `(H,)`.
        positive, negative: `(N, H)` and `(M, H)`.

    Returns:
        AUROC: the share of (positive, negative) with the positive one ahead, ties as a half; and the difference of the two
        means over the pooled standard deviation, `inf` where neither group varies.
    """
    a, b = (states.double() @ vector.double() for states in (positive, negative))
    wins = (a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None]).double()
    pooled = ((a.var(correction=0) + b.var(correction=0)) / 2).sqrt()
    return wins.mean().item(), ((a.mean() - b.mean()) / pooled).nan_to_num(0.0).item()


def chance_auroc(vector: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> float:
    """max(AUROC, 1 − AUROC): what a direction whose sign means nothing achieves."""
    area, _ = separation(vector, positive, negative)
    return max(area, 1 - area)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str], side: str, question: str) -> list[int]:
    messages = [{"role": "system", "content": pair[SIDES.index(side)]}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def _roll_out(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    settings: dict[str, int],
    weights: dict[str, str],
    path: str | os.PathLike | None,
    progress: bool,
) -> list[Rollout]:
    """All answers, generated in batches of the plan's order, those in the file left out."""
    pairs, questions = len(trait.system_prompts), trait.extraction_questions
    plan = [(pair, question, side) for side in SIDES for pair in range(pairs) for question in range(len(questions))]
    batch_size = settings["batch_size"]
    key = hashlib.sha256(json.dumps([weights, asdict(trait), settings], sort_keys=True).encode()).hexdigest()
    rollouts = (
        [] if path is None else _reopen(Path(path), key, batch_size, plan, model.config.get_text_config().vocab_size)
    )

    end_of_turn = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(end_of_turn if isinstance(end_of_turn, list) else [end_of_turn])} - {None}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Plain sampling, whatever the model's own generation config says.
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=settings["max_new_tokens"],
        eos_token_id=sorted(ends), pad_token_id=pad,
    )  # fmt: skip
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=len(plan), initial=len(rollouts), desc="answering", unit="answer", disable=not progress)
    with bar, torch.random.fork_rng(devices), _bare_generation_config(model):
        for start in range(len(rollouts), len(plan), batch_size):
            batch = plan[start : start + batch_size]
            prompts = [_prompt_ids(tokenizer, trait.system_prompts[p], side, questions[q]) for p, q, side in batch]
            ids, mask, _ = left_pad(prompts, model.device)
            torch.manual_seed(settings["seed"] * 1_000_003 + start)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
            fresh = []
            for task, answer in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
                text = tokenizer.decode(answer[:stop], skip_special_tokens=True)
                fresh.append(Rollout(*task, answer=text, answer_ids=answer[:stop]))
            if path is not None:
                with Path(path).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in fresh)
            rollouts += fresh
            bar.update(len(fresh))
    return rollouts


@contextmanager
def _bare_generation_config(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Takes the model's own generation config away: `generate` fills in from it what the one that it is given leaves unset."""
    models = {model, model.get_base_model() if isinstance(model, PeftModel) else model}
    own = {m: m.generation_config for m in models if "generation_config" in vars(m)}
    try:
        for m in own:
            m.generation_config = GenerationConfig()
        yield
    finally:
        for m, generation_config in own.items():
            m.generation_config = generation_config


def _reopen(
    path: Path, key: str, batch_size: int, plan: Sequence[tuple[int, int, str]], vocab_size: int
) -> list[Rollout]:
    """The whole batches of an interrupted run, and the file cut to them; a new file where there is none."""
    header = {"rollouts_of": key}
    rollouts: list[Rollout] = []
    if path.is_file():
        try:
            # What follows the last line break is empty, or a line that was torn off. Not `splitlines`, which takes more characters
            # of an answer for line breaks.
            *lines, torn = path.read_text(encoding="utf-8").split("\n")
            same = parse_json(lines[0]) == header if lines else json.dumps(header).startswith(torn)
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                f"rollouts file {path} is of another model, trait or settings, or is none: name another, or delete it."
            )
        try:
            rollouts = [_read_rollout(line, task, vocab_size) for line, task in zip(lines[1:], plan, strict=False)]
            if len(lines) > 1 + len(plan):
                raise ValueError(f"it holds more than the {len(plan)} answers of the plan")
        except (ValueError, TypeError) as error:
            raise ValueError(f"rollouts file {path} is damaged ({error}): delete it.") from error
        if len(rollouts) != len(plan):
            rollouts = rollouts[: len(rollouts) // batch_size * batch_size]
    with written_whole(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in [header, *map(asdict, rollouts)])
    return rollouts


def _read_rollout(line: str, task: tuple[int, int, str], vocab_size: int) -> Rollout:
    """The answer to a task of the plan, from its line in the file."""
    rollout = Rollout(**parse_json(line))
    ids = rollout.answer_ids
    if (rollout.pair, rollout.question, rollout.side) != task:
        raise ValueError(f"it answers {(rollout.pair, rollout.question, rollout.side)}, where the plan has {task}")
    if not isinstance(rollout.answer, str) or not isinstance(ids, list):
        raise ValueError(f"the answer of {task} is no text with its tokens")
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"the answer of {task} has tokens that the model does not know")
    return rollout
