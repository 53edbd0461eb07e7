"""Formats of tensors: vectors, the reference cache and adapters, each with a writer and two readers."""

import contextlib
import io
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fuzz_plain import read_floats, strict_json
from peft import get_peft_model
from tiny import lora, make_model

from trl_emguard.persona.vectors import PersonaVector, load_vector
from trl_emguard.reference.state_files import StateFiles
from trl_emguard.scripts import persona as persona_script
from trl_emguard.selection.misaligned import load_misaligned


CONSOLE = persona_script.Console(file=io.StringIO(), width=100, markup=False)


# ---- vectors ----


def write_vector(path: Path) -> None:
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    layers = [0.5, 0.6, 0.7, 0.8, 0.9]
    counts = {"suggested_layer": 2, "pairs": 4, "kept": 3, "heldout": 5}
    facts = {"trait": "evil", "model": "tiny", "weights": {"a": "00000000"}, "rule": "judge", **counts}
    facts |= dict.fromkeys(("auroc", "separation", "random_auroc", "state_norms"), layers)
    PersonaVector(vectors, metadata=facts).save(path)


def read_vector(path: Path) -> Any:
    vector = load_vector(path)
    # The command that shows a vector must not fail either.
    with mock.patch.object(persona_script, "Console", return_value=CONSOLE), contextlib.redirect_stderr(io.StringIO()):
        assert persona_script.main(["inspect", str(path), "--picture", os.devnull]) == 0
    assert vector.vectors.dtype == torch.float32
    return vector.vectors.tolist(), vector.kind, vector.metadata


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
    """Read an archive of one tensor, whose checksums the standard library compares."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
    vectors = torch.load(io.BytesIO(content), weights_only=True)
    assert vectors.untyped_storage().nbytes() >= vectors.numel() * vectors.element_size()
    return vectors.float().tolist()


# ---- the reference cache ----


def make_cache(folder: Path) -> StateFiles:
    return StateFiles(folder, ["last", "2"], 4, torch.float32)


def write_cache(path: Path) -> None:
    cache = make_cache(path.parent)
    generator = torch.Generator().manual_seed(0)
    states = {name: torch.randn(1 + 2 + 3, 4, generator=generator) for name in cache.names}
    cache.write([bytes([i]) * 16 for i in range(3)], [1, 2, 3], states)
    (made,) = path.parent.glob("*.safetensors")
    made.rename(path)


def read_cache(path: Path, of: bytes | None = None) -> Any:
    """Read a file as the cache does.

    Its name carries the checksum of `of`, by default of its own bytes, as if it was damaged on purpose.
    """
    content = path.read_bytes()
    for other in path.parent.glob("*"):
        other.unlink()
    (path.parent / f"abc-{zlib.crc32(content if of is None else of):08x}.safetensors").write_bytes(content)
    cache = make_cache(path.parent)
    with mock.patch("trl_emguard.reference.state_files.logger"):
        cache.delete_damaged()
    cache.read()
    if not cache.keys:
        raise ValueError(f"{path} is dropped, and what was in it is computed again")
    return {key.hex(): {name: states.tolist() for name, states in cache.states([key]).items()} for key in cache.keys}


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


# ---- adapters ----


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
