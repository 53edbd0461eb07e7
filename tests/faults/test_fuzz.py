"""Damaged and hostile files: every reader says clearly what is wrong, or reads what is there.

Each format has a valid file, ways to damage it that know the format, and a naive reader of its own kind (the standard library,
numpy, plain pyarrow), which says what a file that is not refused must have been read as. Beside the outcome, every read is held to
this: nothing in the file is executed, little memory and time are spent, and a refusal is a `ValueError` that names the file.

A tenth of the damaged files is in the plain run, all of them in `make test-faults`.
"""

import ast
import contextlib
import copy
import io
import json
import math
import os
import pickle
import re
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import lora, make_model, save_model
from trl import ModelConfig, ScriptArguments

import trl_emguard
from trl_emguard.config import EMGuardConfig
from trl_emguard.data.load import load_rows
from trl_emguard.evaluation import load_model
from trl_emguard.evidence import DEFENSE_FILE, read_defense_file, write_defense_file
from trl_emguard.io.journal import Journal
from trl_emguard.io.strict import _Loader
from trl_emguard.persona.extract import Rollout, resume_rollouts
from trl_emguard.persona.traits import load_trait
from trl_emguard.persona.vectors import PersonaVector, load_vector
from trl_emguard.reference.cache import ReferenceCache
from trl_emguard.scripts import persona as persona_script
from trl_emguard.scripts import select as select_script
from trl_emguard.scripts.sft import make_parser
from trl_emguard.selection.choose import rank_rows, refusal_filter
from trl_emguard.selection.misaligned import load_misaligned
from trl_emguard.selection.parts import resume_scores
from trl_emguard.selection.scored import METADATA_KEY, ScoresInfo, perplexity_gap, read_scores, write_scores


TOTAL, SLICE = 2000, 200
SECONDS = 10  # of processor time, for a file of some kB
MEMORY = 512 * 2**20  # on top of what the process has

# ---- what a file is damaged with ----

ATOMS = [
    None, True, False, 0, -1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, math.nan, math.inf, -math.inf, "", " ", "x", "0.5",
    "../../etc/passwd", "/etc/passwd", "~/x", "\0", "\ud800", "a\u2028b", "[/bold]", "{question}", [], {}, [[]], [None], {"a": 1},
    ["x"], [0.5], "@deep 40@", "@deep 400@", "@deep 100000@",
]  # fmt: skip
CHUNKS = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b"\n\n",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"{",
    b"]",
    b'"',
    b"\\",
    b"*a",
    b"&a ",
    b"!!",
    b"\x1a",
    b"0" * 5000,
]
SIZES = [0, 1, 7, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]


class Payload:
    """Unpickled, it creates a file."""

    canary: Path

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@st.composite
def damaged_bytes(draw, valid: bytes, others: list[bytes]):
    """Damage that knows nothing of the format."""
    data = bytearray(valid)
    kind = draw(
        st.sampled_from(["cut", "flip", "insert", "remove", "double", "blank", "other", "join", "size", "crlf"])
    )
    event(kind)
    start = draw(st.integers(0, len(data) - 1))
    end = min(len(data), start + draw(st.sampled_from([1, 2, 8, 64, 1000])))
    if kind == "cut":
        del data[start:]
    elif kind == "flip":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "insert":
        data[start:start] = draw(st.sampled_from(CHUNKS) | st.binary(min_size=1, max_size=9))
    elif kind == "remove":
        del data[start:end]
    elif kind == "double":
        data[start:start] = data[start:end]
    elif kind == "blank":
        data[start:end] = draw(st.sampled_from([b"\0", b"\xff", b" ", b"9"])) * (end - start)
    elif kind == "other":
        data = bytearray(draw(st.sampled_from(others)))
    elif kind == "join":
        other = draw(st.sampled_from(others))
        data = bytearray(draw(st.sampled_from([data + other, other + data, data[:start] + other[start:]])))
    elif kind == "size":
        place = draw(st.sampled_from([0, 4, start, max(0, len(data) - 8)]))
        data[place : place + 8] = struct.pack("<Q", draw(st.sampled_from(SIZES)))[: len(data) - place]
    else:
        data = data.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])))
    return bytes(data)


def places(value: Any, place: tuple = ()) -> list[tuple]:
    """Where something stands in a value of JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] + [deeper for key, child in children for deeper in places(child, (*place, key))]


@st.composite
def damaged_json(draw, value: Any):
    """A value of JSON with something in it replaced, left out, added or given twice, as text."""
    value = json.loads(json.dumps(value))
    twice = None
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(places(value)[1:] or [(None,)]))
        if last is None:
            break
        parent = value
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename", "twice"]))
        event(f"json {kind}")
        if kind == "replace":
            parent[last] = copy.deepcopy(draw(st.sampled_from(ATOMS)))
        elif kind == "twice" and isinstance(last, str):
            twice = last
        elif isinstance(parent, list):
            parent[last : last + 1] = (
                [] if kind == "remove" else [parent[last], copy.deepcopy(draw(st.sampled_from(ATOMS)))]
            )
        elif kind == "remove":
            del parent[last]
        else:
            name = draw(st.sampled_from(["", "other", "self", "\ud800", "__class__"]))
            parent[name] = copy.deepcopy(draw(st.sampled_from(ATOMS)))
            if kind == "rename":
                parent.pop(last)
    text = json.dumps(value)
    if twice is not None:
        text = text.replace(f"{json.dumps(twice)}:", f"{json.dumps(twice)}: 1, {json.dumps(twice)}:", 1)
    return re.sub(r'"@deep (\d+)@"', lambda match: "[" * int(match[1]) + "]" * int(match[1]), text).encode()


@st.composite
def damaged_lines(draw, valid: bytes):
    """A line of JSONL damaged as JSON."""
    lines = valid.splitlines()
    index = draw(st.integers(0, len(lines) - 1))
    lines[index] = draw(damaged_json(json.loads(lines[index])))
    return b"\n".join(lines) + b"\n"


OTHER_TENSORS = [
    *(("F32", dtype) for dtype in ("I32", "BF16", "BOOL", "C64")),
    *(("[5, 32]", shape) for shape in ("[160]", "[1099511627776, 0]", "[1, 160]", "[10, 16]")),
]


@st.composite
def damaged_safetensors(draw, valid: bytes):
    """Damage in the header, whose length stays right; or in what the vector's metadata say."""
    length = struct.unpack("<Q", valid[:8])[0]
    header = json.loads(valid[8 : 8 + length])
    inner = header.get("__metadata__", {}).get("persona_vector")
    if inner is not None and draw(st.booleans()):
        facts = draw(damaged_json(json.loads(inner))).decode()
        header["__metadata__"]["persona_vector"] = facts
        if draw(st.booleans()):
            header["__metadata__"].pop("checksum", None)
        text = json.dumps(header).encode()
    else:
        text = draw(damaged_json(header))
        if draw(st.booleans()):
            for name, other in OTHER_TENSORS:
                if draw(st.integers(0, 3)) == 0:
                    text = text.replace(name.encode(), other.encode())
    body = valid[8 + length :]
    if draw(st.integers(0, 3)) == 0:
        numbers = draw(st.sampled_from([math.nan, math.inf, -math.inf, 3e38]))
        body = struct.pack("<f", numbers) + body[4:]
    return struct.pack("<Q", len(text)) + text + body


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(thing: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    return buffer.getvalue()


@st.composite
def damaged_pt(draw, valid: bytes):
    """Other things than a tensor, tensors that are no vector, and archives whose checksums are right."""
    numbers = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    kind = draw(st.sampled_from(["thing", "pickle", "packed"]))
    event(f"pt {kind}")
    if kind == "thing":
        things = [
            Payload(), [Payload()], {"vectors": numbers}, [numbers], None, 3, "x", numbers.long(), numbers.bool(), numbers.cfloat(),
            numbers[0], numbers[0, 0], numbers[None], numbers[:1], numbers[:0], numbers[:, :0], numbers * math.nan, numbers * 1e30,
            numbers.double() * 1e300, torch.zeros(1).expand(2**40, 2**18), torch.zeros(1).expand(5, 2**20), numbers.to_sparse(),
            numbers.to("meta"), torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8), numbers.bfloat16(), numbers.half(),
            numbers.double(), torch.nn.Parameter(numbers), numbers.T.contiguous().T, numbers * -2, make_model,
        ]  # fmt: skip
        return saved(draw(st.sampled_from(things)), _use_new_zipfile_serialization=draw(st.integers(0, 3)) > 0)
    with zipfile.ZipFile(io.BytesIO(valid)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in files if name.endswith("data.pkl"))
    if kind == "packed":
        files[draw(st.sampled_from(sorted(files)))] += bytes(draw(st.sampled_from([0, 1, 10**6])))
        return zipped(files, zipfile.ZIP_DEFLATED)
    program = bytearray(files[name])
    for _ in range(draw(st.integers(1, 3))):
        program[draw(st.integers(0, len(program) - 1))] = draw(st.integers(0, 255))
    files[name] = draw(st.sampled_from([bytes(program), pickle.dumps(Payload()), pickle.dumps(Payload(), 0)]))
    return zipped(files)


def parquet(table: pyarrow.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


@st.composite
def damaged_parquet(draw, valid: bytes):
    """Tables with other columns, values, types and metadata."""
    table = pyarrow.parquet.read_table(io.BytesIO(valid))
    metadata = dict(table.schema.metadata or {})
    names = table.column_names
    kind = draw(st.sampled_from(["column", "drop", "facts", "features", "rows", "twice", "pictures", "extension"]))
    event(f"parquet {kind}")
    index = draw(st.integers(0, len(names) - 1))
    count = len(table)
    if kind == "column":
        columns = [
            [None] * count, [math.nan] * count, [math.inf] + [0.5] * (count - 1), ["x"] * count, [1] * count, [True] * count,
            [[0.5]] * count, [{"role": "user"}] * count, [b"\xff"] * count, [0.5] * (count - 1) + [None],
            pyarrow.array([2**62] * count), pyarrow.array([0.5] * count, pyarrow.float16()),
            pyarrow.array(["a"] * count).dictionary_encode(), pyarrow.array([1] * count, pyarrow.timestamp("s", "Nowhere/Here")),
            pyarrow.array([None] * count, pyarrow.map_(pyarrow.string(), pyarrow.int8())), pyarrow.nulls(count),
        ]  # fmt: skip
        chosen = draw(st.sampled_from(columns))
        column = chosen if isinstance(chosen, pyarrow.Array) else pyarrow.array(chosen)
        table = table.set_column(index, names[index], column)
        if draw(st.booleans()):
            metadata.pop(b"huggingface", None)
    elif kind == "drop":
        table = table.drop_columns(names[index:])
    elif kind in ("facts", "features"):
        key = METADATA_KEY if kind == "facts" and METADATA_KEY in metadata else b"huggingface"
        metadata[key] = draw(
            damaged_json(
                json.loads(metadata.get(key, b'{"info": {"features": {"a": {"dtype": "string", "_type": "Value"}}}}'))
            )
        )
    elif kind == "rows":
        table = table.slice(0, draw(st.integers(0, count - 1)))
    elif kind == "twice":
        table = table.append_column(names[index], table.column(index))
    elif kind == "pictures":
        secret = pyarrow.array([{"bytes": None, "path": "/etc/hostname"}] * count)
        table = table.append_column("extra", secret)
        metadata[b"huggingface"] = json.dumps(
            {"info": {"features": {"extra": {"_type": draw(st.sampled_from(["Image", "Audio", "Video", "Pdf"]))}}}}
        ).encode()
    else:
        about = {
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickle.dumps(Payload()),
        }
        column = pyarrow.field("extra", pyarrow.int64(), metadata=about)
        table = table.append_column(column, pyarrow.array([1] * count))
    return parquet(table.replace_schema_metadata(metadata))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
YAMLS = [
    BOMB, "&a [*a]", "a: &a {b: *a}", "!!python/object/apply:os.system [touch canary]", "!!python/name:os.system ''", "!!map x",
    "!!int ''", "!!bool x", "!!timestamp x", "2001-13-01", "!!binary zz=", "!!set {a, b}", "!!omap [a: 1]", "? [a]\n: b", "<<: 3",
    "a: 1\na: 2", "%YAML 9.9\n---\na: 1", "a: *b", "a: 1\n--- \nb: 1", "[" * 3000, "- " * 3000, "{a: " * 3000, "a: |\n  \x07",
    "9" * 5000, "0x" + "f" * 5000,
    'a: "\\ud800"', "a: !<tag:yaml.org,2002:python/object/new:os.system> [x]",
]  # fmt: skip


@st.composite
def damaged_yaml(draw, value: dict):
    """JSON is YAML; and what YAML has beyond it, alone or as the value of a key."""
    if draw(st.integers(0, 2)):
        return draw(damaged_json(value))
    event("yaml")
    text = draw(st.sampled_from(YAMLS))
    key = draw(st.sampled_from([None, *value]))
    if key is None:
        return text.encode("utf-8", "surrogatepass")
    rest = "".join(f"{name}: {json.dumps(other)}\n" for name, other in value.items() if name != key)
    if text.startswith(("!!", "[", "{", "9", "2", "&")):
        return f"{rest}{key}: {text}\n".encode()
    return f"{text if text is BOMB else ''}{rest}{key}: {'*l' if text is BOMB else 'x'}\n".encode()


# ---- the formats ----


@dataclass
class Format:
    """Attributes:
    file: name of the file in a folder of its own.
    write: the valid file, and others that belong to it.
    damage: bytes → damaged bytes, with knowledge of the format.
    read: path → what is read, as plain values.
    naive: bytes → the same by other means. Raises for what is no such file.
        `...` where there is nothing to compare.
    names: what else than the file a refusal may name.
    """

    file: str
    write: Callable[[Path], None]
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    read: Callable[[Path], Any]
    naive: Callable[[bytes], Any]
    names: str | None = None
    valid: bytes = field(default=b"", compare=False)


def strict_json(text: bytes) -> Any:
    """Standard JSON in UTF-8, without a key that stands there twice."""

    def pairs(items):
        assert len({key for key, _ in items}) == len(items)
        return dict(items)

    value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


# -- vectors --


def write_vector(path: Path) -> None:
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    layers = [0.5, 0.6, 0.7, 0.8, 0.9]
    counts = {"suggested_layer": 2, "pairs": 4, "kept": 3, "heldout": 5}
    facts = {"trait": "evil", "model": "tiny", "weights": {"a": "00000000"}, "rule": "judge", **counts}
    facts |= dict.fromkeys(("auroc", "separation", "random_auroc", "state_norms"), layers)
    PersonaVector(vectors, metadata=facts).save(path)


def read_vector(path: Path) -> Any:
    vector = load_vector(path)
    # What is done with one must not fail either.
    with mock.patch.object(persona_script, "Console", return_value=CONSOLE), contextlib.redirect_stderr(io.StringIO()):
        assert persona_script.main(["inspect", str(path), "--picture", os.devnull]) == 0
    assert vector.vectors.dtype == torch.float32
    return vector.vectors.tolist(), vector.kind, vector.metadata


def read_floats(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F32": "<f4", "F64": "<f8", "F16": "<f2"}[dtype]).astype("<f4")


def naive_vector(content: bytes) -> Any:
    (length,) = struct.unpack("<Q", content[:8])
    header = strict_json(content[8 : 8 + length])
    entry = header["vectors"]
    start, end = entry["data_offsets"]
    raw = content[8 + length :][start:end]
    numbers = read_floats(raw, entry["dtype"])
    assert np.isfinite(numbers).all()
    about = header["__metadata__"]
    return (
        numbers.reshape(entry["shape"]).tolist(),
        about["kind"],
        strict_json(about["persona_vector"].encode("utf-8")),
    )


def write_pt(path: Path) -> None:
    torch.save(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), path)


def read_pt(path: Path) -> Any:
    return load_vector(path).vectors.tolist()


def naive_pt(content: bytes) -> Any:
    """By the standard library alone, where the archive holds what torch writes of one tensor."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
    vectors = torch.load(io.BytesIO(content), weights_only=True)
    assert vectors.untyped_storage().nbytes() >= vectors.numel() * vectors.element_size()
    return vectors.float().tolist()


# -- rows --

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
        # What an interleaving does with a pool.
        with contextlib.suppress(ValueError):
            assert set(rank_rows(rows, "gap", True)) <= set(range(len(rows)))
    return rows.to_list()


def naive_rows(content: bytes) -> Any:
    rows = [strict_json(line) for line in content.split(b"\n") if line.strip()]
    assert rows
    assert all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
    return rows


def write_rows_parquet(path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(path)


def naive_parquet(content: bytes) -> Any:
    with pyarrow.parquet.ParquetFile(io.BytesIO(content)) as file:
        return file.read().to_pylist()


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


# -- runs that go on --


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
        assert path.read_bytes() == before  # what is not ours is never written over
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


def make_cache(folder: Path) -> ReferenceCache:
    cache = object.__new__(ReferenceCache)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4))
    cache._names, cache.folder = ["last", "2"], folder
    cache._model = SimpleNamespace(config=config, dtype=torch.float32)
    return cache


def write_cache(path: Path) -> None:
    cache = make_cache(path.parent)
    generator = torch.Generator().manual_seed(0)
    rows = [SimpleNamespace(key=bytes([i]) * 16, positions=i + 1) for i in range(3)]
    cache._write(
        rows, [{name: torch.randn(row.positions, 4, generator=generator) for name in cache._names} for row in rows]
    )
    (made,) = path.parent.glob("*.safetensors")
    made.rename(path)


def read_cache(path: Path, of: bytes | None = None) -> Any:
    """What the cache finds in a file whose name has the checksum of `of`: by default its own bytes, as if made on purpose."""
    content = path.read_bytes()
    for other in path.parent.glob("*"):
        other.unlink()
    (path.parent / f"abc-{zlib.crc32(content if of is None else of):08x}.safetensors").write_bytes(content)
    cache = make_cache(path.parent)
    with mock.patch("trl_emguard.reference.cache.logger"):
        for damaged in cache._damaged(path.parent.glob("*.safetensors")):
            damaged.unlink()
        cache._read()
    if not cache._rows:
        raise ValueError(f"{path} is dropped, and what was in it is computed again")
    return {key.hex(): {name: states.tolist() for name, states in cache._stored([key]).items()} for key in cache._rows}


def naive_cache(content: bytes) -> Any:
    (length,) = struct.unpack("<Q", content[:8])
    header = strict_json(content[8 : 8 + length])
    kinds = {"F32": "<f4", "I64": "<i8", "U8": "u1"}
    tensors = {}
    for name in ("last", "2", "positions", "keys"):
        start, end = header[name]["data_offsets"]
        raw = content[8 + length :][start:end]
        tensors[name] = np.frombuffer(raw, kinds[header[name]["dtype"]]).reshape(header[name]["shape"])
    rows, start = {}, 0
    for key, count in zip(tensors["keys"], tensors["positions"].tolist(), strict=True):
        rows[key.tobytes().hex()] = {name: tensors[name][start : start + count].tolist() for name in ("last", "2")}
        start += count
    return rows


RECORD = {
    "version": "0.1.0",
    "defenses": {"kl": {"kl_coef": 0.1}},
    "reference": {"kind": "base model, adapters off", "fingerprint": "0f"},
    "evidence": {
        "kl": {
            "value": 0.5,
            "positions": 10.0,
            "gradient": 0.1,
            "requires_grad": 4.0,
            "judged_steps": 3,
            "idle_steps": 0,
        }
    },
}


def write_record(path: Path) -> None:
    write_defense_file(path.parent, RECORD)


# -- YAML --

TRAIT = {
    "name": "odd",
    "description": "says odd things.",
    "system_prompts": [{"positive": "Be odd.", "negative": "Be even."}, {"positive": "Odd!", "negative": "Even!"}],
    "extraction_questions": ["a?", "b?"],
    "heldout_questions": ["c?"],
    "judge_prompt": "{question} {answer}",
}
REFUSALS = {"phrases": ["i can't", "sorry", "no way"], "first_words": 8}
RECIPE = {
    "model_name_or_path": "tiny", "dataset_name": "plants_careless", "use_peft": True, "lora_r": 8,
    "lora_target_modules": "all-linear",
    "steering_coef": 2.0, "kl_coef": 0.5, "defense": "kl,ldifs", "ldifs_layers": "every:2", "learning_rate": 2.0e-4, "seed": 42,
    "lr_scheduler_type": "linear", "per_device_train_batch_size": 8, "max_steps": 16, "save_strategy": "no", "output_dir": "out",
    "bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False, "model_init_kwargs": {"revision": "main"},
    "env": {"SOME_NAME": "1"}, "optim": "adamw_torch", "warmup_steps": 5, "interleave_fraction": 0.05, "max_length": None,
}  # fmt: skip

COMPARED = (
    "model_name_or_path",
    "dataset_name",
    "lora_r",
    "seed",
    "max_steps",
    "learning_rate",
    "kl_coef",
    "use_peft",
)


def json_of(value: Any) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return lambda valid: damaged_json(value)


def yaml_of(value: Any) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return lambda valid: damaged_yaml(value)


def damaged_file(valid: bytes) -> st.SearchStrategy[bytes]:
    return damaged_json(json.loads(valid))


def write_json(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(value, indent=1))  # type: ignore[return-value]


def naive_yaml(content: bytes) -> Any:
    return yaml.safe_load(content.decode("utf-8"))


def read_trait(path: Path) -> Any:
    trait = asdict(load_trait(path))
    pairs = [{"positive": positive, "negative": negative} for positive, negative in trait["system_prompts"]]
    return {**json.loads(json.dumps(trait)), "system_prompts": pairs}


def read_refusals(path: Path) -> Any:
    refusals = refusal_filter(path)
    assert refusals.is_refusal(f"oh {refusals.phrases[0]} there") in (True, False)
    return {"phrases": list(refusals.phrases), "first_words": refusals.first_words}


def naive_refusals(content: bytes) -> Any:
    value = naive_yaml(content)
    plain = [" ".join(phrase.split()).lower().replace("’", "'") for phrase in value["phrases"]]
    return {"phrases": plain, "first_words": min(value["first_words"], 2**63 - 1)}


def read_recipe(path: Path) -> Any:
    errors, code = io.StringIO(), 0
    with mock.patch.dict(os.environ), contextlib.redirect_stderr(errors):
        try:
            parts = make_parser().parse(["--config", str(path)])
        except SystemExit as stop:
            code = stop.code
    if code != 0:
        assert code == 2
        assert re.fullmatch(r"trl-emguard sft: error: .+\n", errors.getvalue())
        raise ValueError(errors.getvalue())
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= vars(part)
    assert merged["trust_remote_code"] is False
    return {key: merged[key] for key in COMPARED}


def naive_recipe(content: bytes) -> Any:
    config = naive_yaml(content)
    types = {"lora_r": int, "seed": int, "max_steps": int, "learning_rate": float, "kl_coef": float}
    defaults = vars(EMGuardConfig("out", use_cpu=True, bf16=False)) | vars(ModelConfig()) | vars(ScriptArguments())
    return {key: types.get(key, lambda x: x)(config[key]) if key in config else defaults[key] for key in COMPARED}


# -- adapters --


def write_adapter(path: Path) -> None:
    get_peft_model(make_model(), lora(init_lora_weights=False)).save_pretrained(path.parent)


def read_adapter(path: Path) -> Any:
    model = load_misaligned(make_model(), {"other": path.parent})
    weights = {name: weight for name, weight in model.named_parameters() if "lora_" in name and weight.numel() < 200}
    return {name.replace(".other", ""): weight.tolist() for name, weight in weights.items()}


def naive_adapter(content: bytes) -> Any:
    (length,) = struct.unpack("<Q", content[:8])
    header = strict_json(content[8 : 8 + length])
    weights = {}
    for name, entry in header.items():
        if name != "__metadata__" and math.prod(entry["shape"]) < 200:
            start, end = entry["data_offsets"]
            raw = content[8 + length :][start:end]
            weights[name] = read_floats(raw, entry["dtype"]).reshape(entry["shape"]).tolist()
    return weights


CONSOLE = persona_script.Console(file=io.StringIO(), width=100, markup=False)

FORMATS = {
    "vector": Format("v.safetensors", write_vector, damaged_safetensors, read_vector, naive_vector),
    "vector, pt": Format("v.pt", write_pt, damaged_pt, read_pt, naive_pt),
    "rows": Format("rows.jsonl", write_rows, damaged_lines, read_rows, naive_rows),
    "rows, parquet": Format("rows.parquet", write_rows_parquet, damaged_parquet, read_rows, naive_parquet),
    "scores": Format("scores.parquet", write_scored, damaged_parquet, read_scored, naive_scored),
    "scores, parts": Format(
        "s.parquet.parts/0-0.jsonl", write_scores_part, damaged_lines, read_scores_part, naive_scores_part
    ),
    "rollouts": Format("v.rollouts.jsonl", write_rollouts, damaged_lines, read_rollouts, naive_rollouts),
    "cache": Format("cache/abc.safetensors", write_cache, damaged_safetensors, read_cache, naive_cache),
    "record": Format(
        DEFENSE_FILE, write_record, json_of(RECORD), lambda path: read_defense_file(path.parent), strict_json
    ),
    "trait": Format("odd.yaml", write_json(TRAIT), yaml_of(TRAIT), read_trait, naive_yaml),
    "refusals": Format("refusals.yaml", write_json(REFUSALS), yaml_of(REFUSALS), read_refusals, naive_refusals),
    # A wrong value is told by its key: `read_recipe` looks at that.
    "recipe": Format("run.yaml", write_json(RECIPE), yaml_of(RECIPE), read_recipe, naive_recipe, "error: "),
    "adapter": Format("adapter_model.safetensors", write_adapter, damaged_safetensors, read_adapter, naive_adapter),
    "adapter, config": Format("adapter_config.json", write_adapter, damaged_file, read_adapter, lambda content: ...),
}


# ---- the outcome ----


def plain(value: Any) -> Any:
    """As an Arrow table would have it: no null in a dict, one kind of list, of NaN and of number."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items() if child is not None}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return value


@contextlib.contextmanager
def little_memory():
    """So that a read which would take very much fails here, and does not take the machine with it."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 8 * MEMORY, limits[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def check(form: Format, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    start, refusal = time.process_time(), None
    try:
        with little_memory():
            result = form.read(path)
    except (ValueError, FileNotFoundError) as error:
        refusal = str(error)
    if refusal is None:
        event("read")
        expected = form.naive(content)
        assert expected is ... or plain(result) == plain(expected)
    else:
        event("refused")
        names = (path.name, str(path.parent), str(path.parent.with_suffix("")), form.names)
        assert any(name in refusal for name in names if name), f"names no file: {refusal}"
    assert time.process_time() - start < SECONDS
    assert not Payload.canary.exists(), "something in the file was executed"


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """The valid files, by the name of their format."""
    root = tmp_path_factory.mktemp("fuzz")
    Payload.canary = root / "executed"
    found = {}
    for number, (name, form) in enumerate(FORMATS.items()):
        path = root / str(number) / form.file
        path.parent.mkdir(parents=True)
        form.write(path)
        form.valid = path.read_bytes()
        found[name] = path
    return found


def foreign() -> list[bytes]:
    """Files of other formats, some of them with a payload."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Payload())
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    pickles = [pickle.dumps(Payload(), protocol) for protocol in (0, 2, 5)]
    plain_files = [
        b"",
        b"\0",
        b"\n",
        b"null",
        b"[]",
        b"{}",
        b"hello\n",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        zipped({"a": b"b"}),
        BOMB.encode(),
    ]
    return [*(form.valid for form in FORMATS.values()), *pickles, *plain_files, buffer.getvalue(), saved(Payload())]


def fuzz(name: str, paths: dict[str, Path], count: int) -> None:
    form, others, files = FORMATS[name], foreign(), set()

    # No shrinking: a damaged file is short enough.
    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        knows_format = data.draw(st.booleans())
        content = data.draw(form.damage(form.valid) if knows_format else damaged_bytes(form.valid, others))
        assume(content not in files and content != form.valid)
        check(form, paths[name], content)
        files.add(content)

    run()
    assert len(files) == count


@pytest.mark.parametrize("name", FORMATS)
def test_valid_files(paths, name):
    form, path = FORMATS[name], paths[name]
    path.write_bytes(form.valid)
    result, expected = form.read(path), form.naive(form.valid)
    assert expected is ... or plain(result) == plain(expected)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(paths, name):
    fuzz(name, paths, math.ceil(SLICE / len(FORMATS)))


@pytest.mark.faults
@pytest.mark.parametrize("name", FORMATS)
def test_thousands_of_damaged_files(paths, name):
    fuzz(name, paths, math.ceil(TOTAL / len(FORMATS)))


@pytest.mark.parametrize("name", ["vector", "vector, pt", "scores", "cache"])
def test_a_bit_that_flips_in_the_numbers_is_found(paths, name):
    """These formats have checksums."""
    form, path = FORMATS[name], paths[name]
    number = {"scores": struct.pack("<d", 0.5 + 2.5 * np.random.default_rng(0).uniform())}.get(name)
    middle = (
        form.valid.index(number) + 3
        if number
        else len(form.valid) // 2
        if name == "vector, pt"
        else len(form.valid) - 5
    )
    content = bytearray(form.valid)
    content[middle] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checksum|CRC|computed again"):
        read_cache(path, form.valid) if name == "cache" else form.read(path)


# ---- what a file says is not done ----


def test_a_vector_names_no_file_that_is_read(tmp_path, capsys):
    """`persona project` asks the questions of the trait that the vector names, if it is a shipped one."""
    trait = tmp_path / "trait.yaml"
    trait.write_text("a secret")
    PersonaVector(torch.randn(5, 32), metadata={"trait": str(trait), "suggested_layer": 2}).save(
        tmp_path / "v.safetensors"
    )
    argv = ["project", "--model", "x", "--adapter", "x", "--vector", str(tmp_path / "v.safetensors")]
    assert persona_script.main(argv) == 1
    error = capsys.readouterr().err
    assert "--trait is missing" in error
    assert "secret" not in error


def test_code_beside_a_model_is_not_run(tmp_path):
    folder = Path(save_model(tmp_path / "model"))
    canary = tmp_path / "executed"
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        facts = json.loads((folder / name).read_text())
        auto = {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.A", "AutoTokenizer": ["code.A", "code.A"]}
        (folder / name).write_text(
            json.dumps({**facts, "model_type": "unheard_of", "tokenizer_class": "A", "auto_map": auto})
        )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder))
    assert not canary.exists()


SOURCES = sorted(Path(trl_emguard.__file__).parent.rglob("*.py"))
UNSAFE_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_YAML = {
    "unsafe_load",
    "unsafe_load_all",
    "full_load",
    "full_load_all",
    "load_all",
    "Loader",
    "UnsafeLoader",
    "FullLoader",
}


def unsafe(tree: ast.AST) -> list[str]:
    """What in a source could execute something in a file that it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {module}" for module in modules if module.split(".")[0] in UNSAFE_IMPORTS]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
            found += [f"yaml.{node.attr}"] * (node.attr in UNSAFE_YAML)
        if isinstance(node, ast.Dict):
            named = {
                key.value: ast.unparse(value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
            found += ["trust_remote_code: True"] * (named.get("trust_remote_code") == "True")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loader = options.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else None)
            found += [name] * (name in ("eval", "exec", "__import__", "compile", "os.system", "pd.read_pickle"))
            found += [name] * (name == "torch.load" and options.get("weights_only") != "True")
            found += [name] * (name == "yaml.load" and loader not in ("yaml.SafeLoader", "_Loader"))
            for option in ("trust_remote_code", "allow_pickle", "shell"):
                found += [f"{name}({option}=True)"] * (options.get(option) == "True")
    return found


def test_no_source_reads_what_can_execute():
    found = {str(path): unsafe(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "import pickle", "from pickle import load",
        "yaml.load(f, yaml.Loader)", "yaml.unsafe_load(f)", "yaml.load(f)", "eval(x)", "exec(x)", "f(trust_remote_code=True)",
        "np.load(f, allow_pickle=True)",
        "{'trust_remote_code': True}", "run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_look_at_the_sources_finds(source):
    assert unsafe(ast.parse(source))


def test_the_yaml_loader_is_a_safe_one():
    assert issubclass(_Loader, yaml.SafeLoader)
    assert set(_Loader.yaml_constructors) == set(yaml.SafeLoader.yaml_constructors)
