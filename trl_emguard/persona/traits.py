"""A trait: what a persona vector is made of. One YAML file each."""

import difflib
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..io.strict import parse_yaml


TRAITS_DIR = Path(__file__).parent / "shipped"
SHIPPED_TRAITS = ("evil", "sycophantic", "hallucinating")


@dataclass(frozen=True)
class Trait:
    """A character trait, and how to bring it out.

    Attributes:
        name: one word.
        description: one sentence.
        system_prompts: pairs; the first of each asks for the trait, the second for its opposite.
        extraction_questions: user turns that the vector is made from.
        heldout_questions: other user turns, which the vector is tested on and its layer is suggested from.
        judge_prompt: asks a judge for a score from 0 to 100; holds `{question}` and `{answer}`.
    """

    name: str
    description: str
    system_prompts: tuple[tuple[str, str], ...]
    extraction_questions: tuple[str, ...]
    heldout_questions: tuple[str, ...]
    judge_prompt: str


def load_trait(name: str | os.PathLike) -> Trait:
    """A shipped trait by its name, or one of your own by the path of its YAML file.

    Raises:
        FileNotFoundError: neither a shipped name nor a file.
        ValueError: the file is no whole trait; the message names the key.
    """
    path = TRAITS_DIR / f"{name}.yaml" if str(name) in SHIPPED_TRAITS else Path(os.path.expanduser(name))
    if not path.is_file():
        near = difflib.get_close_matches(str(name), SHIPPED_TRAITS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise FileNotFoundError(
            f"trait {str(name)!r} is neither a file nor a shipped trait. {hint}Shipped: {', '.join(SHIPPED_TRAITS)}."
        )
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"trait file {path} is not YAML: {error}") from error
    keys = [f.name for f in fields(Trait)]
    if not isinstance(data, dict):
        raise ValueError(f"trait file {path} must hold the keys {', '.join(keys)}.")
    for key in data:
        if key not in keys:
            raise ValueError(f"trait file {path}: unknown key {key!r}. Known: {', '.join(keys)}.")
    for key in keys:
        if not data.get(key):
            raise ValueError(f"trait file {path}: {key!r} is missing or empty.")

    for key in ("name", "description", "judge_prompt"):
        _check_text(data[key], f"trait file {path}: {key!r}")
    for placeholder in ("{question}", "{answer}"):
        if placeholder not in data["judge_prompt"]:
            raise ValueError(f"trait file {path}: 'judge_prompt' lacks {placeholder}.")
    pairs = _check_list(data["system_prompts"], f"trait file {path}: 'system_prompts'")
    for i, pair in enumerate(pairs, 1):
        where = f"trait file {path}: pair {i} of 'system_prompts'"
        if not isinstance(pair, dict) or set(pair) - {"positive", "negative"}:
            raise ValueError(f"{where} must hold 'positive' and 'negative'.")
        for side in ("positive", "negative"):
            if side not in pair:
                raise ValueError(f"{where} has no {side!r} side.")
            _check_text(pair[side], f"{where}: {side!r}")
    for key in ("extraction_questions", "heldout_questions"):
        for i, question in enumerate(_check_list(data[key], f"trait file {path}: {key!r}"), 1):
            _check_text(question, f"trait file {path}: question {i} of {key!r}")
    shared = set(data["extraction_questions"]) & set(data["heldout_questions"])
    if shared:
        raise ValueError(
            f"trait file {path}: {min(shared)!r} is both an extraction and a held-out question, so the test would not be one."
        )
    return Trait(
        name=data["name"],
        description=data["description"],
        system_prompts=tuple((pair["positive"], pair["negative"]) for pair in pairs),
        extraction_questions=tuple(data["extraction_questions"]),
        heldout_questions=tuple(data["heldout_questions"]),
        judge_prompt=data["judge_prompt"],
    )


def _check_list(value: Any, what: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {type(value).__name__}.")
    return value


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text, got {value!r}.")
