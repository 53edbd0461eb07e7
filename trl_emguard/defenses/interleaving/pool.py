"""Pool of general instruct rows for interleaving: how it is read, put in order of preference, and tokenised."""

import json
import math
import os
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets

from ...data.conversation import conversation, turn_text, usual_role
from ...data.files import split_file
from ...data.labels import count_harmful, keep_where
from ...data.load import SourceOptions, load_rows
from ...data.prepare import Tokenizing
from ...models.chat import encode_answers, template_arguments
from ...models.shipped import last_name
from ...selection.choose import rank_rows
from ...selection.scored import scored_names, with_usual_names


logger = get_logger(__name__)

# Columns of a pool that training reads besides the conversation's turns. The pool's checksum covers them too.
READ_COLUMNS = ("tools", "chat_template_kwargs", "input_ids", "labels")
# Smallest number of rows that [`Pool.take`] tokenises at once, unless fewer are left in the pool.
TAKEN_AT_ONCE = 64


class Pool:
    """Rows that a defense may mix into the training rows, best first.

    Args:
        rows: rows that the user passed to the trainer; `None` to read `source`.
        source: file, shipped set or hub id that the config names; `None` if `rows` are given.
        who: name of the defense, for messages.
        by: order of preference: `"gap"` for the largest perplexity gap first, or `"random"`.
        drop_refusals: whether rows whose answer is a refusal are left out.
        seed: seed of the random order.
        config: configuration of the data set that `source` names.
        split: split of that data set, with a slice if wanted.
        where: condition `COLUMN=VALUE` that a row must meet, or `None`.

    Attributes:
        ranked: usable rows in order of preference, as text, or as tokens if the user's rows are tokenised.
        tokenised: result of the last call of [`take`], rows of `input_ids` and `labels`; `None` before the first call.
        looked_at: number of ranked rows that were tokenised to get `tokenised`.
        left_out: number of rows that cannot be trained on for each reason, among those looked at so far.
        refusals: number of rows left out as refusals.

    Raises:
        ValueError: neither or both of `rows` and `source` are given. Or the pool is not a `Dataset`, is empty, has no
            usable row, has rows labelled as harmful, or lacks the columns that `by` or `drop_refusals` needs.
        FileNotFoundError: `source` does not exist.
    """

    def __init__(
        self,
        rows: Dataset | None,
        source: str | None,
        who: str,
        by: Literal["gap", "random"],
        drop_refusals: bool,
        seed: int,
        config: str | None = None,
        split: str = "train",
        where: str | None = None,
    ):
        self.who = who
        self.tokenised: Dataset | None = None
        self.looked_at = 0
        self.left_out: Counter[str] = Counter()
        if (rows is None) == (source is None):
            raise ValueError(
                f"interleave_dataset is {'missing' if rows is None else 'given twice'}: defense={who!r} wants one "
                "pool of general instruct rows, as a file or id in the config, or as a `Dataset` passed to the "
                "trainer."
            )
        if rows is None:
            options = SourceOptions("interleave_dataset", "interleave_split", "interleave_config")
            rows = load_rows(str(source), split, config, options=options)
        if not isinstance(rows, Dataset):
            raise ValueError(
                f"interleave_dataset must be a `Dataset`, got {type(rows).__name__}: a pool is chosen from as a whole."
            )
        rows = rows.with_format(None)  # gives turns and tokens as lists, even if the user's format gives tensors
        if not len(rows):
            raise ValueError("interleave_dataset is empty: there is nothing to mix in.")
        rows = _without_harm(rows, where)
        model = ""
        if source is not None:
            rows, model = _named_as_usual(rows, Path(os.path.expanduser(source)), split, by)
        self._model = model
        is_tokenised = "input_ids" in rows.column_names
        if is_tokenised and drop_refusals:
            raise ValueError(
                f"interleave_dataset is tokenised, and defense={who!r} reads the answers to leave refusals out: pass "
                "the rows as text."
            )
        usable, self._malformed = (rows, Counter()) if is_tokenised else _usable(rows)
        try:
            order = rank_rows(usable, by, drop_refusals=drop_refusals, seed=seed)
        except ValueError as error:
            raise ValueError(f"interleave_dataset does not serve defense={who!r}: {error}") from error
        if not order:
            raise ValueError(
                f"interleave_dataset does not serve defense={who!r}: the answers of all {len(usable)} rows are "
                "refusals."
            )
        self.refusals = len(usable) - len(order)
        self.ranked = usable.select(order)

    def check_model(self, name: str) -> None:
        """Warn if the pool's order is by scores for a model other than `name`, the one that this run trains."""
        if name and self._model and last_name(name) != last_name(self._model):
            logger.warning(
                f"defense {self.who!r}: the pool's gaps are of {self._model!r}, and this run trains {name!r}: score "
                "the pool for this model, unless both are the same weights."
            )

    def shared_prompts(self, rows: Dataset) -> int:
        """Return how many training rows ask the same question as a row of the pool."""
        prompts = {_asked(row) for row in self.ranked} - {None}
        return sum(_asked(row) in prompts for row in rows) if prompts else 0

    def tokenise_by(self, tokenizing: Tokenizing, max_length: int | None) -> None:
        """Make [`take`] tokenise rows in the same way as the training rows.

        Raises:
            ValueError: the run trains on answers alone, and a tokenised pool has no labels to tell answers apart.
        """
        columns = self.ranked.column_names
        if tokenizing.answers_only and "input_ids" in columns and "labels" not in columns:
            raise ValueError(
                "interleave_dataset is tokenised and has no `labels`, and this run trains on answers alone: add them, "
                "-100 where a token is not of the answer, or pass the rows as text."
            )
        self._tokenizing, self._max_length = tokenizing, max_length
        self.tokenised, self.looked_at, self.left_out = None, 0, Counter(self._malformed)
        for problem, count in self._malformed.items():
            logger.warning(f"defense {self.who!r}: {count} rows of the pool are left out: {problem}.")

    def take(self, count: int) -> Dataset:
        """Return at least the first `count` rows that can be trained on, or all such rows if there are fewer.

        Rows are tokenised in rank order until there are enough, since a run takes few rows of a large pool.
        """
        rows, before = self.tokenised, self.left_out.copy()
        while rows is None or (len(rows) < count and self.looked_at < len(self.ranked)):
            missing = count - (0 if rows is None else len(rows))
            upto = min(len(self.ranked), self.looked_at + max(missing, self.looked_at, TAKEN_AT_ONCE))
            fresh = self._tokenise(self.ranked.select(range(self.looked_at, upto)))
            # A data set without rows has columns without a type, so it is not joined with another data set.
            rows = concatenate_datasets([rows, fresh]) if rows and len(fresh) else rows or fresh
            self.looked_at = upto
        for problem, number in (self.left_out - before).items():
            logger.warning(
                f"defense {self.who!r}: {number} rows of the pool are left out: {problem}. {self.looked_at} of "
                f"{len(self.ranked)} were looked at."
            )
        self.tokenised = rows
        return rows

    def why_left_out(self) -> str:
        """Return the most frequent reason why rows were left out, with their number, in brackets; "" if none were."""
        return "".join(f" ({count} are left out: {problem})" for problem, count in self.left_out.most_common(1))

    def _tokenise(self, rows: Dataset) -> Dataset:
        """Return the rows that can be trained on as `input_ids` and `labels`, and count the others in `left_out`."""
        tokenizing = self._tokenizing
        if "input_ids" not in rows.column_names:
            turns = self._rendered(rows)
            if not turns:
                return Dataset.from_dict({"input_ids": [], "labels": []})
            kwargs = [row.pop("chat_template_kwargs") for row in turns]
            # The `tools` of different rows may have different fields. An Arrow table would give every tool all fields,
            # with nulls for those that the tool lacks. Stored as JSON, the tools stay unchanged.
            rows = Dataset.from_list(turns, on_mixed_types="use_json")
            if any(kwargs):
                rows = rows.add_column("chat_template_kwargs", kwargs)
        rows = tokenizing.prepare(rows, "interleave_dataset").select_columns(["input_ids", "labels"])
        fitting = [i for i, row in enumerate(rows) if self._fits(row)]
        if len(fitting) < len(rows):
            problem = f"longer than max_length={self._max_length}, or no token to train on"
            self.left_out[problem] += len(rows) - len(fitting)
        return rows.select(fitting)

    def _rendered(self, rows: Dataset) -> list[dict[str, Any]]:
        """Return rows as `prompt` and `completion`, except those that the chat template refuses or shows in part."""
        tokenizer = self._tokenizing.tokenizer
        turns = [_as_prompt_completion(row, self._tokenizing) for row in rows]
        if not tokenizer.chat_template:
            return turns
        conversations = [(row["prompt"], row["completion"]) for row in turns]
        problems = encode_answers(tokenizer, conversations, (), [template_arguments(row) for row in turns])
        self.left_out.update(problem for problem in problems if isinstance(problem, str))
        return [row for row, problem in zip(turns, problems, strict=True) if not isinstance(problem, str)]

    def _fits(self, row: dict[str, Any]) -> bool:
        longest = math.inf if self._max_length is None else self._max_length
        return len(row["input_ids"]) <= longest and any(label != -100 for label in row["labels"][1:])

    @cached_property
    def _checksum(self) -> int:
        """Checksum of the ranked rows. It identifies the pool better than a path: a file may move or change."""
        checksum = 0
        for row in self.ranked:
            read = {name: row[name] for name in READ_COLUMNS if row.get(name) is not None}
            content = read if "input_ids" in row else {**read, "turns": conversation(row)}
            checksum = zlib.crc32(json.dumps(content, sort_keys=True, default=str).encode(), checksum)
        return checksum

    def describe(self) -> str:
        """Return the number of ranked rows and their checksum, for `defense.json`."""
        return f"{len(self.ranked)} ranked rows ({self._checksum:08x})"

    def describe_tokens(self) -> str:
        """Tokenise the whole pool, and return the number of rows that can be trained on and their tokens' checksum.

        Checkpoints of an earlier version record the pool in this form. A run that resumes from one compares its pool.
        """
        rows, checksum = self.take(len(self.ranked)), 0
        for row in rows:
            checksum = zlib.crc32(np.array([row["input_ids"], row["labels"]], np.int64).tobytes(), checksum)
        return f"{len(rows)} rows ({checksum:08x})"


def _without_harm(rows: Dataset, where: str | None) -> Dataset:
    """Return the rows that meet the condition `where`, and refuse rows that a column labels as harmful.

    Raises:
        ValueError: rows labelled as harmful, or a condition that no row meets.
    """
    if where is not None:
        rows = keep_where(rows, where, "interleave_where")
    for column, (harmful, others) in count_harmful(rows).items():
        advice = f"interleave_where='{column}={others[0]}'" if others else "another pool"
        raise ValueError(
            f"interleave_dataset: {harmful} of {len(rows)} rows are labelled harmful in the column {column!r}, and "
            f"would be trained on as safe rows. Take them out, as by {advice}."
        )
    return rows


def _named_as_usual(rows: Dataset, path: Path, split: str, by: str) -> tuple[Dataset, str]:
    """Return the rows, with text columns named `prompt` and `response` if `trl-emguard score` wrote `path`.

    If `path` is a folder, only the files of the splits that `split` names are looked at. The second value is the name
    of the model whose gaps the rows are ranked by; empty if it is unknown, or if `by` is not `"gap"`.

    Raises:
        ValueError: the files' text columns have different names, or their gaps are of different models.
    """
    bases = [part.split("[")[0].strip() for part in split.split("+")]
    found = [scored_names(split_file(path, base) or path) for base in bases]
    columns = {("prompt", "response") if names is None else names[1:] for names in found}
    models = {"" if names is None else names[0] for names in found} if by == "gap" else {""}
    if len(columns) > 1 or len(models) > 1:
        told = ", ".join(repr(model) if model else "unknown" for model in sorted(models))
        raise ValueError(
            f"interleave_split={split!r} names files that do not go together: "
            + ("their text columns have different names. " if len(columns) > 1 else "")
            + (f"their gaps are of different models ({told}). " if len(models) > 1 else "")
            + "Score them alike, or name one."
        )
    (names,), (model,) = columns, models
    return with_usual_names(rows, *names), model


def _usable(rows: Dataset) -> tuple[Dataset, Counter[str]]:
    """Return the rows that can be mixed in, and the number of unusable rows for each problem."""
    problems = [_problem(row) for row in rows]
    malformed = Counter(problem for problem in problems if problem)
    fine = [i for i, problem in enumerate(problems) if not problem]
    if not fine:
        raise ValueError(f"interleave_dataset: no row can be used: {malformed.most_common(1)[0][0]}.")
    return rows.select(fine), malformed


def _problem(row: dict[str, Any]) -> str:
    """Return the reason why a row cannot be used; an empty text if it can be used."""
    try:
        conversation(row)
    except ValueError as error:
        return str(error)
    return ""


def _as_prompt_completion(row: dict[str, Any], tokenizing: Tokenizing) -> dict[str, Any]:
    prompt, completion = conversation(row)
    kwargs = row.get("chat_template_kwargs") or tokenizing.template_kwargs or {}
    if tokenizing.tokenizer.chat_template:
        tools = row.get("tools") or None
        return {"prompt": prompt, "completion": completion, "tools": tools, "chat_template_kwargs": kwargs}
    # A model without a chat template is trained on plain text.
    text = {"prompt": "\n".join(map(turn_text, prompt)) + "\n", "completion": turn_text(completion[0])}
    return {**text, "chat_template_kwargs": kwargs}


def _asked(row: dict[str, Any]) -> str | None:
    """Return the user's last question in a row, for comparison; `None` if the row has no question.

    Questions that differ only in system prompt, case or spacing give the same text.
    """
    for column in ("messages", "prompt", "conversations"):
        turns = row.get(column)
        if isinstance(turns, str):
            return " ".join(turns.split()).casefold()
        if isinstance(turns, list):
            user = [turn for turn in turns if usual_role(str(turn.get("role", turn.get("from")))) == "user"]
            asked = user[-1].get("content", user[-1].get("value")) if user else None
            if isinstance(asked, str):
                return " ".join(asked.split()).casefold()
    return None
