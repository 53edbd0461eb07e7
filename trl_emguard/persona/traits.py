"""Traits: the prompts and questions that persona vectors are made from, in one YAML file per trait."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..io.lookup import did_you_mean
from ..io.strict import parse_yaml


TRAITS_DIR = Path(__file__).parent / "shipped"
SHIPPED_TRAITS = ("evil", "sycophantic", "hallucinating")


@dataclass(frozen=True)
class Trait:
    """A character trait, with prompts and questions that make a model show the trait or its opposite.

    Attributes:
        name: one word.
        description: one sentence.
        system_prompts: pairs of prompts. The first prompt of a pair asks for the trait, the second for its opposite.
        extraction_questions: user turns. The vector is made from the model's answers to them.
        heldout_questions: other user turns, used to test the vector and to suggest its layer.
        judge_prompt: prompt that asks a judge for a score from 0 to 100; contains `{question}` and `{answer}`.
    """

    name: str
    description: str
    system_prompts: tuple[tuple[str, str], ...]
    extraction_questions: tuple[str, ...]
    heldout_questions: tuple[str, ...]
    judge_prompt: str


def load_trait(name: str | os.PathLike) -> Trait:
    """Load a shipped trait by its name, or one of your own by the path of its YAML file.

    Raises:
        FileNotFoundError: `name` is neither a shipped trait nor a file.
        ValueError: the file is not a complete trait; the message names the missing or wrong key.
    """
    path = TRAITS_DIR / f"{name}.yaml" if str(name) in SHIPPED_TRAITS else Path(os.path.expanduser(name))
    if not path.is_file():
        raise FileNotFoundError(
            f"trait {str(name)!r} is neither a file nor a shipped trait.{did_you_mean(str(name), SHIPPED_TRAITS)} "
            f"Shipped: {', '.join(SHIPPED_TRAITS)}."
        )
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"trait file {path} is not YAML: {error}") from error
    file = f"trait file {path}"
    _check_keys(data, file)
    pairs = _parse_pairs(data["system_prompts"], file)
    extraction, heldout = (
        _parse_questions(key, data[key], file) for key in ("extraction_questions", "heldout_questions")
    )
    shared = set(extraction) & set(heldout)
    if shared:
        raise ValueError(
            f"{file}: {min(shared)!r} is both an extraction and a held-out question, so the test would not be one."
        )
    return Trait(data["name"], data["description"], pairs, extraction, heldout, data["judge_prompt"])


def _check_keys(data: Any, file: str) -> None:
    """Raise `ValueError` for unknown, missing or empty keys of a trait file, and for wrong values of its text fields.

    The text fields (name, description and judge prompt) must hold text that is not blank, and the judge prompt must
    contain `{question}` and `{answer}`. The lists of prompts and questions are checked when they are parsed.
    """
    keys = [f.name for f in fields(Trait)]
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold the keys {', '.join(keys)}.")
    for key in data:
        if key not in keys:
            raise ValueError(f"{file}: unknown key {key!r}. Known: {', '.join(keys)}.")
    for key in keys:
        if not data.get(key):
            raise ValueError(f"{file}: {key!r} is missing or empty.")
    for key in ("name", "description", "judge_prompt"):
        _check_text(data[key], f"{file}: {key!r}")
    for placeholder in ("{question}", "{answer}"):
        if placeholder not in data["judge_prompt"]:
            raise ValueError(f"{file}: 'judge_prompt' lacks {placeholder}.")


def _parse_pairs(value: Any, file: str) -> tuple[tuple[str, str], ...]:
    sides = ("positive", "negative")
    pairs = []
    for i, pair in enumerate(_check_list(value, f"{file}: 'system_prompts'"), 1):
        place = f"{file}: pair {i} of 'system_prompts'"
        if not isinstance(pair, dict) or set(pair) - set(sides):
            raise ValueError(f"{place} must hold 'positive' and 'negative'.")
        for side in sides:
            if side not in pair:
                raise ValueError(f"{place} has no {side!r} side.")
            _check_text(pair[side], f"{place}: {side!r}")
        pairs.append((pair["positive"], pair["negative"]))
    return tuple(pairs)


def _parse_questions(key: str, value: Any, file: str) -> tuple[str, ...]:
    questions = _check_list(value, f"{file}: {key!r}")
    for i, question in enumerate(questions, 1):
        _check_text(question, f"{file}: question {i} of {key!r}")
    return tuple(questions)


def _check_list(value: Any, place: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{place} must be a list, got {type(value).__name__}.")
    return value


def _check_text(value: Any, place: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place} must be text, got {value!r}.")
