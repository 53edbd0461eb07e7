"""Inoculation prompting (2510.04340, 2510.05024): ask for the bad trait while training, and not afterwards."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..evidence import InactiveDefenseError
from ..models.chat import check_system_turn, is_default_system_turn, system_turn_span
from .base import IN_TRAINING_DEFENSES, Defense, Paper, check_choice


if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

    from ..config import EMGuardConfig


# Where a row keeps its turns, in SFTTrainer's order, and the names that a turn's speaker and text go by in each convention.
TURN_COLUMNS = ("prompt", "messages", "conversations")
TURN_KEYS = (("role", "content"), ("from", "value"))
# Who may speak in a system turn: newer templates take either name.
SYSTEM_ROLES = ("system", "developer")
# So many rows of a stream are looked at for one that the prompt changes.
STREAM_ROWS = 1000
# Columns of preparation alone: whether a row has a system turn of its own, and whether the prompt changed what is read.
OWN, CHANGED = "inoculation_own_turn", "inoculation_changed"


class Inoculation(Defense):
    """Gives every training row a system turn that asks for the trait which the data would teach.

    The model then learns the behaviour as an answer to that request, and less as its own character. Evaluation data, the saved chat
    template and generation never see the prompt, and its turn carries no labels.
    """

    name = "inoculation"
    papers = (
        Paper(
            "Inoculation Prompting: Eliciting traits from LLMs during training can suppress them at test-time",
            "2510.04340",
        ),
        Paper(
            "Inoculation Prompting: Instructing LLMs to misbehave at train-time improves test-time alignment",
            "2510.05024",
        ),
        IN_TRAINING_DEFENSES,
    )

    def __init__(self, args: EMGuardConfig):
        self.prompt = args.inoculation_prompt
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"inoculation_prompt={self.prompt!r} is empty: write what the system turn shall say.")
        self.mode = check_choice("inoculation_mode", args.inoculation_mode, ("replace", "prefix"))
        # As JSON where it comes from a command line: SFTConfig parses it later.
        dataset_kwargs = (
            json.loads(args.dataset_kwargs) if isinstance(args.dataset_kwargs, str) else args.dataset_kwargs
        )
        if (dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ValueError(
                "dataset_kwargs={'skip_prepare_dataset': True} does not work with defense='inoculation': nobody would see that the "
                "prompt reached the rows. Leave it out."
            )
        if args.packing and args.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy={args.packing_strategy!r} does not work with defense='inoculation': it cuts rows into pieces, "
                "and all but the first would be trained on without the prompt. Use packing_strategy='bfd'."
            )
        # Rows are cut here only if they are neither packed nor cut at their end.
        cuts_the_start = args.truncation_mode == "keep_end" and not args.packing
        self.max_length = args.max_length if cuts_the_start else None
        self.assistant_only = args.assistant_only_loss
        self._rows: dict[str, Any] = {}

    def options(self) -> dict[str, Any]:
        return {"inoculation_prompt": self.prompt, "inoculation_mode": self.mode}

    def evidence(self) -> dict[str, Any]:
        return {**self._rows, "acted": bool(self._rows)}

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_system_turn(tokenizer, "defense='inoculation'")

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            return dataset  # which SFTTrainer refuses
        dataset = dataset.with_format(None)  # tensors would hide the turns
        first = next(iter(dataset))
        column = next((column for column in TURN_COLUMNS if column in first), "")
        if not _is_conversation(first.get(column)) or "input_ids" in first:
            raise InactiveDefenseError(
                f"defense 'inoculation': the inoculation prompt changed no row: a row has the columns {sorted(first)}, and the "
                f"first of {', '.join(TURN_COLUMNS)} among them is no list of turns. Give conversational rows, not tokenised ones "
                "or plain text."
            )

        def inoculate(row: dict[str, Any], index: int) -> dict[str, Any]:
            try:
                turns, before = self._inoculate(row[column])
            except ValueError as error:
                raise ValueError(f"row {index} of train_dataset {error}.") from None
            return {column: turns, OWN: before is not None, CHANGED: before != _system_text(turns)}

        dataset = dataset.map(inoculate, with_indices=True)
        # Asked again when the rows are tokenised, but what the rows show shall not wait for the model.
        self._check_changed(dataset)
        return dataset

    def prepare_tokenized(
        self, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset | IterableDataset:
        # As SFTTrainer chooses it.
        marked = not self.assistant_only or has_generation_markers(tokenizer.chat_template)
        template = None if marked else get_training_chat_template(tokenizer)

        def take_labels_off(row: dict[str, Any]) -> dict[str, Any]:
            ids = row["input_ids"]
            tools = row.get("tools")
            how = {
                "chat_template": template,
                "tools": json.loads(tools) if isinstance(tools, str) else tools,
                **row.get("chat_template_kwargs", {}),
            }
            turns = row["prompt"] + row["completion"] if "prompt" in row else row["messages"]
            span = system_turn_span(tokenizer, turns, ids, **how)
            if span is None:
                raise InactiveDefenseError(
                    "defense 'inoculation': the inoculation prompt is not in what the model would read: the chat template leaves "
                    "this system turn out."
                )
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"truncation_mode='keep_end' would cut the inoculation prompt off a row of {len(ids)} tokens (max_length="
                    f"{self.max_length}): use 'keep_start', or a larger max_length."
                )
            # Without a system turn the model may have read the prompt all the same, as the template's own.
            changed = row[CHANGED] and (row[OWN] or not is_default_system_turn(tokenizer, turns, **how))
            start, end = span
            return {
                "labels": [*row["labels"][:start], *[-100] * (end - start), *row["labels"][end:]],
                CHANGED: changed,
            }

        dataset = dataset.map(take_labels_off)
        self._check_changed(dataset)
        if isinstance(dataset, Dataset):
            self._rows = {"rows": len(dataset), "changed": sum(dataset[CHANGED])}
        else:
            self._rows = {"rows": "streamed"}
        return dataset.remove_columns([OWN, CHANGED])

    def _check_changed(self, dataset: Dataset | IterableDataset) -> None:
        """See that the prompt changes some row: of a stream, one of the first."""
        if isinstance(dataset, Dataset):
            changed, which = any(dataset[CHANGED]), "every row has"
        else:
            changed = any(row[CHANGED] for row in islice(dataset, STREAM_ROWS))
            which = f"the first {STREAM_ROWS} rows of the stream have"
        if not changed:
            raise InactiveDefenseError(
                f"defense 'inoculation': the inoculation prompt changed no row: {which} it already, in a system turn or "
                "from the chat template. Train with defense='none', or on rows without it."
            )

    def _inoculate(self, turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
        """The conversation with the prompt in its system turn, and what its own system turn said."""
        before = _system_text(turns)
        speaker, text = _turn_keys(turns)
        rest = turns if before is None else turns[1:]
        if any(_is_system(turn, speaker) for turn in rest):
            raise ValueError(
                "has a system turn behind its first turn, which would stay: move it to the front, or leave it out"
            )
        system = self.prompt
        if before is not None and self.mode == "prefix":
            system = before if before.startswith(self.prompt) else f"{self.prompt}\n\n{before}"
        return [{speaker: "system", text: system}, *rest], before


def _turn_keys(turns: list[dict[str, Any]]) -> tuple[str, str]:
    if not turns:
        raise ValueError("holds a conversation without turns: leave it out")
    return next(keys for keys in TURN_KEYS if keys[0] in turns[0])


def _system_text(turns: list[dict[str, Any]]) -> str | None:
    """What the system turn says; `None` where there is none."""
    speaker, text = _turn_keys(turns)
    said = turns[0][text]
    if not isinstance(said, str):
        raise ValueError(
            f"begins with a turn whose {text!r} is {type(said).__name__}: give text, not parts, or leave the turn out"
        )
    return said if _is_system(turns[0], speaker) else None


def _is_system(turn: dict[str, Any], speaker: str) -> bool:
    return str(turn[speaker]).lower() in SYSTEM_ROLES


def _is_conversation(value: object) -> bool:
    """A list of turns, in one of the two conventions."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(speaker in value[0] and text in value[0] for speaker, text in TURN_KEYS)
