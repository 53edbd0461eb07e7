"""The system turn of a chat template: whether there is one, and where it ends."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


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
        raise ValueError(f"{need} needs a chat template with a system turn, and this one drops it: take another template.")


def system_turn_length(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], system: str) -> int | None:
    """How many of the first tokens of a conversation belong to its system turn.

    Where the template gives the turn markers of its own, they count, the end-of-turn token included. Where it puts the
    text into the first user turn, it is the tokens up to the end of the text.

    Args:
        tokenizer: the one that made `ids`.
        ids: a tokenised conversation.
        system: the text of its system turn.

    Returns:
        The number of tokens, or `None` if the text is not in the conversation.
    """

    def holds(count: int) -> bool:
        return system.strip() in tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)

    if not holds(len(ids)):
        return None
    try:
        alone = tokenizer.apply_chat_template([{"role": "system", "content": system}])["input_ids"]
        if list(ids[: len(alone)]) == list(alone) and holds(len(alone)):
            return len(alone)
    except TemplateError:
        pass  # a template that wants a user turn
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
