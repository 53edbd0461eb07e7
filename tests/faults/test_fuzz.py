"""Test damaged and hostile files: every reader refuses a file with a clear error, or reads its content.

Each format has a valid file, damage that knows the format, and a naive reader (the standard library, numpy, plain
pyarrow). A file that is not refused must be read as the naive reader reads it. Nothing in a file is executed, a read
takes little memory and time, and a refusal is a `ValueError` that names the file.

`make test` reads a tenth of the damaged files, `make test-faults` all of them.
"""

import contextlib
import io
import json
import math
import pickle
import resource
import struct
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from fuzz_damage import BOMB, Payload, damaged_bytes, saved, zipped
from fuzz_formats import FORMATS, Format
from fuzz_plain import plain
from fuzz_tensors import read_cache
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from tiny import save_model

from trl_emguard.evaluation import load_model
from trl_emguard.persona.vectors import PersonaVector
from trl_emguard.scripts import persona as persona_script


# Libraries may warn about a damaged file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning"),
]
TOTAL, SLICE = 2000, 200
SECONDS = 10  # seconds of processor time, for a file of some kB
MEMORY = 512 * 2**20  # bytes beyond those of the process


@contextlib.contextmanager
def little_memory():
    """Make a read that takes far too much memory fail before the machine runs out of it."""
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
    """Return the valid files, by the name of their format."""
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
    """Return files of other formats, some of them with a payload."""
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

    # Damaged files are short, so hypothesis need not shrink them.
    @settings(
        max_examples=count,
        derandomize=True,
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
    """Refuse every damaged file of a format with checksums."""
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


# ---- a file cannot make the package act ----


def test_a_vector_names_no_file_that_is_read(tmp_path, capsys):
    """Let a vector's metadata choose questions only among the shipped traits (`persona project`)."""
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
