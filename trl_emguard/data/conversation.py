"""Rows of several shapes as a conversation and the answer that ends it."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Conversation(NamedTuple):
    """A row as turns.

    Attributes:
        prompt: the turns before the answer.
        completion: the answer, one turn of the assistant.
    """

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]


# WildGuardMix and many other data sets have these column names.
# ShareGPT's names of speakers.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

PROMPT_COLUMN, RESPONSE_COLUMN = "prompt", "response"


def conversation(
    row: Mapping[str, Any], prompt_column: str = PROMPT_COLUMN, response_column: str = RESPONSE_COLUMN
) -> Conversation:
    """Return a row as prompt and answer.

    Three shapes are tried in this order: `messages` or ShareGPT's `conversations`, whose last turn is the answer;
    `prompt` and `completion`, as
    turns or as text; and two columns of text, by default `prompt` and `response`.

    Raises:
        ValueError: a row of another shape, or one without an answer; the message names the fault.
    """
    if row.get("messages") is not None or row.get("conversations") is not None:
        turns = _turns(row["conversations"] if row.get("messages") is None else row["messages"], "user")
        prompt, completion = turns[:-1], turns[-1:]
    elif row.get("completion") is not None:
        prompt, completion = _turns(row.get("prompt"), "user"), _turns(row["completion"], "assistant")
    elif prompt_column in row and response_column in row:
        prompt, completion = _turns(row[prompt_column], "user"), _turns(row[response_column], "assistant")
    else:
        raise ValueError(
            f"it has the columns {', '.join(sorted(row))}, and not `messages`, `prompt` and `completion`, or "
            f"`{prompt_column}` and `{response_column}`"
        )
    if not prompt:
        raise ValueError("there is no prompt")
    if [turn["role"] for turn in completion] != ["assistant"] or not _has_text(completion[0]):
        raise ValueError("the answer is empty, or is not one turn of the assistant")
    if not any(_has_text(turn) for turn in prompt):
        raise ValueError("the prompt is empty")
    # A row of an Arrow table has a null for every key that only other rows have.
    return Conversation(
        *([{k: v for k, v in turn.items() if v is not None} for turn in part] for part in (prompt, completion))
    )


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    """Return a column's value as turns: a text becomes one turn of `role`, a null becomes none."""
    if isinstance(value, list):
        value = [_plain_turn(turn) for turn in value]
        # A null system text is no system turn.
        value = [
            t for t in value if not (isinstance(t, dict) and t.get("role") == "system" and t.get("content") is None)
        ]
        if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
            raise ValueError("its turns are not all of `role` and `content`")
        return value
    return [{"role": role, "content": value}] if isinstance(value, str) else []


def _plain_turn(turn: Any) -> Any:
    """Return a turn with `role` and `content`; ShareGPT's have `from` and `value`."""
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn:
        return {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]}
    return turn


def text_of(content: Any) -> str | None:
    """Return the text of a turn's content, whole or in parts; `None` where it has none."""
    if isinstance(content, list):
        parts: list[Any] = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(parts) if parts and all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def _has_text(turn: dict[str, Any]) -> bool:
    return bool((text_of(turn.get("content")) or "").strip())
