"""Chat templates: turn conversations into tokens, and find answers, ends of turns and system turns among them.

All rows are turned into tokens in the same way: the prompt with the generation prompt, then the answer with its
end-of-turn token. Text that the template writes after the end of turn (often a line break) is dropped, because a model
never generates it.
"""

import copy
import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import common_prefix_length


Turns = Sequence[dict[str, Any]]  # dicts of `role` and `content`

# TRL's `clone_chat_template` resizes embeddings to a multiple of this number of rows.
ROWS_MULTIPLE = 64
NO_ANSWER = "the chat template does not put the answer after the generation prompt"
# Usual roles of turns. Some chat templates write nothing for a turn of another role, and [`hidden_text`] reports each
# such turn. A turn of a usual role may be left out if it is not the last one: Qwen2.5's template writes nothing for
# `developer`, and SFTTrainer trains on such rows without this turn.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


class EncodedAnswer(NamedTuple):
    """An answer with its prompt, as tokens.

    Attributes:
        ids: `(T,)`, int32: prompt, answer, end of turn.
        prompt_length: number of tokens before the answer.
    """

    ids: np.ndarray
    prompt_length: int


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's chat-template arguments (`tools`, `chat_template_kwargs`), as SFTTrainer passes them.

    Raises:
        ValueError: `tools` is a text that is no JSON.
    """
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"`tools` is no JSON ({error})") from error
    return {**({} if tools is None else {"tools": tools}), **(row.get("chat_template_kwargs") or {})}


def shared_template_kwargs(rows: Any) -> dict[str, Any]:
    """Return those `chat_template_kwargs` that all rows of a data set share, by name.

    Args:
        rows: a `Dataset`. For any other type, for example a stream, the result is an empty dict.
    """
    if not isinstance(rows, Dataset) or "chat_template_kwargs" not in rows.column_names or not len(rows):
        return {}
    shared, *others = (row or {} for row in rows.with_format(None)["chat_template_kwargs"])
    for other in others:
        shared = {name: value for name, value in shared.items() if name in other and other[name] == value}
    return shared


def text_part(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return a tokenizer as it is, or a copy of a processor's tokenizer with the processor's chat template, if any."""
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer = copy.copy(processing_class.tokenizer)  # a copy, so that the processor's tokenizer keeps its template
    tokenizer.chat_template = processing_class.chat_template or tokenizer.chat_template
    return tokenizer


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a turn: the tokenizer's end token, and those of the model's generation config.

    Both are needed: the tokenizer of an instruct model may name the end of a text (Gemma: `<eos>`), and its generation
    config the end of a turn (`<end_of_turn>`).
    """
    config = getattr(model, "generation_config", None)
    of_model = None if config is None else config.eos_token_id
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return frozenset(ends - {None})


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[Turns, Turns]],
    ends: Collection[int],
    template_kwargs: Sequence[dict[str, Any]] | None = None,
) -> list[EncodedAnswer | str]:
    """Turn conversations into tokens, all in one call, because a fast tokenizer works on several texts in parallel.

    Args:
        tokenizer: tokenizer with a chat template.
        conversations: prompt and answer of each conversation, as turns.
        ends: tokens that end a turn, from [`end_tokens`].
        template_kwargs: further arguments of the chat template (`tools`, …) for each conversation; none by default.

    Returns:
        The tokens of each conversation, or a text with the reason why it has none.
    """
    texts: dict[int, tuple[str, str]] = {}
    result: list[EncodedAnswer | str] = [""] * len(conversations)
    for index, (prompt, answer) in enumerate(conversations):
        if not any(turn.get("content") for turn in answer):
            result[index] = "the answer is empty"
            continue
        kwargs = {} if template_kwargs is None else template_kwargs[index]
        render = partial(tokenizer.apply_chat_template, tokenize=False, **kwargs)
        try:
            before = render(list(prompt), add_generation_prompt=True)
            whole = render([*prompt, *answer])
            # A reasoning model's generation prompt may open a thinking block (`<think>`) that the template leaves out
            # if an answer is given. Then `whole` need not begin with `before`, but only with the prompt that is
            # rendered without the generation prompt.
            if not whole.startswith(before) and not whole.startswith(render(list(prompt))):
                result[index] = NO_ANSWER
            elif problem := hidden_text(prompt, answer, render, whole):
                result[index] = problem
            else:
                texts[index] = (before, whole)
        except (ValueError, TypeError, TemplateError) as error:
            result[index] = " ".join(str(error).split())
    if texts:
        flat = [text for pair in texts.values() for text in pair]
        ids = tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"]
        for index, prompt_ids, whole in zip(texts, ids[::2], ids[1::2], strict=True):
            result[index] = _cut_answer(prompt_ids, whole, ends)
    return result


def hidden_text(prompt: Turns, answer: Turns, render: Callable[..., str], whole: str | None = None) -> str | None:
    """Return a text that names the first turn whose text the chat template does not show, or `None` if all are shown.

    Turns that are looked at: the last ones of prompt and answer, and all turns of roles that are not in `KNOWN_ROLES`.
    A template may leave out other turns on purpose. A turn counts as hidden if another text in its place changes
    nothing.

    Args:
        prompt, answer: the conversation; either may be empty.
        render: function from turns to the text that the chat template writes for them.
        whole: this text for the conversation, if it was rendered already.
    """
    turns = [*prompt, *answer]
    last = {len(prompt) - 1, len(turns) - 1}
    whole = render(turns) if whole is None else whole
    for i, turn in enumerate(turns):
        other = _unlike(turn)
        # Some templates write only the calls of a turn that calls tools.
        if other == turn or turn.get("tool_calls") or (i not in last and turn["role"] in KNOWN_ROLES):
            continue
        if render([*turns[:i], other, *turns[i + 1 :]]) == whole:
            if turn["role"] not in KNOWN_ROLES:
                return f"the chat template leaves out turns of the role {turn['role']!r}"
            return (
                f"the chat template does not show the text of the role {turn['role']!r}, as templates for images may "
                "read content only if it is a list of parts: take a chat template for plain text"
            )
    return None


def prompt_problem(tokenizer: PreTrainedTokenizerBase, prompt: Turns, **template_kwargs: Any) -> str | None:
    """Return why the chat template cannot ask a prompt (it refuses it or leaves out its text), or `None` if it can."""
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True, **template_kwargs)
    try:
        return hidden_text(prompt, [], cast(Any, render))
    except TemplateError as error:
        return f"it is refused by the chat template: {error}"


def _cut_answer(prompt: list[int], whole: list[int], ends: Collection[int]) -> EncodedAnswer | str:
    """Split a conversation's tokens into prompt and answer, and drop the tokens after the end of turn.

    The answer begins, like in SFTTrainer, at the first token in which the conversation differs from the prompt.
    """
    start = common_prefix_length(prompt, whole)
    answer_ends = [i for i, token in enumerate(whole) if i >= start and token in ends]
    ids = whole[: answer_ends[-1] + 1] if answer_ends else whole
    return EncodedAnswer(np.array(ids, dtype=np.int32), start) if len(ids) > start else NO_ANSWER


def copy_template(tokenizer: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase) -> int:
    """Give a tokenizer the chat template, end token and added tokens of `source`, as TRL's `clone_chat_template` does.

    Returns:
        The number of rows that TRL gives to the model's embeddings.
    """
    tokenizer.chat_template, tokenizer.eos_token = source.chat_template, source.eos_token
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in source.added_tokens_decoder.values() if token.content not in known])
    return -(-len(tokenizer.get_vocab()) // ROWS_MULTIPLE) * ROWS_MULTIPLE


def check_system_turn(
    tokenizer: PreTrainedTokenizerBase, need: str, fix: str | None = None, is_answered: bool = True
) -> None:
    """Refuse a chat template that does not show a system turn to the model.

    Args:
        tokenizer: tokenizer whose `chat_template` is tried.
        need: name of the feature that needs a system turn, for the error message.
        fix: advice that ends the error message; by default advice for a trainer.
        is_answered: False if the template is used for prompts alone, and never with an answer.

    Raises:
        ValueError: there is no chat template, or it refuses or drops a system turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        fix = fix or "set `chat_template_path`, or take the tokenizer of an instruct model"
        raise ValueError(
            f"{need} needs a chat template with a system turn, and this tokenizer has no chat template: {fix}."
        )
    if problem := system_turn_problem(tokenizer, is_answered):
        fix = fix or "set `chat_template_path` to a template that keeps the system turn"
        raise ValueError(f"{need} needs a chat template with a system turn, and this one {problem}: {fix}.")


def system_turn_problem(tokenizer: PreTrainedTokenizerBase, is_answered: bool = True) -> str | None:
    """Return what the chat template does instead of showing a system turn, or `None` if it shows it.

    Some templates write the system text only while a user turn is the last one (Mistral-7B-Instruct-v0.3). The model
    then reads it in a prompt, and not in a row with an answer.

    Args:
        tokenizer: tokenizer with a chat template.
        is_answered: True tries a conversation with an answer as well, False a prompt alone.
    """
    probe = "Answer in one word."
    turns = [{"role": "system", "content": probe}, {"role": "user", "content": "Which?"}]
    try:
        if probe not in tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True):
            return "drops it"
        turns.append({"role": "assistant", "content": "This."})
        if is_answered and probe not in tokenizer.apply_chat_template(turns, tokenize=False):
            return "drops it once an answer follows"
    except TemplateError as error:
        return f"refuses it ({error})"
    return None


def system_turn_span(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, ids: Sequence[int], **template_kwargs: Any
) -> tuple[int, int] | None:
    """Find the tokens of a conversation that come from its system turn.

    Everything before the text of the next turn counts as the system turn: markers, tools and other text from the
    template, and the role marker of the next turn. Some templates put the system text after the text of another turn
    (into the last user turn). The span is then the system text alone. To find the span, the text of the system turn,
    and then that of the other turns, is changed, and the tokens of the changed conversation are compared with `ids`.
    So nothing has to be known about the template.

    Args:
        tokenizer: tokenizer that made `ids`.
        turns: the conversation, the system turn first.
        ids: tokens of the conversation.
        template_kwargs: further arguments that `apply_chat_template` got (`tools`, `chat_template`, …).

    Returns:
        Start and end of the span, or `None` if no token comes from the system text.

    Raises:
        ValueError: `ids` differ from the tokens that the chat template gives for this conversation, or no token comes
            from its other turns.
    """

    def render(turns: Turns) -> list[int]:
        return list(tokenizer.apply_chat_template(list(turns), **template_kwargs)["input_ids"])

    system, *others = turns
    ids = list(ids)
    if render(turns) != ids:
        raise ValueError(
            "the tokens of a training row are not what the chat template makes of its turns, so nobody can tell which "
            "are its system turn's: let the trainer tokenise the rows, with the tokenizer's own chat template."
        )
    changed = render([_unlike(system), *others])
    start = common_prefix_length(ids, changed)
    end = len(ids) - common_prefix_length(ids[::-1], changed[::-1])
    if end <= start:
        return None
    others_start = common_prefix_length(ids, render([system, *map(_unlike, others)]))
    if others and others_start == len(ids):
        raise ValueError(
            f"the chat template leaves out turns of the roles {sorted({turn['role'] for turn in others})}, so a "
            "training row is its system turn alone. SFTTrainer renames no role: name them 'user' and 'assistant'."
        )
    return (0, max(end, others_start)) if start < others_start else (start, end)


def shared_tokens(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]], text: str) -> list[int]:
    """Return the longest sequence of tokens that stands in all rows and ends with a text.

    The text's last character may be missing, since a token may hold this character and more. Spaces do not count.

    Args:
        tokenizer: tokenizer that made the rows.
        rows: tokens of each row, which hold the text.
        text: the text that is looked for.

    Returns:
        Token ids, or an empty list if the rows do not write the text with the same tokens.
    """
    wanted = "".join(text.split())[:-1]

    def lacks(ids: Sequence[int]) -> bool:
        return wanted not in "".join(tokenizer.decode(ids).split())

    # Beginnings of the rows, up to the end of the text, by their lengths. Rows with a known beginning are not decoded.
    heads: dict[int, set[tuple[int, ...]]] = {}
    for ids in set(map(tuple, rows)):
        if not any(ids[:length] in found for length, found in heads.items()):
            end = bisect_left(range(len(ids)), True, key=lambda n: not lacks(ids[:n]))
            heads.setdefault(end, set()).add(ids[:end])
    ends = [head[::-1] for found in heads.values() for head in found]
    shared = reduce(lambda a, b: a[: common_prefix_length(a, b)], ends)[::-1]
    return [] if lacks(shared) else list(shared)


def is_default_system_turn(tokenizer: PreTrainedTokenizerBase, turns: Turns, **template_kwargs: Any) -> bool:
    """Return True if the system turn of `turns` is the default that the template adds if no system turn is given."""
    try:
        without = tokenizer.apply_chat_template(list(turns[1:]), tokenize=False, **template_kwargs)
    except TemplateError:
        return False  # the template requires a system turn, so it has no default one
    return without == tokenizer.apply_chat_template(list(turns), tokenize=False, **template_kwargs)


def _unlike(turn: dict[str, Any]) -> dict[str, Any]:
    """Return the turn with its text, or the text of each of its parts, replaced by a single letter.

    The old text neither begins nor ends with this letter, so the tokens of the two texts differ at both ends.
    """
    content = turn.get("content")
    if isinstance(content, list):  # a list of text parts and, for example, images
        is_text = [isinstance(part, dict) and bool(part.get("text")) for part in content]
        return {**turn, "content": [{**part, "text": _unlike_text(part["text"])} if is_changed else part
                                    for part, is_changed in zip(content, is_text, strict=True)]}  # fmt: skip
    return {**turn, "content": _unlike_text(content)} if isinstance(content, str) else turn


def _unlike_text(text: str) -> str:
    ends = (text.strip()[:1], text.strip()[-1:])
    return next(letter for letter in "ABC" if letter not in ends)
