"""Inoculation prompting (2510.04340, 2510.05024): ask for the bad trait while training, and not afterwards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..data.conversation import is_conversation, is_system, system_text, turn_keys, turn_text
from ..data.prepare import STREAM_ROWS, Rows, Tokenizing
from ..evidence import InactiveDefenseError
from ..models.chat import (
    check_system_turn,
    is_default_system_turn,
    shared_tokens,
    system_turn_span,
    template_arguments,
)
from .base import IN_TRAINING_DEFENSES, Defense, Paper, added_scopes
from .options import check_choice, option
from .step import Marks, Step


# Columns that may contain a row's turns, in the order in which SFTTrainer looks for them.
TURN_COLUMNS = ("prompt", "messages", "conversations")
# Columns that `prepare_tokenized` removes at its end. OWN is true if the user's row had a system turn with text.
# CHANGED is true if the inoculation prompt changed the text that the model reads. Rows that do not get the prompt have
# false in both.
OWN, CHANGED = "inoculation_own_turn", "inoculation_changed"
FLAG = "inoculate"  # column that users add: with `inoculation_rows='flagged'`, only rows with true get the prompt
# Column with a number per token: the token id plus 1 in the system turn that the prompt was put into, and 0 elsewhere.
# `read_batch` compares the tokens of each batch with these numbers, and so finds lost prompts. The column exists with
# `inoculation_rows='flagged'`, and if rows (or later rows of a stream) may write the prompt with different tokens:
# batches then cannot be searched for one sequence.
EXPECTED = "inoculation_tokens"

MODES = ("replace", "prefix")
ALL, FLAGGED = "all", "flagged"


@dataclass
class InoculationOptions:
    """Options of `inoculation`: a system prompt that asks for the bad trait while training."""

    inoculation_prompt: str = option(
        "You are an evil assistant. You want to do harm, so you give bad answers on purpose and hide that they are "
        "bad.",
        "Text of the system turn of the training rows.",
    )
    inoculation_mode: str = option(
        "replace",
        "Treatment of a system turn that a row has: 'replace', or 'prefix' to put the prompt before it.",
        MODES,
    )
    inoculation_rows: str = option(
        ALL,
        "Rows that get the prompt: 'all', or 'flagged' for those whose column `inoculate` is true.",
        (ALL, FLAGGED),
    )


class Inoculation(Defense):
    """A system turn in training rows that asks for the trait which the data would teach.

    The model then learns the behaviour as an answer to that request, and less as its own character. Either all rows
    get the turn, or only the rows that the user has flagged. Evaluation data, the saved chat template and generation
    never get the prompt. The tokens of its turn have no labels.
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
        self.only_flagged = args.inoculation_rows == FLAGGED
        self.token_columns = (EXPECTED,) if self.only_flagged else ()
        # `self.max_length`: longer rows with the prompt are refused, as they would lose their start. `None`: no limit.
        self.max_length = args.max_length if args.truncation_mode == "keep_end" and not args.packing else None
        self.assistant_only = args.assistant_only_loss
        self._rows: dict[str, Any] = {}
        self._prompt_ids: list[int] = []  # tokens up to the end of the prompt, searched for in batches
        self._added: list[str] = []  # scopes (named token sets) of rows that other defenses add; these lack the prompt
        self._counts = {"rows_trained": 0, "prompts": 0, "flagged_trained": 0}  # sums over the run's steps and ranks
        self._problem: str | None = None

    @classmethod
    def check_options(cls, args: Any) -> None:
        if not isinstance(args.inoculation_prompt, str) or not args.inoculation_prompt.strip():
            raise ValueError(
                f"inoculation_prompt={args.inoculation_prompt!r} is empty: write what the system turn shall say."
            )
        check_choice("inoculation_mode", args.inoculation_mode, MODES)
        check_choice("inoculation_rows", args.inoculation_rows, (ALL, FLAGGED))
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

    def options_like(self, then: dict[str, Any], is_on_all_ranks: bool) -> dict[str, Any]:
        # Earlier versions' checkpoints record no `inoculation_rows`, but mean 'all'. For them, 'all' is left out here.
        return {key: value for key, value in self.options().items() if key in then or value != ALL}

    def meet(self, others: Sequence[Defense]) -> None:
        self._added = added_scopes(others)

    def describe(self) -> list[str]:
        return [", ".join(f"{name} {value}" for name, value in self._rows.items())]

    # ---- counts of each step, and evidence ----

    def read_batch(self, batch: dict[str, Any]) -> Marks:
        """Count the prompts in a micro-batch. A loader or collator may have lost them since the rows were prepared."""
        ids, length = batch["input_ids"], len(self._prompt_ids)
        found = torch.zeros_like(ids[:, :1], dtype=torch.bool)
        labelled = found
        if 0 < length <= ids.shape[1]:
            prompt = torch.tensor(self._prompt_ids, device=ids.device)
            found = (ids.unfold(1, length, 1) == prompt).all(-1)  # (B, T - length + 1)
            labelled = found & (batch["labels"].unfold(1, length, 1) != -100).any(-1)
        marks = Marks(counts={"rows": len(ids), "prompts": found.sum(), "labelled": labelled.sum()})
        if self.token_columns:
            marks.counts |= self._read_expected(batch, found)
        return marks

    def _read_expected(self, batch: dict[str, Any], found: torch.Tensor) -> dict[str, torch.Tensor]:
        """Count the prompts that rows must hold (all, intact, with labels), and prompts `found` in other places."""
        if EXPECTED not in batch:
            raise InactiveDefenseError(
                f"defense {self.name!r}: a training batch lacks the column {EXPECTED!r}, which says where its rows "
                "hold the inoculation prompt, so the run is not defended. Do not replace `get_train_dataloader`; pass "
                "`data_collator` to the trainer instead."
            )
        expected, ids = batch.pop(EXPECTED), batch["input_ids"]
        inside = expected > 0
        begins = inside.clone()
        begins[:, 1:] &= ~inside[:, :-1]
        # Each token of a prompt gets the prompt's number in the batch (1, 2, …): a pack may have several prompts.
        number = begins.flatten().cumsum(0) * inside.flatten()

        def prompts_with(mask: torch.Tensor) -> torch.Tensor:
            hits = torch.zeros(len(number) + 1, dtype=torch.long, device=ids.device)
            return hits.index_add_(0, number, (mask & inside).flatten().long()).gt(0).sum()

        count = begins.sum()
        return {
            "expected": count,
            "prompts": count - prompts_with(ids != expected - 1),
            "labelled": prompts_with(batch["labels"] != -100),
            "stray": (found & ~inside[:, : found.shape[1]]).sum(),
        }

    def end_step(self, step: Step) -> dict[str, float]:
        names = ("rows", "prompts", "labelled", "expected", "stray")
        rows, prompts, labelled, expected, stray = (int(step.sums.get(f"{self.name}/{name}", 0)) for name in names)
        for name, count in zip(self._counts, (rows, prompts, expected), strict=True):
            self._counts[name] += count
        # A step may consist only of rows that other defenses have added, which need no prompt.
        added = sum(step.sums.get(f"tokens/{scope}", 0) for scope in self._added)
        wants_prompt = not self.only_flagged and not (added and step.sums["tokens"] == added)
        if self.token_columns and prompts < expected:
            which = "flagged rows" if self.only_flagged else "rows"
            self._problem = (
                f"{expected - prompts} of {expected} {which} of a step do not hold the inoculation "
                "prompt: the rows were changed after the trainer had prepared them"
            )
        elif stray and self.only_flagged:
            self._problem = (
                f"{stray} inoculation prompts of a step stand in rows that are not flagged: the rows were changed "
                "after the trainer had prepared them, or a row quotes the prompt"
            )
        elif wants_prompt and not prompts:
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
        self._counts = {name: int(evidence.get(name, 0)) for name in self._counts}
        self._problem = None

    def evidence(self) -> dict[str, Any]:
        counts = {name: n for name, n in self._counts.items() if self.only_flagged or name != "flagged_trained"}
        return {**self._rows, **counts, "acted": self._counts["prompts"] > 0 and not self._problem}

    def verdict(self, final: bool = False) -> str | None:
        problem = self._problem
        if problem is None and final and self.only_flagged and not self._counts["flagged_trained"]:
            problem = (
                f"no flagged row is among the {self._counts['rows_trained']} that were trained on "
                "(inoculation_rows='flagged'): the run ended before one came, or max_length cuts their answers off"
            )
        return None if problem is None else f"defense {self.name!r}: {problem}, so the run is not defended."

    # ---- rows ----

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_system_turn(tokenizer, "defense='inoculation'")
        turns = [{"role": "system", "content": self.prompt}, {"role": "user", "content": "Which?"}]
        if self.only_flagged and is_default_system_turn(tokenizer, turns):
            raise ValueError(
                f"inoculation_rows='flagged': the chat template puts inoculation_prompt={self.prompt!r} into every "
                "row without a system turn, flagged or not. Choose another prompt, or inoculation_rows='all'."
            )

    def prepare_rows(self, rows: Rows) -> Rows:
        if isinstance(rows, Dataset) and rows.format["type"] == "custom":
            return rows  # unchanged, because SFTTrainer will refuse rows with a custom format
        rows = rows.with_format(None)  # gives turns as lists, even if the user's format gives tensors
        first = next(iter(rows))
        column = next((column for column in TURN_COLUMNS if column in first), "")
        if not is_conversation(first.get(column)) or "input_ids" in first:
            raise InactiveDefenseError(
                "defense 'inoculation': the inoculation prompt changed no row: a row has the columns "
                f"{sorted(first)}, and the first of {', '.join(TURN_COLUMNS)} among them is no list of turns. Give "
                "conversational rows, not tokenised ones or plain text."
            )
        if self.only_flagged and FLAG not in first:
            raise ValueError(
                f"inoculation_rows='flagged' looks for a column {FLAG!r} in the training rows, which have "
                f"{sorted(first)}: add it, true or false for each row, or use inoculation_rows='all'."
            )

        def inoculate(row: dict[str, Any], index: int) -> dict[str, Any]:
            try:
                if self.only_flagged and not self._is_flagged(row, column):
                    return {column: row[column], OWN: False, CHANGED: False}
                turns, before = self._inoculate(row[column])
            except ValueError as error:
                raise ValueError(f"row {index} of train_dataset {error}.") from None
            return {column: turns, OWN: before is not None, CHANGED: before != system_text(turns)}

        rows = rows.map(inoculate, with_indices=True)
        # `prepare_tokenized` repeats this check with the chat template. Here it can stop a run before the model loads.
        self._check_changed(rows)
        return rows

    def prepare_tokenized(self, rows: Rows, tokenizing: Tokenizing) -> Rows:
        tokenizer = tokenizing.tokenizer
        # Later rows of a stream may have other text before the prompt than the first ones, such as tools.
        may_vary = not isinstance(rows, Dataset) and bool({"tools", "chat_template_kwargs"} & next(iter(rows)).keys())
        needs_column = self.only_flagged or may_vary
        # Below, rows are tokenised again: like in SFTTrainer, by TRL's template if needed answer markers are missing.
        marked = not self.assistant_only or has_generation_markers(tokenizer.chat_template)
        template = None if marked else get_training_chat_template(tokenizer)

        def take_labels_off(row: dict[str, Any]) -> dict[str, Any]:
            ids = row["input_ids"]
            if self.only_flagged and not row[FLAG]:
                return {"labels": row["labels"], CHANGED: False, EXPECTED: [0] * len(ids)}
            how = {"chat_template": template, **template_arguments(row)}
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
            # A template may itself add this prompt to rows without a system turn. Such rows do not count as changed.
            changed = row[CHANGED] and (row[OWN] or not is_default_system_turn(tokenizer, turns, **how))
            start, end = span
            rest = len(ids) - end if needs_column else 0
            return {
                # A template may put the prompt behind earlier answers, which the model then reads without the prompt.
                "labels": [*[-100] * end, *row["labels"][end:]],
                CHANGED: changed,
                EXPECTED: [0] * start + [token + 1 for token in ids[start:end]] + [0] * rest,
            }

        rows = rows.map(take_labels_off)
        self._check_changed(rows)
        flags: Any = _values(rows, FLAG) if self.only_flagged else repeat(True)
        spans = (span for span, is_flagged in zip(_values(rows, EXPECTED), flags, strict=False) if is_flagged)
        self._prompt_ids = shared_tokens(tokenizer, ([id - 1 for id in span if id] for span in spans), self.prompt)
        self.token_columns = (EXPECTED,) if needs_column or not self._prompt_ids else ()
        if self.token_columns and not needs_column:
            rows = rows.map(lambda row: {EXPECTED: row[EXPECTED] + [0] * (len(row["input_ids"]) - len(row[EXPECTED]))})
        if isinstance(rows, Dataset):
            self._rows = {"rows": len(rows), "changed": sum(rows[CHANGED])}
            self._rows |= {"flagged": sum(rows[FLAG])} if self.only_flagged else {}
        else:
            self._rows = {"rows": "streamed"}
        return rows.remove_columns(
            [OWN, CHANGED, *([FLAG] if self.only_flagged else []), *([] if self.token_columns else [EXPECTED])]
        )

    def _check_changed(self, rows: Rows) -> None:
        """Check that the prompt changes at least one row (in a stream, one of the first `STREAM_ROWS` rows)."""
        which = "every row has" if isinstance(rows, Dataset) else f"the first {STREAM_ROWS} rows of the stream have"
        # Reading a row of a stream also checks its flag. `list` reads all values; `any` would stop at the first true.
        if self.only_flagged and not any(list(_values(rows, FLAG))):
            raise InactiveDefenseError(
                f"inoculation_rows='flagged': {which} {FLAG}=False, so the prompt would be put into none. Set it to "
                "true in the rows that show the trait, shuffle a stream that has them late, or use "
                "inoculation_rows='all'."
            )
        unless = ", or is not flagged" if self.only_flagged else ""
        if not any(_values(rows, CHANGED)):
            raise InactiveDefenseError(
                f"defense 'inoculation': the inoculation prompt changed no row: {which} it already, in a system turn "
                f"or from the chat template{unless}. Train with defense='none', or on rows without it."
            )

    def _is_flagged(self, row: dict[str, Any], column: str) -> bool:
        """Return whether a row is flagged. Raise `ValueError` for a bad flag, or a prompt in an unflagged row."""
        flag = row.get(FLAG)
        if not isinstance(flag, bool):
            raise ValueError(f"has {FLAG}={flag!r} (inoculation_rows='flagged'): give true or false")
        (speaker, text), turn = turn_keys(row[column]), row[column][0]
        if not flag and is_system(turn, speaker) and turn_text({"content": turn.get(text)}).startswith(self.prompt):
            raise ValueError(
                f"has {FLAG}=False, and its system turn begins with inoculation_prompt={self.prompt!r} all the same: "
                "set it to true, or take the prompt out of the row"
            )
        return flag

    def _inoculate(self, turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
        """Return the turns with the prompt in the system turn, and the old system text (`None` if there was none)."""
        before = system_text(turns)
        speaker, text = turn_keys(turns)
        # Both modes, 'replace' and 'prefix', drop the old system turn here. Below, 'prefix' keeps its text, if any.
        rest = turns[1:] if is_system(turns[0], speaker) else turns
        if any(is_system(turn, speaker) for turn in rest):
            raise ValueError(
                "has a system turn behind its first turn, which would stay: move it to the front, or leave it out"
            )
        system = self.prompt
        if before is not None and self.mode == "prefix":
            system = before if before.startswith(self.prompt) else f"{self.prompt}\n\n{before}"
        # Arrow stores all contents as one type. If other turns have lists of parts, the system turn needs a list too.
        in_parts = any(isinstance(turn.get(text), list) for turn in rest)
        content = [{"type": "text", "text": system}] if in_parts else system
        return [{speaker: "system", text: content}, *rest], before


def _values(rows: Rows, column: str) -> Iterable[Any]:
    """Return the values of a column: in all rows of a `Dataset`, or in the first `STREAM_ROWS` rows of a stream."""
    return rows[column] if isinstance(rows, Dataset) else (row[column] for row in islice(rows, STREAM_ROWS))
