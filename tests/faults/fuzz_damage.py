"""Damage to files: some that knows no format, and some for each format."""

import copy
import io
import json
import math
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from hypothesis import event
from hypothesis import strategies as st
from tiny import make_model

from trl_emguard.selection.scored import METADATA_KEY


ATOMS = [
    None, True, False, 0, -1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, math.nan, math.inf, -math.inf, "", " ",
    "x", "0.5",
    "../../etc/passwd", "/etc/passwd", "~/x", "\0", "\ud800", "a\u2028b", "[/bold]", "{question}", [], {}, [[]],
    [None], {"a": 1},
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
    """An object whose unpickling creates a file."""

    canary: Path

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@st.composite
def damaged_bytes(draw, valid: bytes, others: list[bytes]):
    """Return damage that knows no format."""
    data = bytearray(valid)
    kind = draw(
        st.sampled_from(["cut", "flip", "insert", "remove", "double", "blank", "other", "join", "size", "crlf"])
    )
    event(kind)
    start = draw(st.integers(0, len(data) - 1))
    end = min(len(data), start + draw(st.sampled_from([1, 2, 8, 64, 1000])))
    if kind in ("cut", "remove"):
        del data[start : None if kind == "cut" else end]
    elif kind == "flip":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "insert":
        data[start:start] = draw(st.sampled_from(CHUNKS) | st.binary(min_size=1, max_size=9))
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
    """Return the path of every part of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] + [deeper for key, child in children for deeper in places(child, (*place, key))]


@st.composite
def damaged_json(draw, value: Any):
    """Return a JSON value as text, with a part of it replaced, left out, added or given twice."""
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
    """Return JSONL with one line damaged as JSON."""
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
    """Return damage in the header, whose length stays right, or in the vector's metadata."""
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
    """Return archives with valid checksums that hold no tensor, or a tensor that is no vector."""
    numbers = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    kind = draw(st.sampled_from(["thing", "pickle", "packed"]))
    event(f"pt {kind}")
    if kind == "thing":
        things = [
            Payload(), [Payload()], {"vectors": numbers}, [numbers], None, 3, "x", numbers.long(), numbers.bool(),
            numbers.cfloat(),
            numbers[0], numbers[0, 0], numbers[None], numbers[:1], numbers[:0], numbers[:, :0], numbers * math.nan,
            numbers * 1e30,
            numbers.double() * 1e300, torch.zeros(1).expand(2**40, 2**18), torch.zeros(1).expand(5, 2**20),
            numbers.to_sparse(),
            numbers.to("meta"), torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8), numbers.bfloat16(),
            numbers.half(),
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
    """Return tables with other columns, values, types and metadata."""
    table = pyarrow.parquet.read_table(io.BytesIO(valid))
    metadata = dict(table.schema.metadata or {})
    names = table.column_names
    kind = draw(st.sampled_from(["column", "drop", "facts", "features", "rows", "twice", "pictures", "extension"]))
    event(f"parquet {kind}")
    index = draw(st.integers(0, len(names) - 1))
    count = len(table)
    if kind == "column":
        columns = [
            [None] * count, [math.nan] * count, [math.inf] + [0.5] * (count - 1), ["x"] * count, [1] * count,
            [True] * count,
            [[0.5]] * count, [{"role": "user"}] * count, [b"\xff"] * count, [0.5] * (count - 1) + [None],
            pyarrow.array([2**62] * count), pyarrow.array([0.5] * count, pyarrow.float16()),
            pyarrow.array(["a"] * count).dictionary_encode(), pyarrow.array([1] * count, pyarrow.timestamp("s",
            "Nowhere/Here")),
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
    BOMB, "&a [*a]", "a: &a {b: *a}", "!!python/object/apply:os.system [touch canary]", "!!python/name:os.system ''",
    "!!map x",
    "!!int ''", "!!bool x", "!!timestamp x", "2001-13-01", "!!binary zz=", "!!set {a, b}", "!!omap [a: 1]",
    "? [a]\n: b", "<<: 3",
    "a: 1\na: 2", "%YAML 9.9\n---\na: 1", "a: *b", "a: 1\n--- \nb: 1", "[" * 3000, "- " * 3000, "{a: " * 3000,
    "a: |\n  \x07",
    "9" * 5000, "0x" + "f" * 5000,
    'a: "\\ud800"', "a: !<tag:yaml.org,2002:python/object/new:os.system> [x]",
]  # fmt: skip


@st.composite
def damaged_yaml(draw, value: dict):
    """Return JSON, which is YAML too, or syntax that only YAML has, alone or as the value of a key."""
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
