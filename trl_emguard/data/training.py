"""Training rows of `trl-emguard sft`: checks of their columns, roles and chat template, and ShareGPT's format."""

from pathlib import Path
from typing import Any, TypeAlias, cast

from datasets import Dataset, Features, Json, List
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import prepare_multimodal_messages

from ..models.chat import KNOWN_ROLES, hidden_text, template_arguments
from .conversation import usual_role, whole_turns


ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


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


def fill_template_kwargs(rows: Any) -> Any:
    """Return rows with an empty dict in place of each `chat_template_kwargs` that is `None`.

    A column holds `None` for rows that were written without it. SFTTrainer would fail on these rows with a TypeError.

    Args:
        rows: a `Dataset`, an `IterableDataset` or `None`. Rows without such a column are returned unchanged.
    """
    name = "chat_template_kwargs"
    if name not in next(iter(rows or ()), {}):
        return rows
    features = None
    if isinstance(rows, Dataset):
        if all(value is not None for value in rows[name]):
            return rows
        # With the column's own type, an empty dict would become one whose values are all `None`.
        features = Features({**rows.features, name: Json()})
    return rows.map(lambda row: {name: row.get(name) or {}}, features=features)


def as_messages(rows: Any, processing_class: ProcessingClass, source: str) -> Any:
    """Return rows of `conversations`, ShareGPT's format, as rows of `messages` with the roles `user` and `assistant`.

    SFTTrainer would rename the keys of the turns, but not their roles, and chat templates drop or misname `human` and
    `gpt`. The turns become those that [`~trl_emguard.data.conversation.conversation`] reads for an evaluation.

    Args:
        rows: a `Dataset`, an `IterableDataset` or `None`. Rows of another format are returned unchanged, and so are
            rows with a column `prompt`, which SFTTrainer reads first.
        processing_class: tokenizer or processor of the run, with the run's chat template.
        source: argument that names the rows, and its value, for messages.

    Raises:
        ValueError: a row has no turns, turns of another form, or a turn of a role that the chat template leaves out;
            the message names the row. A stream raises it once the row is read.
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
        if any(turn["role"] not in KNOWN_ROLES for turn in turns):
            _check_shown({**row, "messages": turns}, processing_class, f"{source}, row {index}")
        return {"messages": turns}

    features = None
    if isinstance(rows, Dataset):
        # `map` would infer the type of all turns from its first batch, and fail at a key that only later turns have.
        # Stored as JSON, each turn keeps its own keys.
        features = Features({**rows.features, "messages": List(Json())})
        del features["conversations"]
    return rows.map(convert, with_indices=True, remove_columns=["conversations"], features=features)


def check_template(rows: Any, args: Any, processing_class: ProcessingClass, source: str) -> None:
    """Refuse rows that the run's chat template cannot show as the user means them, before weights are loaded.

    Args:
        rows: rows as SFTTrainer gets them, or `None`. Their first row is read. Rows with images are not checked.
        args: config of the trainer.
        processing_class: tokenizer or processor of the run, with the run's chat template.
        source: argument that names the rows, and its value, for messages.

    Raises:
        ValueError: `assistant_only_loss` is set for plain text or for a template that TRL cannot mark, conversations
            meet no template, or the template refuses the first row, or leaves out or misnames a turn of it.
    """
    first: dict[str, Any] = next(iter(rows or ()), {})
    if first.keys() & {"input_ids", "image", "images"} or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    if not any(_turns(first.get(name)) for name in ("messages", "prompt", "completion")):
        if first and args.assistant_only_loss:
            raise ValueError(f"assistant_only_loss=True needs conversations, and {source} has text. Leave it out.")
        return
    if not processing_class.chat_template:
        raise ValueError(
            f"{source} has conversations, and the model's tokenizer has no chat template: take an instruct model, or "
            "set chat_template_path."
        )
    _check_shown(first, processing_class, f"{source}, first row")
    if args.assistant_only_loss and not has_generation_markers(processing_class.chat_template):
        try:
            get_training_chat_template(processing_class)
        except ValueError as error:
            raise ValueError(
                "assistant_only_loss=True needs a chat template with {% generation %} marks, or one that TRL can mark "
                "(as Qwen2.5's, Qwen3's or Llama-3's; not Llama-3.1's), and this model's is neither. Give rows of "
                "`prompt` and `completion` and leave it out, or name a marked template by chat_template_path."
            ) from error


def _check_shown(row: dict[str, Any], processing_class: ProcessingClass, where: str) -> None:
    """Refuse a conversation that the chat template refuses, or leaves out or misnames a turn of.

    Raises:
        ValueError: the message begins with `where`.
    """
    try:
        problem = _problem(row, processing_class)
    except (TypeError, ValueError, TemplateError) as error:
        problem = f"the chat template refuses it: {' '.join(str(error).split())[:200]}"
    if problem is not None:
        raise ValueError(
            f"{where}: {problem}. Roles are `user` and `assistant` (and `system`, `tool`): rename others, or set "
            "chat_template_path."
        )


def _problem(row: dict[str, Any], processing_class: ProcessingClass) -> str | None:
    if "prompt" in row:  # SFTTrainer reads it first
        prompt, answer = _turns(row["prompt"]), _turns(row.get("completion"))
    else:
        prompt, answer = _turns(row["messages"])[:-1], _turns(row["messages"])[-1:]
    turns = [*prompt, *answer]
    if not all(isinstance(turn.get("role"), str) for turn in turns):
        return "its turns are not all of `role` and `content`"

    def render(turns: list[dict[str, Any]]) -> str:
        is_processor = isinstance(processing_class, ProcessorMixin)
        given: Any = prepare_multimodal_messages(turns) if is_processor else turns  # as SFTTrainer does
        return cast(str, processing_class.apply_chat_template(given, tokenize=False, **template_arguments(row)))

    misnamed = [turn["role"] for turn in turns if usual_role(turn["role"]) != turn["role"]]
    # ChatML's templates write any role as it is, so that `human` is a speaker that the model does not know. Gemma's
    # template writes `assistant` as `model`, so that both names of the role give the same text.
    if misnamed and render([{**turn, "role": usual_role(turn["role"])} for turn in turns]) != render(turns):
        return f"the chat template misnames a turn of the role {misnamed[0]!r}, or leaves it out"
    return hidden_text(prompt, answer, render)


def read_template(path: str) -> Any:
    """Return the chat template of a `.jinja` file, or of the tokenizer in a folder or on the hub, as TRL reads it."""
    if Path(path).is_file() and path.endswith((".jinja", ".j2")):
        try:
            return Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template_path={path!r} is not UTF-8 text ({error}): save it as UTF-8.") from error
    try:
        return AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"chat_template_path={path!r} is no .jinja file, and no tokenizer loads ({cause})."
        ) from error


def _turns(value: Any) -> list[dict[str, Any]]:
    return [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
