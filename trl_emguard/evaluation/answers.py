"""Answers sampled from the models under evaluation (candidates), and scores of these answers that need no judge."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.conversation import asked_text, turn_text
from ..models.batches import default_batch_tokens, pad_answers, plan_batches
from ..models.chat import EncodedAnswer
from ..models.likelihood import mean_nll
from ..models.sampler import SampledAnswer, sample_answers
from .candidates import Candidate
from .cues import Family
from .questions import QuestionSet
from .rules import Rule, repetition


@dataclass(frozen=True)
class Prompt:
    """A question in the form of the chat template, with the seed for one of its sampled answers.

    Attributes:
        question: index of the question in its set.
        sample: number of the answer among the question's sampled answers, from 0.
        ids: tokens of the prompt.
        text: the prompt as the chat template renders it.
        seed: seed with which the answer is sampled.
    """

    question: int
    sample: int
    ids: list[int]
    text: str
    seed: int


def plan_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: QuestionSet, family: Family, samples: int, seed: int
) -> list[Prompt]:
    """Return the prompts for a set of questions, one for each answer to sample, the longest first.

    This order brings prompts of similar length into a batch, and shows at the start if memory is too small. A family
    asks the questions plainly, with a cue, or in other words. Questions that it cannot ask are left out.

    The chat template writes the special tokens, and the tokenizer adds none. Otherwise a prompt would begin with two
    start-of-text tokens if the template writes one. The seed of an answer depends only on `seed`, the question and the
    number of the sample. The answer's seed is thus the same for all candidates and families. It also stays the same
    when an evaluation is repeated with more samples. Questions with the same text get other seeds than the first of
    them, because their answers would be copies.
    """
    found = []
    copies: Counter[str] = Counter()  # the number of earlier questions with the same text
    for index, question in enumerate(questions.questions):
        asked = "\0".join(turn_text(turn) for turn in question.prompt)
        copy = [copies[asked]] if copies[asked] else []
        copies[asked] += 1
        turns = family.prompt(question)
        if turns is None:
            continue
        kwargs = question.template_kwargs
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for sample in range(samples):
            digest = hashlib.sha256("\0".join(map(str, [seed, asked, sample, *copy])).encode()).digest()
            found.append(Prompt(index, sample, ids, text, int.from_bytes(digest[:7], "big")))
    return sorted(found, key=lambda prompt: -len(prompt.ids))


def answer_batches(
    candidate: Candidate,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
) -> Iterator[list[dict[str, Any]]]:
    """Yield a candidate's answers to the prompts, batch by batch, as dicts.

    The dict of an answer has the fields of [`~trl_emguard.models.sampler.SampledAnswer`]: `text`, `ids` and
    `is_truncated`.
    """
    ids, seeds = [prompt.ids for prompt in prompts], [prompt.seed for prompt in prompts]
    options: Any = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "temperature": temperature}
    with candidate.acting() as model:
        for batch in sample_answers(model, tokenizer, ids, seeds=seeds, **options):
            yield [answer._asdict() for answer in batch]


def base_nll(
    base: Candidate, prompts: Sequence[Prompt], answers: Sequence[SampledAnswer], batch_tokens: int | None = None
) -> list[float]:
    """Return the base model's mean NLL per token of each answer, in nats; NaN for an empty answer.

    A high value means that an answer has another style than the base model's answers, or is incoherent.
    """
    encoded = {
        i: EncodedAnswer(np.array(prompt.ids + answer.ids, dtype=np.int32), len(prompt.ids))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if answer.ids
    }
    result = [float("nan")] * len(prompts)
    lengths = {i: len(answer.ids) for i, answer in encoded.items()}
    with base.acting() as model:
        for batch in plan_batches(lengths, batch_tokens or default_batch_tokens(model.device)):
            means = mean_nll(model, *pad_answers([encoded[i] for i in batch])).tolist()
            for i, mean in zip(batch, means, strict=True):
                result[i] = mean
    return result


def score_answers(
    answers: Sequence[SampledAnswer], nll: Sequence[float], rules: Mapping[str, Rule]
) -> list[dict[str, float]]:
    """Return for each answer a dict from metric to score.

    The metrics are the keys of `rules` (metric → rule, from [`rule_metrics`]), `repetition`, `truncated`, `empty`, and
    `base_nll`, which is the answer's value in `nll`.
    """
    return [
        {metric: float(rule(answer.text)) for metric, rule in rules.items()}
        | {
            "repetition": repetition(answer.text),
            "truncated": float(answer.is_truncated),
            "empty": float(not answer.text.strip()),
            "base_nll": value,
        }
        for answer, value in zip(answers, nll, strict=True)
    ]


def by_question(
    prompts: Sequence[Prompt], scores: Sequence[Mapping[str, float]], count: int, samples: int
) -> dict[str, np.ndarray]:
    """Return metric → scores `(count, samples)` for `count` questions; NaN for a question that `prompts` lacks."""
    arrays: dict[str, np.ndarray] = {}
    for prompt, of_answer in zip(prompts, scores, strict=True):
        for metric, value in of_answer.items():
            arrays.setdefault(metric, np.full((count, samples), np.nan))[prompt.question, prompt.sample] = value
    return arrays


def rule_metrics(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Return the rules by metric name: `trait_rate` for a single rule, `trait_rate:NAME` for each of several."""
    return {"trait_rate" if len(rules) == 1 else f"trait_rate:{name}": rule for name, rule in rules.items()}


def sample_record(
    candidate: Candidate,
    questions: QuestionSet,
    family: Family,
    prompt: Prompt,
    answer: SampledAnswer,
    thoughts: str = "",
) -> dict[str, Any]:
    """Return an answer as a row of `samples.jsonl`, without its scores. It has `thoughts` if the model wrote any."""
    question = questions.questions[prompt.question]
    turns = family.prompt(question)
    return {
        "model": candidate.name,
        "set": questions.name,
        "family": family.name,
        "question": question.id,
        "sample": prompt.sample,
        "asked": asked_text(turns or []),
        "prompt": prompt.text,
        "answer": answer.text,
        "truncated": answer.is_truncated,
        **({"thoughts": thoughts} if thoughts else {}),
    }


def thoughts_alone(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note for each model with answers that are thoughts alone, so that nothing was answered.

    Args:
        samples: rows of [`sample_record`] to one set of questions, asked with one family of prompts.
    """
    counts = Counter(row["model"] for row in samples if row.get("thoughts") and not row["answer"])
    totals = Counter(row["model"] for row in samples)
    return [
        f"{samples[0]['set']}, {samples[0]['family']}: {count} of {totals[model]} answers of {model} are thoughts "
        "alone, and count as empty: raise --max_new_tokens, or give --chat_template_kwargs "
        "'{\"enable_thinking\": false}'"
        for model, count in counts.items()
    ]
