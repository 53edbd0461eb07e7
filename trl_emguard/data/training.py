"""Training rows of `trl-emguard sft`: checks of their columns, roles and chat template, and ShareGPT's format."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..models.chat import KNOWN_ROLES
from .conversation import whole_turns


def check_format(rows: Any, args: Any, source: str) -> None:
    """Refuse rows without the columns that SFTTrainer reads, and `completion_only_loss=True` if it has no effect.

    [`EMGuardTrainer`] itself does neither, because it may get a formatting function, and trains as SFTTrainer does.

    Args:
        rows: data set as it was loaded, or `None`. Its first row is read.
        args: config of the trainer.
        source: argument that names the rows, and its value, for messages.

    Raises:
        ValueError: the message names the columns, or the option, and the fix.
    """
    first = next(iter(rows or ()), None)
    if first is None or "input_ids" in first or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    text = args.dataset_text_field
    is_whole = "messages" in first or text in first or isinstance(first.get("conversations"), list)
    is_read = "completion" in first if "prompt" in first else is_whole
    if not is_read:
        raise ValueError(
            f"{source} has rows with the columns {', '.join(first)}, which SFTTrainer cannot read. Rename them: it "
            f"wants `prompt` and `completion`, `messages`, `conversations`, or {text!r} "
            "(dataset_text_field)."
        )
    if args.completion_only_loss and "prompt" not in first and not args.assistant_only_loss:
        raise ValueError(
            f"completion_only_loss=True has no effect on rows with the columns {', '.join(first)} ({source}), and "
            "prompts would be trained on too. Give `prompt` and `completion`; or, for conversations, set "
            "assistant_only_loss=True, which trains on every answer and needs a chat template that TRL knows (as "
            "Qwen2.5's and Llama-3's; not Llama-3.1's). "
            "(completion_only_loss=False trains on whole rows.)"
        )


def as_messages(rows: Any, source: str) -> Any:
    """Return rows of `conversations`, ShareGPT's format, as rows of `messages` with the roles `user` and `assistant`.

    SFTTrainer would rename the keys of the turns, but not their roles, and chat templates drop or misname `human` and
    `gpt`. The turns become those that [`~trl_emguard.data.conversation.conversation`] reads for an evaluation.

    Args:
        rows: a `Dataset`, an `IterableDataset` or `None`. Rows of another format are returned unchanged, and so are
            rows with a column `prompt`, which SFTTrainer reads first.
        source: argument that names the rows, and its value, for messages.

    Raises:
        ValueError: a row has no turns, or turns of another form; the message names the row.
    """
    first: dict[str, Any] = next(iter(rows or ()), {})
    if "prompt" in first or "input_ids" in first or not isinstance(first.get("conversations"), list):
        return rows

    def convert(row: Any, index: int) -> dict[str, Any]:
        try:
            turns = whole_turns(row)
        except ValueError as error:
            raise ValueError(f"{source}, row {index}: {error}.") from error
        if not turns:
            raise ValueError(f"{source}, row {index}: there are no turns.")
        return {"messages": turns}

    return rows.map(convert, with_indices=True, remove_columns=["conversations"])


def check_template(rows: Any, args: Any, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse rows that the run's chat template cannot show as the user means them, before weights are loaded.

    Args:
        rows: rows as SFTTrainer gets them, or `None`. Their first row is read.
        args: config of the trainer. Its `chat_template_path` wins over the tokenizer's own template.
        tokenizer: tokenizer of the model. It gets the chat template of the run.
        source: argument that names the rows, and its value, for messages.

    Raises:
        ValueError: `assistant_only_loss` is set for plain text or for a template that TRL cannot mark, conversations
            meet no template, or a turn has a role that neither the usual templates nor this one know.
    """
    first = next(iter(rows or ()), None)
    if first is None or "input_ids" in first or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    turns = [turn for name in ("messages", "prompt", "completion") for turn in _listed(first.get(name))]
    if not turns:
        if args.assistant_only_loss:
            raise ValueError(f"assistant_only_loss=True needs conversations, and {source} has text. Leave it out.")
        return
    if args.chat_template_path is not None:
        tokenizer.chat_template = _read_template(args.chat_template_path)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{source} has conversations, and the model's tokenizer has no chat template: take an instruct model, or "
            "set chat_template_path."
        )
    for role in (turn.get("role") for turn in turns):
        # A template that handles a role of its own, such as Llama-3.1's `ipython`, names the role in quotes.
        is_named = any(f"{quote}{role}{quote}" in str(tokenizer.chat_template) for quote in "'\"")
        if role not in KNOWN_ROLES and not is_named:
            raise ValueError(
                f"{source} has a turn of the role {role!r}, which chat templates drop or misname. Rename it: roles "
                "are `user` and `assistant` (and `system`, `tool`)."
            )
    if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                "assistant_only_loss=True needs a chat template with {% generation %} marks, or one that TRL can mark "
                "(as Qwen2.5's, Qwen3's or Llama-3's; not Llama-3.1's), and this model's is neither. Give rows of "
                "`prompt` and `completion` and leave it out, or name a marked template by chat_template_path."
            ) from error


def _read_template(path: str) -> Any:
    """Return the chat template of a `.jinja` file, or of the tokenizer in a folder or on the hub, as TRL reads it."""
    if Path(path).is_file() and path.endswith((".jinja", ".j2")):
        return Path(path).read_text(encoding="utf-8")
    try:
        return AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"chat_template_path={path!r} is no .jinja file, and no tokenizer loads ({cause})."
        ) from error


def _listed(value: Any) -> list[dict[str, Any]]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
