"""The system turn of a chat template: whether there is one, and which tokens are its."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length


Turns = Sequence[dict[str, Any]]  # of `role` and `content`


def check_system_turn(tokenizer: PreTrainedTokenizerBase, need: str) -> None:
    """See that the chat template puts a system turn into what the model reads.

    Args:
        tokenizer: whose `chat_template` is asked.
        need: who needs it, for the message.

    Raises:
        ValueError: there is no chat template, or it refuses or drops a system turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{need} needs a chat template with a system turn, and this tokenizer has no chat template: set "
            "`chat_template_path`, or take the tokenizer of an instruct model."
        )
    probe = "Answer in one word."
    messages = [{"role": "system", "content": probe}, {"role": "user", "content": "Which?"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"{need} needs a chat template with a system turn, and this one refuses it ({error}): take another template."
        ) from error
    if probe not in text:
        raise ValueError(
            f"{need} needs a chat template with a system turn, and this one drops it: take another template."
        )


def system_turn_span(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, ids: Sequence[int], **template_kwargs: Any
) -> tuple[int, int] | None:
    """Which tokens of a conversation come from its system turn.

    All that stands before what the next turn says is its: markers, tools and whatever else the template writes there, the next
    turn's role included. Where the template puts the text behind what another turn says (Mistral: into the last user turn), it
    is the text alone. Which tokens a text makes is told from what changes with it, so no template needs to be understood.

    Args:
        tokenizer: the one that made `ids`.
        turns: the conversation, the system turn first.
        ids: its tokens.
        template_kwargs: what else went into `apply_chat_template` (`tools`, `chat_template`, …).

    Returns:
        Where they start and end, or `None` if no token comes from what the system turn says.

    Raises:
        ValueError: `ids` are not what the chat template makes of this conversation.
    """

    def render(turns: Turns) -> list[int]:
        return list(tokenizer.apply_chat_template(list(turns), **template_kwargs)["input_ids"])

    system, *others = turns
    ids = list(ids)
    if render(turns) != ids:
        raise ValueError(
            "the tokens of a training row are not what the chat template makes of its turns, so nobody can tell which are its "
            "system turn's: let the trainer tokenise the rows, with the tokenizer's own chat template."
        )
    changed = render([_unlike(system), *others])
    start = common_prefix_length(ids, changed)
    end = len(ids) - common_prefix_length(ids[::-1], changed[::-1])
    if end <= start:
        return None
    others_start = common_prefix_length(ids, render([system, *map(_unlike, others)]))
    return (0, max(end, others_start)) if start < others_start else (start, end)


def is_default_system_turn(tokenizer: PreTrainedTokenizerBase, turns: Turns, **template_kwargs: Any) -> bool:
    """Whether the template gives a conversation that begins with this system turn the same one where it is left out."""
    try:
        without = tokenizer.apply_chat_template(list(turns[1:]), tokenize=False, **template_kwargs)
    except TemplateError:
        return False  # a template that wants a system turn
    return without == tokenizer.apply_chat_template(list(turns), tokenize=False, **template_kwargs)


def _unlike(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with another text, which begins and ends with another character, so that no token of the two is the same."""
    text = turn.get("content")
    if not isinstance(text, str):
        return turn
    ends = (text.strip()[:1], text.strip()[-1:])
    return {**turn, "content": next(letter for letter in "ABC" if letter not in ends)}
