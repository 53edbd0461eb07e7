"""Inoculation prompting (2510.04340, 2510.05024): ask for the bad trait while training, and not afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..chat import check_system_turn, system_turn_length
from ..evidence import InactiveDefenseError
from .base import IN_TRAINING_DEFENSES, Defense, Paper, check_choice


if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

    from ..config import EMGuardConfig


# Where a row keeps its turns, and the names that a turn's speaker and text go by in each convention.
TURN_COLUMNS = ("messages", "prompt", "conversations")
TURN_KEYS = (("role", "content"), ("from", "value"))


class Inoculation(Defense):
    """Gives every training row a system turn that asks for the trait which the data would teach.

    The model then learns the behaviour as an answer to that request, and less as its own character. Evaluation data, the saved chat
    template and generation never see the prompt, and its turn carries no labels.
    """

    name = "inoculation"
    papers = (
        Paper("Inoculation Prompting: Eliciting traits from LLMs during training can suppress them at test-time", "2510.04340"),
        Paper("Inoculation Prompting: Instructing LLMs to misbehave at train-time improves test-time alignment", "2510.05024"),
        IN_TRAINING_DEFENSES,
    )

    def __init__(self, args: EMGuardConfig):
        self.prompt = args.inoculation_prompt
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"inoculation_prompt={self.prompt!r} is empty: write what the system turn shall say.")
        self.mode = check_choice("inoculation_mode", args.inoculation_mode, ("replace", "prefix"))
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ValueError(
                "dataset_kwargs={'skip_prepare_dataset': True} does not work with defense='inoculation': nobody would see that the "
                "prompt reached the rows. Leave it out."
            )
        # Rows are cut here only if they are neither packed nor cut at their end.
        cuts_the_start = args.truncation_mode == "keep_end" and not args.packing
        self.max_length = args.max_length if cuts_the_start else None
        self._rows: dict[str, Any] = {}

    def options(self) -> dict[str, Any]:
        return {"inoculation_prompt": self.prompt, "inoculation_mode": self.mode}

    def evidence(self) -> dict[str, Any]:
        return {**self._rows, "acted": bool(self._rows)}

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_system_turn(tokenizer, "defense='inoculation'")

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        first = next(iter(dataset))
        column = next((c for c in TURN_COLUMNS if _is_conversation(first.get(c))), None)
        if column is None or "input_ids" in first:
            raise InactiveDefenseError(
                f"defense 'inoculation': the inoculation prompt changed no row: a row has the columns {sorted(first)}, and none of "
                f"{', '.join(TURN_COLUMNS)} is a list of turns. Give conversational rows, not tokenised ones or plain text."
            )
        # A stream is judged by its first row, and each of its rows once more when it is tokenised.
        rows = dataset.select_columns([column]) if isinstance(dataset, Dataset) else [first]
        changed = sum(self._system_turn(row[column]) != _system_text(row[column]) for row in rows)
        if not changed:
            raise InactiveDefenseError(
                "defense 'inoculation': the inoculation prompt changed no row: every row has it already. Train with "
                "defense='none', or on the rows without it."
            )
        self._rows = {"rows": len(rows), "changed": changed} if isinstance(dataset, Dataset) else {"rows": "streamed"}
        return dataset.map(lambda row: {column: self._inoculate(row[column])})

    def prepare_tokenized(
        self, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset | IterableDataset:
        def take_labels_off(row: dict[str, Any]) -> dict[str, Any]:
            ids = row["input_ids"]
            turns = next(row[column] for column in TURN_COLUMNS if _is_conversation(row.get(column)))
            length = system_turn_length(tokenizer, ids, _system_text(turns) or self.prompt)
            if length is None:
                raise InactiveDefenseError(
                    "defense 'inoculation': the inoculation prompt is not in what the model would read: the chat template leaves "
                    "this system turn out."
                )
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"truncation_mode='keep_end' would cut the inoculation prompt off a row of {len(ids)} tokens (max_length="
                    f"{self.max_length}): use 'keep_start', or a larger max_length."
                )
            return {"labels": [-100] * length + row["labels"][length:]}

        return dataset.map(take_labels_off)

    def _inoculate(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation with the prompt in its system turn."""
        speaker, text = _turn_keys(turns)
        rest = turns if _system_text(turns) is None else turns[1:]
        return [{speaker: "system", text: self._system_turn(turns)}, *rest]

    def _system_turn(self, turns: list[dict[str, Any]]) -> str:
        """What the system turn of a conversation shall say."""
        before = _system_text(turns)
        if before is None or self.mode == "replace":
            return self.prompt
        return before if before.startswith(self.prompt) else f"{self.prompt}\n\n{before}"


def _turn_keys(turns: list[dict[str, Any]]) -> tuple[str, str]:
    if not turns:
        raise ValueError("a training row holds a conversation without turns: leave it out.")
    return next(keys for keys in TURN_KEYS if keys[0] in turns[0])


def _system_text(turns: list[dict[str, Any]]) -> str | None:
    """What the system turn says; `None` where there is none."""
    speaker, text = _turn_keys(turns)
    return turns[0][text] if turns[0][speaker] == "system" else None


def _is_conversation(value: object) -> bool:
    """A list of turns, in one of the two conventions."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(speaker in value[0] and text in value[0] for speaker, text in TURN_KEYS)
