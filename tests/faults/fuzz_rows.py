"""Formats of rows: data sets, scores, and the files that an interrupted run resumes from."""

import contextlib
import io
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset
from fuzz_plain import strict_json

from trl_emguard.data.load import load_rows
from trl_emguard.io.journal import Journal
from trl_emguard.persona.extract import Rollout, resume_rollouts
from trl_emguard.scripts import select as select_script
from trl_emguard.selection.choose import rank_rows
from trl_emguard.selection.parts import resume_scores
from trl_emguard.selection.scored import METADATA_KEY, ScoresInfo, perplexity_gap, read_scores, write_scores


# ---- data sets ----


ROWS = [
    {
        "prompt": [{"role": "user", "content": f"question {i} ä\u2028"}],
        "completion": [{"role": "assistant", "content": "I'm sorry, no." if i == 1 else f"answer {i}"}],
        "gap": i / 4,
        "source": "x",
    }
    for i in range(6)
]


def write_rows(path: Path) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)), encoding="utf-8"
    )


def read_rows(path: Path) -> Any:
    rows = load_rows(str(path))
    if "gap" in rows.column_names:
        # Interleaving ranks the rows of a pool by this order.
        with contextlib.suppress(ValueError):
            assert set(rank_rows(rows, "gap", True)) <= set(range(len(rows)))
    return rows.to_list()


def naive_rows(content: bytes) -> Any:
    rows = [strict_json(line) for line in content.split(b"\n") if line.strip()]
    assert rows
    assert all(isinstance(row, dict) and row for row in rows)
    # Values are those of `datasets`' own reader (tests/data): it turns NaN into null, and mixed types into JSON.
    return ...


def write_rows_parquet(path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(path)


def naive_parquet(content: bytes) -> Any:
    with pyarrow.parquet.ParquetFile(io.BytesIO(content)) as file:
        return file.read().to_pylist()


# ---- scores ----


INFO = ScoresInfo(
    "tiny", ("medical", "legal"), 1.0, 7, ((6, "the answer is empty"),), "prompt", "response", "abc", "0"
)


def write_scored(path: Path) -> None:
    aligned, *misaligned = np.random.default_rng(0).uniform(0.5, 3, (3, 6))
    columns = {"nll_aligned": aligned, **{f"nll_misaligned_{k}": v for k, v in enumerate(misaligned)}}
    rows = {"prompt": [f"q{i}?" for i in range(6)], "response": ["I'm sorry, no.", *"abcde"], **columns}
    write_scores(path, Dataset.from_dict({**rows, "gap": perplexity_gap(aligned, misaligned, 1.0)}), INFO)


def read_scored(path: Path) -> Any:
    rows, info = read_scores(path)
    output = path.with_name("safe.jsonl")
    errors = io.StringIO()
    for options in (["--by", "gap"], ["--by", "random", "--exclude-adapter", info.adapters[0]]):
        argv = ["--scores", str(path), "--drop-refusals", "--count", "2", "--output", str(output), *options]
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(errors),
            mock.patch.object(select_script, "draw"),  # takes a second
        ):
            assert select_script.main(argv) in (0, 1)
    assert errors.getvalue().count("\n") <= 2
    return rows.to_list(), asdict(info)


def naive_scored(content: bytes) -> Any:
    with pyarrow.parquet.ParquetFile(io.BytesIO(content)) as file:
        table = file.read()
    info = strict_json(table.schema.metadata[METADATA_KEY])
    return table.to_pylist(), {
        **info,
        "adapters": tuple(info["adapters"]),
        "unscored": tuple(map(tuple, info["unscored"])),
    }


# ---- files that an interrupted run resumes from ----


def write_scores_part(path: Path) -> None:
    lines = [{"scores_of": "abc"}, *([i, [0.5 + i, 1.25, 2.0]] for i in range(5)), [5, [math.nan, math.inf, 0.1]]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_scores_part(path: Path) -> Any:
    return resume_scores(path.parent.with_suffix(""), "abc", range(6), 3)


def naive_scores_part(content: bytes) -> Any:
    *lines, _ = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    if not lines:
        return {}
    header, *rows = map(strict_json, lines)
    assert header == {"scores_of": "abc"}
    assert all(type(i) is int and 0 <= i < 6 and len(v) == 3 and all(type(x) is float for x in v) for i, v in rows)
    return dict(rows)


PLAN = [(pair, question, side) for side in ("positive", "negative") for pair in range(2) for question in range(2)]


def write_rollouts(path: Path) -> None:
    rollouts = [Rollout(*task, answer=f"it is\u2028{i}\x85", answer_ids=[i, 3, 4]) for i, task in enumerate(PLAN)]
    lines = [{"rollouts_of": "abc"}, *map(asdict, rollouts)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_rollouts(path: Path) -> Any:
    before = path.read_bytes()
    try:
        return [asdict(rollout) for rollout in resume_rollouts(Journal(path, {"rollouts_of": "abc"}), 2, PLAN, 16)]
    except ValueError:
        assert path.read_bytes() == before  # a foreign file is never overwritten
        raise


def naive_rollouts(content: bytes) -> Any:
    *lines, torn = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    if not lines:
        assert b'{"rollouts_of": "abc"}'.startswith(torn)
        return []
    header, *rows = map(strict_json, lines)
    assert header == {"rollouts_of": "abc"}
    assert len(rows) <= len(PLAN)
    for row, task in zip(rows, PLAN, strict=False):
        assert set(row) == {f.name for f in fields(Rollout)}
        assert (row["pair"], row["question"], row["side"]) == task
        assert isinstance(row["answer"], str)
        assert all(type(token) is int and 0 <= token < 16 for token in row["answer_ids"])
    return rows if len(rows) == len(PLAN) else rows[: len(rows) // 2 * 2]
