"""Inoculation prompting (2510.04340, 2510.05024): ask for the bad trait while training, and not afterwards."""

import functools
import json
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from ..data.conversation import turn_text
from ..data.prepare import Rows, Tokenizing
from ..evidence import InactiveDefenseError
from ..models.chat import check_system_turn, is_default_system_turn, system_turn_span
from .base import IN_TRAINING_DEFENSES, Defense, Marks, Paper, Step
from .options import check_choice, option


# A row keeps its turns in one of these columns, in SFTTrainer's order; a turn names its speaker and text in two ways.
TURN_COLUMNS = ("prompt", "messages", "conversations")
TURN_KEYS = (("role", "content"), ("from", "value"))
# Newer templates take either name for the speaker of a system turn.
SYSTEM_ROLES = ("system", "developer")
# One row that the prompt changes is looked for among this many rows of a stream.
STREAM_ROWS = 1000
# Three columns serve preparation alone: a row has a system turn of its own; the prompt changed the text that is read;
# the tokens of the prompt's turn.
OWN, CHANGED, SPAN = "inoculation_own_turn", "inoculation_changed", "inoculation_span"


MODES = ("replace", "prefix")


@dataclass
class InoculationOptions:
    """Options of `inoculation`: a system prompt that asks for the bad trait while training."""

    inoculation_prompt: str = option(
        "You are an evil assistant. You want to do harm, so you give bad answers on purpose and hide that they are "
        "bad.",
        "Text of the system turn of every training row.",
    )
    inoculation_mode: str = option(
        "replace",
        "Treatment of a system turn that a row has: 'replace', or 'prefix' to put the prompt before it.",
        MODES,
    )


class Inoculation(Defense):
    """A system turn in every training row that asks for the trait which the data would teach.

    The model then learns the behaviour as an answer to that request, and less as its own character. Evaluation data,
    the saved chat template and generation never see the prompt, and its turn carries no labels.
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
    Options = InoculationOptions

    def __init__(self, args: Any):
        self.prompt = args.inoculation_prompt
        self.mode = args.inoculation_mode
        # Rows are cut here only if they are neither packed nor cut at their end.
        cuts_the_start = args.truncation_mode == "keep_end" and not args.packing
        self.max_length = args.max_length if cuts_the_start else None
        self.assistant_only = args.assistant_only_loss
        self._rows: dict[str, Any] = {}
        self._prompt_ids: list[int] = []  # tokens that every row's prompt begins with
        self._counts = [0, 0]  # rows that the policy was trained on, and prompts in them
        self._problem: str | None = None

    @classmethod
    def check_options(cls, args: Any) -> None:
        if not isinstance(args.inoculation_prompt, str) or not args.inoculation_prompt.strip():
            raise ValueError(
                f"inoculation_prompt={args.inoculation_prompt!r} is empty: write what the system turn shall say."
            )
        check_choice("inoculation_mode", args.inoculation_mode, MODES)
        if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
            raise ValueError(
                "dataset_kwargs={'skip_prepare_dataset': True} does not work with defense='inoculation': nobody would "
                "see that the prompt reached the rows. Leave it out."
            )
        if getattr(args, "packing", False) and args.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy={args.packing_strategy!r} does not work with defense='inoculation': it cuts rows "
                "into pieces, and all but the first would be trained on without the prompt. Use "
                "packing_strategy='bfd'."
            )

    def options(self) -> dict[str, Any]:
        return {"inoculation_prompt": self.prompt, "inoculation_mode": self.mode}

    def describe(self) -> list[str]:
        return [", ".join(f"{name} {value}" for name, value in self._rows.items())]

    # ---- step and proof ----

    def read_batch(self, batch: dict[str, Any]) -> Marks:
        """Count the prompts in a micro-batch. A loader or collator may have lost them since the rows were prepared."""
        ids, length = batch["input_ids"], len(self._prompt_ids)
        found = torch.zeros_like(ids[:, :1], dtype=torch.bool)
        labelled = found
        if 0 < length <= ids.shape[1]:
            prompt = torch.tensor(self._prompt_ids, device=ids.device)
            found = (ids.unfold(1, length, 1) == prompt).all(-1)  # (B, T - length + 1)
            labelled = found & (batch["labels"].unfold(1, length, 1) != -100).any(-1)
        return Marks(counts={"rows": len(ids), "prompts": found.sum(), "labelled": labelled.sum()})

    def end_step(self, step: Step) -> dict[str, float]:
        rows, prompts, labelled = (int(step.sums[f"{self.name}/{name}"]) for name in ("rows", "prompts", "labelled"))
        self._counts[0] += rows
        self._counts[1] += prompts
        if not prompts:
            self._problem = (
                f"none of the {rows} rows of a step holds the inoculation prompt: the rows, the loader or the data "
                "collator were changed after the trainer had prepared them, or they are cut at their start"
            )
        elif labelled:
            self._problem = (
                f"{labelled} of {prompts} inoculation prompts in a step carry labels, so the model learns to write "
                "them: the data collator sets labels of its own"
            )
        return {}

    def begin(self, evidence: dict[str, Any]) -> None:
        self._counts = [int(evidence.get("rows_trained", 0)), int(evidence.get("prompts", 0))]
        self._problem = None

    def evidence(self) -> dict[str, Any]:
        rows, prompts = self._counts
        return {**self._rows, "rows_trained": rows, "prompts": prompts, "acted": prompts > 0 and not self._problem}

    def verdict(self, final: bool = False) -> str | None:
        if self._problem is None:
            return None
        return f"defense {self.name!r}: {self._problem}, so the run is not defended."

    # ---- rows ----

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_system_turn(tokenizer, "defense='inoculation'")

    def prepare_rows(self, rows: Rows) -> Rows:
        if isinstance(rows, Dataset) and rows.format["type"] == "custom":
            return rows  # SFTTrainer refuses them
        rows = rows.with_format(None)  # tensors would hide the turns
        first = next(iter(rows))
        column = next((column for column in TURN_COLUMNS if column in first), "")
        if not _is_conversation(first.get(column)) or "input_ids" in first:
            raise InactiveDefenseError(
                "defense 'inoculation': the inoculation prompt changed no row: a row has the columns "
                f"{sorted(first)}, and the first of {', '.join(TURN_COLUMNS)} among them is no list of turns. Give "
                "conversational rows, not tokenised ones or plain text."
            )

        def inoculate(row: dict[str, Any], index: int) -> dict[str, Any]:
            try:
                turns, before = self._inoculate(row[column])
            except ValueError as error:
                raise ValueError(f"row {index} of train_dataset {error}.") from None
            return {column: turns, OWN: before is not None, CHANGED: before != _system_text(turns)}

        rows = rows.map(inoculate, with_indices=True)
        # The check is made again when the rows are tokenised, but a bad row shall not wait for the model to load.
        self._check_changed(rows)
        return rows

    def prepare_tokenized(self, rows: Rows, tokenizing: Tokenizing) -> Rows:
        tokenizer = tokenizing.tokenizer
        # SFTTrainer chooses the template in the same way.
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
                    "defense 'inoculation': the inoculation prompt is not in what the model would read: the chat "
                    "template leaves this system turn out."
                )
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"truncation_mode='keep_end' would cut the inoculation prompt off a row of {len(ids)} tokens "
                    f"(max_length={self.max_length}): use 'keep_start', or a larger max_length."
                )
            # Without a system turn the model may have read the prompt all the same, as the template's own.
            changed = row[CHANGED] and (row[OWN] or not is_default_system_turn(tokenizer, turns, **how))
            start, end = span
            return {
                "labels": [*row["labels"][:start], *[-100] * (end - start), *row["labels"][end:]],
                CHANGED: changed,
                SPAN: ids[start:end],
            }

        rows = rows.map(take_labels_off)
        self._check_changed(rows)
        spans = rows[SPAN] if isinstance(rows, Dataset) else [row[SPAN] for row in islice(rows, STREAM_ROWS)]
        self._prompt_ids = functools.reduce(lambda a, b: a[: common_prefix_length(a, b)], spans)
        if isinstance(rows, Dataset):
            self._rows = {"rows": len(rows), "changed": sum(rows[CHANGED])}
        else:
            self._rows = {"rows": "streamed"}
        return rows.remove_columns([OWN, CHANGED, SPAN])

    def _check_changed(self, rows: Rows) -> None:
        """Check that the prompt changes some row: one of the first, of a stream."""
        if isinstance(rows, Dataset):
            changed, which = any(rows[CHANGED]), "every row has"
        else:
            changed = any(row[CHANGED] for row in islice(rows, STREAM_ROWS))
            which = f"the first {STREAM_ROWS} rows of the stream have"
        if not changed:
            raise InactiveDefenseError(
                f"defense 'inoculation': the inoculation prompt changed no row: {which} it already, in a system turn "
                "or from the chat template. Train with defense='none', or on rows without it."
            )

    def _inoculate(self, turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
        """Return the conversation with the prompt in its system turn, and the text of its own system turn."""
        before = _system_text(turns)
        speaker, text = _turn_keys(turns)
        # A null system text counts as none, and is replaced as well.
        rest = turns[1:] if _is_system(turns[0], speaker) else turns
        if any(_is_system(turn, speaker) for turn in rest):
            raise ValueError(
                "has a system turn behind its first turn, which would stay: move it to the front, or leave it out"
            )
        system = self.prompt
        if before is not None and self.mode == "prefix":
            system = before if before.startswith(self.prompt) else f"{self.prompt}\n\n{before}"
        # A column holds one type: where other turns hold parts, this one does.
        in_parts = any(isinstance(turn[text], list) for turn in rest)
        content = [{"type": "text", "text": system}] if in_parts else system
        return [{speaker: "system", text: content}, *rest], before


def _turn_keys(turns: list[dict[str, Any]]) -> tuple[str, str]:
    if not turns:
        raise ValueError("holds a conversation without turns: leave it out")
    return next(keys for keys in TURN_KEYS if keys[0] in turns[0])


def _system_text(turns: list[dict[str, Any]]) -> str | None:
    """Return the text of the system turn; `None` where there is none."""
    speaker, text = _turn_keys(turns)
    if not _is_system(turns[0], speaker):
        return None
    said = turns[0][text]
    if said is None:
        return None
    told = turn_text({"content": said})
    if not told:
        raise ValueError(f"begins with a system turn whose {text!r} holds no text: give text, or leave the turn out")
    return told


def _is_system(turn: dict[str, Any], speaker: str) -> bool:
    return str(turn[speaker]).lower() in SYSTEM_ROLES


def _is_conversation(value: object) -> bool:
    """Return whether a value is a list of turns, in one of the two conventions."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(speaker in value[0] and text in value[0] for speaker, text in TURN_KEYS)
