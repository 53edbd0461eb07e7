"""Test journals, locks and suggestions."""

import json
import sys

import pytest

from trl_emguard.io.files import locked
from trl_emguard.io.journal import ForeignJournalError, Journal
from trl_emguard.io.lookup import did_you_mean


HEADER = {"answers_of": "abc"}
RECORDS = [{"text": "é\u2028\x85"}, [1, [0.5, 2.0]], "x"]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "folder" / "answers.jsonl", HEADER)


def test_a_journal_brings_back_its_records(journal):
    assert journal.read() == []
    journal.start(RECORDS[:1])
    journal.append(RECORDS[1:2])
    journal.append(RECORDS[2:])
    assert journal.read() == RECORDS
    lines = journal.path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [HEADER, *RECORDS]
    journal.start(RECORDS[:2])
    assert journal.read() == RECORDS[:2]


def test_an_interrupted_line_is_discarded_wherever_it_ends(journal):
    journal.start(RECORDS)
    content = journal.path.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content)):
        journal.path.write_bytes(content[:length])
        assert journal.read() == RECORDS[: max(0, sum(end < length for end in ends) - 1)]


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b'{"answers_of": "abd"}\n', b"\xff\n", b"\n", b'{"answers_of"\n']
)
def test_a_file_of_another_computation_is_refused(journal, content):
    journal.start()
    journal.path.write_bytes(content)
    with pytest.raises(ForeignJournalError, match="its first line is not"):
        journal.read()


@pytest.mark.parametrize("line", [b"oops", b"", b'"\xff"', b'{"a": 1, "a": 2}'])
def test_a_corrupt_line_is_refused(journal, line):
    journal.start(RECORDS[:1])
    journal.path.write_bytes(journal.path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        journal.read()
    assert not isinstance(refusal.value, ForeignJournalError)


def hold(folder):
    with locked("--out", folder):
        pass


def test_a_folder_is_locked_once(tmp_path):
    with locked("--out", tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        hold(tmp_path)
    hold(tmp_path)


@pytest.mark.parametrize("is_windows", [True, False])
def test_a_system_without_locks_is_no_error(tmp_path, monkeypatch, is_windows):
    def refuse(*_):
        raise OSError("no locks available")

    if is_windows:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    with locked("--out", tmp_path):
        hold(tmp_path)


def test_suggestions():
    assert did_you_mean("evill", ("evil", "sycophantic")) == " Did you mean 'evil'?"
    assert did_you_mean("cheerful", ("evil", "sycophantic")) == ""
    assert did_you_mean("evi", {"evil": 1}, cutoff=0.95) == ""


def test_a_failed_append_leaves_no_half_line(tmp_path):
    journal = Journal(tmp_path / "answers.jsonl", {"answers_of": "x"})
    journal.start(["kept"])

    def failing():
        yield "a record that is longer than what follows"
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        journal.append(failing())
    journal.append(["next"])
    assert journal.read() == ["kept", "next"]
