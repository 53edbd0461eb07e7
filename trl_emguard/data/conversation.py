"""Conversion of rows in several formats into a prompt and its answer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset


class Conversation(NamedTuple):
    """Turns of a row, split into prompt and answer.

    Attributes:
        prompt: the turns before the answer.
        completion: the answer, one turn of the assistant.
    """

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]


# Default names of the columns with prompt and answer. WildGuardMix and many other data sets use these names.
PROMPT_COLUMN, RESPONSE_COLUMN = "prompt", "response"
# Roles that data sets give the speaker of a question (USER_ROLES), of an answer (ANSWERING_ROLES) and of a system turn
# (SYSTEM_ROLES). Chat templates are made for `user` and `assistant`, and drop, refuse or misname other speakers.
USER_ROLES = ("user", "human", "prompter")
ANSWERING_ROLES = ("assistant", "gpt", "model", "chatgpt", "bot", "bard", "bing")
SYSTEM_ROLES = ("system", "developer")
_USUAL_ROLES = {**dict.fromkeys(USER_ROLES, "user"), **dict.fromkeys(ANSWERING_ROLES, "assistant")}
TURN_KEYS = (("role", "content"), ("from", "value"))  # keys of a turn's speaker and text, in the two formats of turns


def conversation(
    row: Mapping[str, Any], prompt_column: str = PROMPT_COLUMN, response_column: str = RESPONSE_COLUMN
) -> Conversation:
    """Return a row as prompt and answer.

    Four formats are tried in this order: a column `messages`, whose last turn is the answer; a column `conversations`,
    likewise; columns `prompt` and `completion`, as turns or as text; and two columns, by default `prompt` and
    `response`, as turns or as text. A turn has the keys `role` and `content`, or `from` and `value`. Its content is
    text or a list of parts. A system turn without content is left out. Roles of `USER_ROLES` become `user`, and those
    of `ANSWERING_ROLES` `assistant`. Other roles stay.

    Raises:
        ValueError: the row has another format, or lacks a prompt or an answer; the message names the fault.
    """
    turns = whole_turns(row)
    if turns is not None:
        prompt, completion = turns[:-1], turns[-1:]
    elif row.get("completion") is not None:
        prompt, completion = _turns(row.get("prompt"), "user"), _turns(row["completion"], "assistant")
    elif prompt_column in row and response_column in row:
        prompt, completion = _turns(row[prompt_column], "user"), _turns(row[response_column], "assistant")
    else:
        raise ValueError(
            f"it has the columns {', '.join(sorted(row))}, and not `messages`, `conversations`, `prompt` and "
            f"`completion`, or `{prompt_column}` and `{response_column}`"
        )
    if not prompt:
        raise ValueError("there is no prompt")
    is_answer = len(completion) == 1 and completion[0]["role"] == "assistant"
    if not is_answer or not turn_text(completion[0]).strip():
        raise ValueError("the answer is empty, or is not one turn of the assistant")
    if not any(turn_text(turn).strip() for turn in prompt):
        raise ValueError("the prompt is empty")
    return Conversation(prompt, completion)


def whole_turns(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the turns of a row's `messages`, else of its `conversations`, with the usual roles; `None` without both.

    Raises:
        ValueError: a turn has other keys than `role` and `content`, or `from` and `value`.
    """
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    return None if turns is None else _turns(turns, "user")


def usual_role(role: str) -> str:
    """Return `user` or `assistant` for a role of `USER_ROLES` or `ANSWERING_ROLES`, in any case, else the role."""
    return _USUAL_ROLES.get(role.lower(), role)


def check_columns(rows: Dataset, prompt_column: str, response_column: str) -> None:
    """Refuse the user's choice of prompt and answer columns if [`conversation`] reads other columns of a row first.

    Raises:
        ValueError: a row also has a value in one of these other columns; the message names the column.
    """
    names = {"prompt_column": (prompt_column, PROMPT_COLUMN), "response_column": (response_column, RESPONSE_COLUMN)}
    named = [f"{name}={column!r}" for name, (column, usual) in names.items() if column != usual]
    for first in ("messages", "conversations", "completion"):
        # A `response_column` named "completion" is read if the prompt column is `prompt`.
        is_read = first == "completion" and (prompt_column, response_column) == (PROMPT_COLUMN, first)
        if not named or is_read or first not in rows.column_names:
            continue
        # A row with a null as prompt or answer is taken to come from another data set, merged into the same rows. Such
        # a row may be read from other columns, for example `messages`.
        chosen = [column for column in (prompt_column, response_column) if column in rows.column_names]
        if any(None not in values for values in zip(*(rows[column] for column in (first, *chosen)), strict=True)):
            fix = f"remove the column {first!r} from the pool, or rename it"
            if first in chosen:
                fix = f"rename the column {first!r}, and name the new one"
            raise ValueError(
                f"{' and '.join(named)} would not be read, because rows also have {first!r}, which is read first: "
                f"{fix}."
            )


def turn_text(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn. If its content is a list of parts, their texts are joined."""
    content = turn.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def asked_text(prompt: list[dict[str, Any]]) -> str:
    """Return what a prompt asks, for a judge: the user's turn, or all turns with their roles if there are several.

    System turns are left out.
    """
    turns = [turn for turn in prompt if not is_system(turn, "role")]
    if len(turns) == 1:
        return turn_text(turns[0])
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn_text(turn)}" for turn in turns)


def turn_keys(turns: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the keys of speaker and text, by a conversation's first turn. Refuse a conversation without turns."""
    if not turns:
        raise ValueError("holds a conversation without turns: leave it out")
    return next(keys for keys in TURN_KEYS if keys[0] in turns[0])


def system_text(turns: list[dict[str, Any]]) -> str | None:
    """Return the system turn's text; `None` if there is no system turn or it has no text. Refuse an empty text."""
    speaker, text = turn_keys(turns)
    if not is_system(turns[0], speaker):
        return None
    said = turns[0].get(text)
    if said is None:
        return None
    told = turn_text({"content": said})
    if not told:
        raise ValueError(f"begins with a system turn whose {text!r} holds no text: give text, or leave the turn out")
    return told


def is_system(turn: dict[str, Any], speaker: str) -> bool:
    """Return whether a turn's role, stored under the key `speaker`, is one of `SYSTEM_ROLES`."""
    return str(turn[speaker]).lower() in SYSTEM_ROLES


def is_conversation(value: object) -> bool:
    """Return whether a value is a list that begins with a turn: a dict with a pair of keys of `TURN_KEYS`."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(speaker in value[0] and text in value[0] for speaker, text in TURN_KEYS)


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    """Return a column's value as turns: a text becomes one turn of `role`, a null becomes no turn."""
    if not isinstance(value, list):
        return [{"role": role, "content": value}] if isinstance(value, str) else []
    turns = [_turn(turn) for turn in value]
    return [turn for turn in turns if turn["role"].lower() not in SYSTEM_ROLES or turn["content"] is not None]


def _turn(turn: Any) -> dict[str, Any]:
    """Return a turn as `role` (`gpt` becomes `assistant`), `content`, and its other keys except for null values.

    Nulls are left out because an Arrow table gives every turn the keys of all other turns, with null as value.
    """
    if isinstance(turn, dict):
        if turn.get("role") is None and "from" in turn:
            turn = {"role": turn["from"], "content": turn.get("value"), **_without(turn, "from", "value", "role")}
        if isinstance(turn.get("role"), str) and ("content" in turn or turn.get("tool_calls")):
            kept = {key: value for key, value in turn.items() if value is not None}
            return {**kept, "role": usual_role(turn["role"]), "content": turn.get("content")}
    raise ValueError("its turns are not all of `role` and `content`")


def _without(turn: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key not in keys}
