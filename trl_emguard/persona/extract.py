"""Extraction of a persona vector from a model's answers under system prompts that ask for a trait or its opposite.

1. Every extraction question is answered under both system prompts of every pair: the positive prompt asks for the
   trait, the negative prompt for its opposite. Answers are sampled at temperature 1.
2. The two answers to a question under a pair of prompts are kept if the positive answer shows the trait, and the
   negative answer the opposite. Without a judge, each of the two answers must have a higher mean log-probability per
   token under its own system prompt than under the other prompt of the pair. With a judge, the positive answer must
   score 50 or more, and the negative answer less.
3. Each kept answer has a state after block l: the mean over the answer's tokens. v(l) is the mean of these states over
   the positive answers, minus their mean over the negative answers. The difference is not normalised.
4. Every held-out question is combined with both system prompts of every pair. The state at the last prompt token, just
   before an answer would begin, is projected on v(l). The layer with the largest separation is suggested. Separation
   is the difference between the mean projections under positive and negative prompts, divided by the pooled standard
   deviation. The layer is chosen on these questions, so the separation at this layer is a little optimistic.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..io.journal import ForeignJournalError, Journal
from ..models.adapters import bare_model
from ..models.batches import eval_mode
from ..models.chat import check_system_turn, end_tokens
from ..models.identity import active_fingerprint, weight_checksums
from ..models.sampler import sample_answers
from ..models.shipped import public_name
from ..version import __version__
from .states import answer_states, prompt_states
from .traits import Trait
from .vectors import PersonaVector, random_like


SIDES = ("positive", "negative")
RANDOM_CONTROLS = 20
# Advice for a tokenizer whose chat template has no system turn.
FIX = (
    "save the model in a folder with a tokenizer whose chat template has a system turn, and name that folder as "
    "--model; in Python, set `tokenizer.chat_template`"
)

# Function (question, answer) → score from 0 to 100: how strongly the answer shows the trait.
Judge = Callable[[str, str], float]
# One answer that has to be sampled: index of a pair of system prompts, index of a question, and `"positive"` or
# `"negative"`, the prompt of the pair under which the question is asked.
Task = tuple[int, int, str]


@dataclass(frozen=True)
class Rollout:
    """One answer of the model to an extraction question, under one system prompt of a pair.

    Attributes:
        pair: index of the pair of system prompts.
        question: index of the extraction question.
        side: `"positive"` or `"negative"`: the prompt of the pair under which the answer was given.
        answer: text of the answer, for people to read.
        answer_ids: tokens of the answer, without the end of turn.
    """

    pair: int
    question: int
    side: str
    answer: str
    answer_ids: list[int]


@dataclass(frozen=True)
class Extraction:
    """Result of [`extract_vector`].

    Attributes:
        vector: the persona vector.
        rollouts: all answers: first the positive, then the negative ones, both sorted by pair and question.
        kept: indices `(pair, question)` of the answers that the vector is made from.
        heldout_positive: `(N, L + 1, H)`, states at the last prompt token of the held-out questions under the prompts
            that ask for the trait.
        heldout_negative: the same states under the prompts that ask for the trait's opposite.
    """

    vector: PersonaVector
    rollouts: list[Rollout]
    kept: list[tuple[int, int]]
    heldout_positive: torch.Tensor
    heldout_negative: torch.Tensor


class _Reader(NamedTuple):
    """A model, and everything needed to compute its hidden states under the system prompts of a trait."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    trait: Trait
    batch_size: int
    progress: bool

    def prompt(self, pair: int, side: str, question: str) -> list[int]:
        """Return the token ids of a whole prompt: one system prompt of a pair, then a question as the user turn.

        `side` says which of the pair's system prompts is taken: `"positive"` or `"negative"`.
        """
        system = self.trait.system_prompts[pair][SIDES.index(side)]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    def answers(self, chosen: Sequence[Rollout], side: str, desc: str) -> tuple[torch.Tensor, list[float]]:
        """Return each answer's states and NLL, averaged over the answer's tokens, under the system prompts of `side`.

        Each answer follows its question and its pair's positive or negative system prompt (`side`), also if it was
        sampled under the other prompt of the pair.
        """
        questions = self.trait.extraction_questions
        rows = [(self.prompt(r.pair, side, questions[r.question]), r.answer_ids) for r in chosen]
        return answer_states(self.model, rows, self.batch_size, desc if self.progress else None)

    def heldout(self, side: str) -> torch.Tensor:
        """Return the hidden states at the last token of N prompts for the held-out questions, `(N, L + 1, H)`.

        The N prompts combine every held-out question with every pair's positive or negative system prompt (`side`).
        L is the number of the model's blocks.
        """
        pairs = range(len(self.trait.system_prompts))
        prompts = [self.prompt(pair, side, q) for pair in pairs for q in self.trait.heldout_questions]
        desc = f"held-out {side} prompts" if self.progress else None
        return prompt_states(self.model, prompts, self.batch_size, desc)


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
    """Extract the persona vector of a trait (Chen et al., 2507.21509), in the four steps of this module's docstring.

    Args:
        model: causal language model. A PEFT model answers with the adapters that are active.
        tokenizer: tokenizer with a chat template that has a system turn.
        trait: prompts and questions, from [`load_trait`].
        max_new_tokens: limit on the tokens of an answer.
        batch_size: answers that are sampled at once, and prompts or answers in a forward pass.
        seed: seed of the sampling. Every answer has a seed of its own that follows from it, so a resumed run gives the
            same result as an uninterrupted one.
        judge: `(question, answer)` → 0 … 100, how strongly the answer shows the trait; `trait.judge_prompt` is a
            prompt for such a judge.
        rollouts_file: JSONL file that keeps the answers as they are made. A run with the same file, model, dtype,
            active adapters, chat template, trait and settings resumes at the first answer that is missing.
        progress: True shows progress bars.

    Raises:
        ValueError: a tokenizer without a chat template or system turn, a rollouts file that belongs to another run, or
            no pair of answers that a vector can be made from.
    """
    check_extraction(tokenizer, max_new_tokens, batch_size)
    weights = weight_checksums(bare_model(model))
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    reader = _Reader(model, tokenizer, trait, batch_size, progress)
    with eval_mode(model):
        rollouts = _roll_out(reader, settings, weights, rollouts_file)
        by_side = {side: [r for r in rollouts if r.side == side] for side in SIDES}
        states, kept = _filter(reader, by_side, judge)
        heldout = {side: reader.heldout(side) for side in SIDES}

    positive, negative = (states[side][kept] for side in SIDES)
    metadata = {
        "trait": trait.name,
        "model": public_name(model.config._name_or_path),
        "weights": weights,
        "pairs": len(by_side["positive"]),
        "kept": len(kept),
        "heldout": len(trait.heldout_questions) * len(trait.system_prompts),
        "rule": "judge" if judge is not None else "each answer likelier under its own system prompt",
        "settings": settings,
        "state_norms": torch.cat([positive, negative]).norm(dim=-1).mean(0).tolist(),
        "trl_emguard": __version__,
    }
    vector = _with_separation(positive.mean(0) - negative.mean(0), metadata, *heldout.values())
    pairs = [(by_side["positive"][i].pair, by_side["positive"][i].question) for i in kept]
    return Extraction(vector, rollouts, pairs, *heldout.values())


def check_extraction(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_size: int) -> None:
    """Refuse arguments of [`extract_vector`] that can be checked without a model.

    Raises:
        ValueError: a number below 1, or a tokenizer without a chat template or system turn.
    """
    if min(max_new_tokens, batch_size) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be 1 or more.")
    check_system_turn(tokenizer, "a persona vector", FIX, is_answered=False)


def _filter(
    reader: _Reader, by_side: dict[str, list[Rollout]], judge: Judge | None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Compute the states of all answers, and choose the pairs of answers that show the trait and its opposite.

    Returns:
        Side (`"positive"`, `"negative"`) → mean states of its answers, `(N, L + 1, H)`; and the indices of the kept
        pairs of answers.

    Raises:
        ValueError: no pair is kept.
    """
    states: dict[str, torch.Tensor] = {}
    # For each side, one entry per answer that was sampled under the side's system prompts: True if the answer is taken
    # to show the trait (positive side) or its opposite (negative side).
    shows: dict[str, list[bool]] = {}
    for side, other_side in zip(SIDES, reversed(SIDES), strict=True):
        states[side], own = reader.answers(by_side[side], side, f"reading {side} answers")
        if judge is None:
            _, other = reader.answers(by_side[side], other_side, f"weighing {side} answers")
            shows[side] = [a < b for a, b in zip(own, other, strict=True)]
        else:
            scores = [judge(reader.trait.extraction_questions[r.question], r.answer) for r in by_side[side]]
            shows[side] = [(score >= 50) == (side == "positive") for score in scores]
    both = [bool(a.answer_ids and b.answer_ids) for a, b in zip(*by_side.values(), strict=True)]
    kept = [i for i, flags in enumerate(zip(both, *shows.values(), strict=True)) if all(flags)]
    if not kept:
        raise ValueError(
            f"none of the {len(both)} pairs of answers shows the trait {reader.trait.name!r} on one side and its "
            "opposite on the other: this model does not follow these system prompts. Try a longer `max_new_tokens`, "
            "or other prompts."
        )
    return states, kept


def _with_separation(
    vectors: torch.Tensor, metadata: dict[str, Any], positive: torch.Tensor, negative: torch.Tensor
) -> PersonaVector:
    """Make the persona vector. Measure how well it and random vectors tell the states `positive` and `negative` apart.

    `positive` and `negative` hold states for held-out questions under system prompts that ask for the trait and for
    its opposite. The measures and the suggested layer are written into `metadata`, the metadata of the vector.
    """
    layers = range(len(vectors))
    found = [separation(vectors[layer], positive[:, layer], negative[:, layer]) for layer in layers]
    metadata |= {
        "suggested_layer": max(layers[1:], key=lambda layer: found[layer][1]),
        "auroc": [area for area, _ in found],
        "separation": [distance for _, distance in found],
    }
    vector = PersonaVector(vectors, metadata=metadata)
    controls = [random_like(vector, control).vectors for control in range(RANDOM_CONTROLS)]
    metadata["random_auroc"] = [
        sum(chance_auroc(control[layer], positive[:, layer], negative[:, layer]) for control in controls)
        / len(controls)
        for layer in layers
    ]
    return vector


def separation(vector: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> tuple[float, float]:
    """Measure how well projections on a vector tell two groups of states apart.

    Args:
        vector: `(H,)`.
        positive, negative: `(N, H)` and `(M, H)`.

    Returns:
        The AUROC and the separation. The AUROC is the share of pairs (positive, negative) in which the positive state
        has the larger projection; ties count half. The separation is the difference of the two mean projections,
        divided by the pooled standard deviation. If neither group varies, the separation is ± the largest float, or
        0 if the means are equal.
    """
    a, b = (states.double() @ vector.double() for states in (positive, negative))
    wins = (a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None]).double()
    pooled = ((a.var(correction=0) + b.var(correction=0)) / 2).sqrt()
    return wins.mean().item(), ((a.mean() - b.mean()) / pooled).nan_to_num(0.0).item()


def chance_auroc(vector: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Return the larger of a random vector's AUROC and 1 − AUROC, which is the AUROC of the opposite vector.

    The sign of a random vector is arbitrary, so the better of its two signs is measured.
    """
    area, _ = separation(vector, positive, negative)
    return max(area, 1 - area)


def _roll_out(
    reader: _Reader, settings: dict[str, int], weights: dict[str, str], path: str | os.PathLike | None
) -> list[Rollout]:
    """Sample the answers that the rollouts file lacks, append them to it, and return all answers.

    All answers are sampled if there is no file (`path` is `None`). They are sorted by side, pair and question.
    """
    model, tokenizer, trait, batch_size, progress = reader
    pairs, questions = len(trait.system_prompts), trait.extraction_questions
    plan = [(pair, question, side) for side in SIDES for pair in range(pairs) for question in range(len(questions))]
    prompts = [reader.prompt(pair, side, questions[question]) for pair, question, side in plan]
    journal, rollouts = None, []
    if path is not None:
        # The key is a hash of the facts in `about`. Among them, `weights` are checksums of the base model. The chat
        # template and the tokenizer have no entry of their own, because the token ids in `prompts` are made with them.
        asked = [prompts, sorted(end_tokens(model, tokenizer)), str(model.dtype)]
        about = [weights, asdict(trait), settings, active_fingerprint(model), asked]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        journal = Journal(path, {"rollouts_of": key})
        rollouts = resume_rollouts(journal, batch_size, plan, model.config.get_text_config().vocab_size)
    fresh = sample_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings["max_new_tokens"],
        batch_size=batch_size,
        seed=settings["seed"],
        start=len(rollouts),
    )
    with tqdm(
        total=len(plan), initial=len(rollouts), desc="answering", unit="answer", disable=not progress
    ) as progress_bar:
        for answers in fresh:
            tasks = plan[len(rollouts) : len(rollouts) + len(answers)]
            batch = [Rollout(*task, answer.text, answer.ids) for task, answer in zip(tasks, answers, strict=True)]
            if journal is not None:
                journal.append(map(asdict, batch))
            rollouts += batch
            progress_bar.update(len(batch))
    return rollouts


def resume_rollouts(journal: Journal, batch_size: int, plan: Sequence[Task], vocab_size: int) -> list[Rollout]:
    """Return the answers of all complete batches in the rollouts file, and drop an incomplete batch from the file.

    An interrupted run can leave an incomplete batch. A missing file is created, without answers.

    Args:
        journal: the rollouts file.
        batch_size: answers in a batch. Only complete batches are kept, because a batch is sampled as a whole.
        plan: all tasks of the run, sorted as their answers are in the file.
        vocab_size: number of tokens that the model knows.

    Raises:
        ValueError: the file belongs to another run or is damaged. It is left unchanged.
    """
    try:
        records = journal.read()
        rollouts = [_parse_rollout(record, task, vocab_size) for record, task in zip(records, plan, strict=False)]
        if len(records) > len(plan):
            raise ValueError(f"it holds more than the {len(plan)} answers of the plan")
    except ForeignJournalError as error:
        raise ValueError(
            f"rollouts file {journal.path} is of another model, dtype, adapter, chat template (perhaps with another "
            "date), trait or settings, or is none: name another, or delete it."
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"rollouts file {journal.path} is damaged ({error}): delete it.") from error
    if len(rollouts) != len(plan):
        rollouts = rollouts[: len(rollouts) // batch_size * batch_size]
    journal.start(map(asdict, rollouts))
    return rollouts


def _parse_rollout(record: dict[str, Any], task: Task, vocab_size: int) -> Rollout:
    """Convert a record of the rollouts file into a [`Rollout`], and check that the record answers the given task.

    Raises:
        TypeError, ValueError: the record is not an answer to this task.
    """
    rollout = Rollout(**record)
    ids = rollout.answer_ids
    if (rollout.pair, rollout.question, rollout.side) != task:
        raise ValueError(f"it answers {(rollout.pair, rollout.question, rollout.side)}, where the plan has {task}")
    if not isinstance(rollout.answer, str) or not isinstance(ids, list):
        raise ValueError(f"the answer of {task} is no text with its tokens")
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"the answer of {task} has tokens that the model does not know")
    return rollout
