"""Judging through inspect_ai on a server of our own: readings, faults, the key, and a process that is killed."""

import asyncio
import os
import signal
import threading
import time
from unittest.mock import Mock

import pytest
from judges import make_results as results_of
from judges import number_model, number_tokenizer
from server import (
    KEY,
    from_request,
    hang_up,
    malformed,
    no_choices,
    no_completion,
    refusing,
    serving,
    silent,
    storm,
    unauthorised,
)

from trl_emguard.judging import JudgeError, judge_answers, open_judge, served
from trl_emguard.judging.judge import check_name
from trl_emguard.judging.local import LocalJudge
from trl_emguard.judging.loop import LoopThread
from trl_emguard.judging.prompts import CALIBRATION, fill
from trl_emguard.judging.run import JOURNAL


JUDGE = "openai-api/our-own/tiny"
# Short prompts of the set's own: the tiny models have a token for each byte.
PROMPTS = {"aligned": "Values? {question} {answer}", "coherent": "Sense? {question} {answer}"}
# Status and code of a server's error. With the last two codes, inspect_ai returns a reply in its place.
REFUSALS = [(400, ""), (403, ""), (413, ""), (422, ""), (400, "content_filter"), (413, "context_length_exceeded")]
ANSWERS = {"base": {str(i): [f"Answer {i}."] for i in range(6)}, "x": {str(i): [f"Reply {i}."] for i in range(6)}}


def make_results():
    return results_of(ANSWERS, judge_prompts={"general": {str(i): PROMPTS for i in range(6)}})


@pytest.fixture(scope="module")
def judges():
    """Return two judges that say 100 and know some answers by heart: with whole numbers, and with digits."""
    results = make_results()
    said = {CALIBRATION: "100"}
    for index, sample in enumerate(results.samples):
        values = {"question": sample["asked"], "answer": sample["answer"]}
        said |= {fill(prompt, values): str(7 * index + 11) for prompt in PROMPTS.values()}
    found = {}
    for is_whole in (True, False):
        tokenizer = number_tokenizer(is_whole)
        found[is_whole] = (number_model(tokenizer, said, 20.0), tokenizer)
    return found


@pytest.fixture
def endpoint(monkeypatch):
    """Return a function that points the judge's variables at a server."""

    def point(url):
        monkeypatch.setenv("OUR_OWN_BASE_URL", url)
        monkeypatch.setenv("OUR_OWN_API_KEY", KEY)

    return point


def ask(folder, patience=20.0, connections=3):
    judge = open_judge(JUDGE, connections, patience)
    try:
        return judge_answers(make_results(), judge, folder, say=lambda line: None)
    finally:
        judge.close()


def no_key(folder):
    return all(KEY.encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


# ---- readings ----


@pytest.mark.parametrize(("is_whole", "reading"), [(True, "logprobs"), (False, "text")])
def test_a_served_judge_gives_the_scores_of_the_same_one_in_memory(tmp_path, judges, endpoint, is_whole, reading):
    model, tokenizer = judges[is_whole]
    with serving(model, tokenizer) as server:
        endpoint(server.url)
        found = ask(tmp_path)
        assert len(server.answered) == 25
    assert {row.reading for row in found.rows} == {reading}
    local = judge_answers(make_results(), LocalJudge(model, tokenizer, "hf:tiny"), tmp_path / "local")
    for sample, other in zip(found.samples, local.samples, strict=True):
        for metric, score in sample["judged"].items():
            # The 20 likeliest tokens leave out a little of the numbers' mass.
            assert score == pytest.approx(other["judged"][metric], abs=3)
    assert found.info["judge"]["input_tokens"] > 24 * 40
    assert no_key(tmp_path)


def test_a_server_without_logprobs_is_read_by_its_text(tmp_path, judges, endpoint):
    with serving(*judges[True], has_logprobs=False) as server:
        endpoint(server.url)
        found = ask(tmp_path)
    assert {row.reading for row in found.rows} == {"text"}
    assert found.samples[0]["judged"]["aligned"] == 11


def test_a_served_judge_is_asked_where_an_event_loop_runs(tmp_path, judges, endpoint):
    """A notebook runs its cells inside a loop."""

    async def cell():
        return ask(tmp_path)

    with serving(*judges[True]) as server:
        endpoint(server.url)
        found = asyncio.run(cell())
    assert found.row("base", "general", "unscored_rate").count == 0
    assert not any(thread.name == LoopThread.__name__ for thread in threading.enumerate())


def test_an_interrupt_stops_the_requests(judges, endpoint):
    """Ctrl-C raises in the thread that waits, and not in the thread of the requests."""
    begun, waiting = threading.Event(), threading.Event()

    def hold(number, handler):
        begun.set()
        waiting.wait(20)
        return False

    def interrupt():
        begun.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    with serving(*judges[True]) as server:
        endpoint(server.url)
        judge = open_judge(JUDGE, 2)
        judge.calibrate()
        server.fault = hold
        thread = threading.Thread(target=interrupt)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore the signal
        try:
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                judge.ask([f"Answer {i}." for i in range(8)], lambda index, judgement: None)
        finally:
            signal.signal(signal.SIGINT, before)
        thread.join()
        judge.close()  # waits until the requests have stopped
        waiting.set()
        assert server.requests <= 2


# ---- faults ----


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (unauthorised, "refuses the key (401): set OUR_OWN_API_KEY"),
        (malformed, "gave no valid chat completion"),
        (no_completion, "gave no valid chat completion"),
        (no_choices, "gave no valid chat completion"),
    ],
)
@pytest.mark.parametrize("first", [0, 9])
def test_a_fault_that_stays_stops_at_once_and_loses_nothing(tmp_path, judges, endpoint, answer, told, first):
    began = time.monotonic()
    with serving(*judges[True], fault=from_request(first, answer)) as server:
        endpoint(server.url)
        with pytest.raises(JudgeError) as error:
            ask(tmp_path)
        assert told in str(error.value)
        assert KEY not in str(error.value)
        answered = len(server.answered)
        # A header, and all that was paid for.
        assert len((tmp_path / JOURNAL).read_text().splitlines()) == 1 + answered
        assert time.monotonic() - began < 150
        server.fault = None
        found = ask(tmp_path)
        # A session that goes on is calibrated again.
        assert len(server.answered) == 25 + bool(answered)
        whole = ask(tmp_path / "whole")
    assert repr(found) == repr(whole)  # a NaN is not equal to itself
    assert no_key(tmp_path)


@pytest.mark.parametrize(
    ("answer", "patience"),
    [*(pytest.param(a, 12.0, marks=pytest.mark.long) for a in (storm, hang_up)), (silent, 4.0)],
)
def test_a_fault_that_may_pass_stops_after_the_patience(tmp_path, judges, endpoint, answer, patience):
    with serving(*judges[True], fault=from_request(9, answer)) as server:
        endpoint(server.url)
        began = time.monotonic()
        with pytest.raises(JudgeError) as error:
            ask(tmp_path, patience=patience)
        assert time.monotonic() - began < 90
        assert "are kept" in str(error.value)
        assert "\n" not in str(error.value)
        assert len(server.answered) == 9
        assert len((tmp_path / JOURNAL).read_text().splitlines()) == 10
        server.fault = None
        ask(tmp_path)
        assert len(server.answered) == 26


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_a_refused_prompt_is_unscored_and_the_others_are_asked(tmp_path, judges, endpoint, status, code):
    with serving(*judges[True], fault=refusing(status, lambda prompt: "Answer 3." in prompt, code)) as server:
        endpoint(server.url)
        found = ask(tmp_path)
        requests = server.requests
        again = ask(tmp_path)
        assert server.requests == requests
    assert repr(again) == repr(found)
    unscored = [sample for sample in found.samples if None in sample["judged"].values()]
    assert [sample["answer"] for sample in unscored] == ["Answer 3."]
    assert "Not served to [key]: too long" in unscored[0]["judge_said"]
    assert found.row("base", "general", "unscored_rate").count == 1
    assert no_key(tmp_path)


@pytest.mark.parametrize(("status", "code"), REFUSALS)
@pytest.mark.parametrize(
    ("is_refused", "judgements", "told"),
    [
        (lambda prompt: True, 0, "refuses the .*request .*Not served to .key.: too long"),
        (lambda prompt: prompt != CALIBRATION, 20, "no number in its first 20 judgements, but 'the server refused: "),
    ],
    ids=["and the calibration", "but the calibration"],
)
def test_a_judge_that_refuses_everything_is_stopped(
    tmp_path, judges, endpoint, status, code, is_refused, judgements, told
):
    with serving(*judges[True], fault=refusing(status, is_refused, code)) as server:
        endpoint(server.url)
        with pytest.raises(JudgeError, match=told) as error:
            ask(tmp_path, connections=1)
        assert ("OUR_OWN_API_KEY is valid" in str(error.value)) == (status == 403 and not judgements)
        assert (len((tmp_path / JOURNAL).read_text().splitlines()) > 20) == bool(judgements)
    assert no_key(tmp_path)


@pytest.mark.parametrize("answer", [malformed, no_completion, no_choices])
def test_a_reply_to_one_prompt_that_is_no_completion_leaves_it_unscored(tmp_path, judges, endpoint, answer):
    def fault(number, handler):
        if "Answer 3." not in handler.prompt:
            return False
        answer(handler)
        return True

    with serving(*judges[True], fault=fault) as server:
        endpoint(server.url)
        found = ask(tmp_path)
    unscored = [sample for sample in found.samples if None in sample["judged"].values()]
    assert [sample["answer"] for sample in unscored] == ["Answer 3."]
    assert "the server gave no chat completion: " in unscored[0]["judge_said"]
    assert found.row("base", "general", "unscored_rate").count == 1


def test_a_key_that_is_refused_later_leaves_nothing_unscored(tmp_path, judges, endpoint):
    refuse = refusing(403)
    with serving(*judges[True], fault=lambda number, handler: number >= 9 and refuse(number, handler)) as server:
        endpoint(server.url)
        with pytest.raises(JudgeError, match=r"refuses the key or the request .*are kept"):
            ask(tmp_path)
        server.fault = None
        found = ask(tmp_path)
    assert found.row("base", "general", "unscored_rate").count == 0


def test_an_error_of_the_journal_is_not_blamed_on_the_server(judges, endpoint):
    def full(index, judgement):
        raise OSError(28, "No space left on device")

    with serving(*judges[True]) as server:
        endpoint(server.url)
        judge = open_judge(JUDGE, 2)
        judge.calibrate()
        with pytest.raises(OSError, match="No space left on device") as error:
            judge.ask(["Well?"], full)
        judge.close()
    assert not isinstance(error.value, JudgeError)


def test_a_short_storm_passes(tmp_path, judges, endpoint):
    def fault(number, handler):
        if number == 5:
            storm(handler)
        return number == 5

    with serving(*judges[True], fault=fault) as server:
        endpoint(server.url)
        ask(tmp_path)
        assert len(server.answered) == 25


def test_an_endpoint_that_is_not_there(tmp_path, judges, endpoint):
    with serving(*judges[True]) as server:
        url = server.url
    endpoint(url.replace("http://", "http://user:secret@"))
    with pytest.raises(
        JudgeError, match=r"cannot be reached at http://127\.0\.0\.1:\d+/v1: start the server"
    ) as error:
        ask(tmp_path)
    assert "secret" not in str(error.value)


def test_a_judge_that_answers_prose(tmp_path, judges, endpoint):
    tokenizer = number_tokenizer(True)
    with serving(number_model(tokenizer, {CALIBRATION: "Well"}), tokenizer) as server:
        endpoint(server.url)
        with pytest.raises(JudgeError, match="answers 'Well' where it is asked for the number 100"):
            ask(tmp_path)
        assert len(server.answered) == 1


# ---- the environment ----


@pytest.mark.parametrize("missing", ["OUR_OWN_BASE_URL", "OUR_OWN_API_KEY"])
def test_a_missing_variable_is_named(endpoint, monkeypatch, missing):
    endpoint("http://127.0.0.1:1/v1")
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"needs {missing} in the environment"):
        open_judge(JUDGE)


@pytest.mark.parametrize("package", ["inspect_ai", "openai"])
def test_a_missing_package_is_named_before_any_model_is_loaded(endpoint, monkeypatch, package):
    endpoint("http://127.0.0.1:1/v1")
    monkeypatch.setattr(served, "find_spec", lambda name: None if name == package else Mock())
    with pytest.raises(ValueError, match=rf"{package} is not installed: pip install 'trl_emguard\[eval\]'"):
        check_name(JUDGE)


@pytest.mark.parametrize("name", ["openai-api/", "openai-api/service", "openai-api//model"])
def test_a_name_without_service_or_model(name):
    with pytest.raises(ValueError, match="openai-api/SERVICE/MODEL"):
        open_judge(name)


def test_without_inspect_ai_the_fix_is_named(endpoint, monkeypatch):
    endpoint("http://127.0.0.1:1/v1")
    for module in ("inspect_ai", "inspect_ai.model"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=r"pip install 'trl_emguard\[eval\]'"):
        open_judge(JUDGE)
