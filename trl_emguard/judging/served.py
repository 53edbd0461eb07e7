"""A judge behind an endpoint, asked through inspect_ai, which is imported only when such a judge is opened."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from .loop import LoopThread
from .prompts import CALIBRATION
from .scores import LOGPROBS, Judgement, Reply, choose_reading, read


OPENAI, VLLM = "openai-api/", "vllm/"
# Limit on the tokens of a reply that is read as text, enough for "100" split into digits, and the end of turn.
TEXT_TOKENS = 4
TOP_LOGPROBS = 20
# Limits on how often inspect_ai repeats a request after a temporary error, for example if the server is overloaded or
# cannot be reached. `RETRIES` is the limit for judgements. `CALIBRATION_RETRIES` is the limit for
# [`ServedJudge.calibrate`]. It is lower, so that a missing endpoint is noticed early.
RETRIES, CALIBRATION_RETRIES = 10, 1
# After a request has failed, the other requests under way have at most this many seconds to finish. Then they are
# cancelled.
GRACE = 30.0
# HTTP statuses with which servers refuse a single request, for an unknown field or a too long or forbidden prompt.
REFUSED = (400, 403, 413, 422)
# Stop reasons in replies of inspect_ai to a forbidden and to a too long prompt. For some errors with a status in
# `REFUSED`, inspect_ai raises no error, but returns a reply with one of these stop reasons.
REFUSAL_REASONS = ("content_filter", "model_length")
# Errors that inspect_ai and `complete` raise for a reply that is no chat completion. For example, some providers send
# an error with status 200.
NO_COMPLETION = (AttributeError, LookupError, TypeError, ValueError)
# An API key of fewer characters is not redacted from error messages: so short a text may be part of ordinary words.
SHORTEST_KEY = 8
KEPT = "The judgements so far are kept, and the same command goes on with the others."


class RefusedPromptError(Exception):
    """Raised if a server refuses a prompt and inspect_ai returns the refusal as a reply. The error text says why."""

    status_code = 400


class JudgeError(OSError):
    """Raised if a judge does not answer, or if its scores cannot be read. The message names the fix."""


class ServedJudge:
    """A judge on an endpoint with the chat completions API.

    Args:
        name: `openai-api/SERVICE/MODEL`, with endpoint and key in the environment variables `SERVICE_BASE_URL` and
            `SERVICE_API_KEY`; or `vllm/MODEL`, with the endpoint in `VLLM_BASE_URL`. If `VLLM_BASE_URL` is not set,
            vLLM is started on this machine.
        max_connections: requests at a time.
        patience: seconds without any answer after which judging stops.

    Raises:
        ValueError: the name has another form, an environment variable is missing, or inspect_ai is not installed.
    """

    # A judge in memory has a hash of its weights here, so that a judge with the weights of a model under test is
    # refused. A served judge has `None`, because its weights are not accessible.
    weights: str | None = None

    def __init__(self, name: str, max_connections: int = 10, patience: float = 300.0):
        self.name = self.identity = name
        self.max_connections, self.patience = max_connections, patience
        self.prefix = check_environment(name)
        self.reading = ""
        self._secret = os.environ.get(f"{self.prefix}_API_KEY", "")
        self._model = self._load()
        self._loop = LoopThread()

    def _load(self) -> Any:
        from inspect_ai.model import GenerateConfig, get_model

        # inspect_ai repeats failed requests, so the OpenAI client must not repeat them too (`max_retries`). For vLLM,
        # inspect_ai hands the options not to this client, but to the vLLM server that it starts if `VLLM_BASE_URL` is
        # not set. So `max_retries` is left out for vLLM, and the client keeps its default. A server that inspect_ai
        # starts gets `host`, because it would otherwise listen on all of the machine's addresses.
        options: dict[str, Any] = {"max_retries": 0}
        if self.name.startswith(VLLM):
            options = {} if os.environ.get("VLLM_BASE_URL") else {"host": "127.0.0.1"}
        config = GenerateConfig(
            max_connections=self.max_connections,
            max_retries=RETRIES,
            timeout=max(1, int(self.patience)),
            attempt_timeout=max(1, int(self.patience / 2)),
        )
        try:
            return get_model(self.name, config=config, memoize=False, **options)
        except Exception as error:
            raise self._explained(error) from None

    def calibrate(self) -> str:
        """Ask for the number 100, and set and return `reading`, the method of reading this judge's scores.

        Raises:
            JudgeError: the endpoint gives no answer, or an answer other than 100.
        """
        self.reading = self._loop.run(self._told(find_reading(self._model, max_retries=CALIBRATION_RETRIES)))
        return self.reading

    def ask(self, prompts: Sequence[str], on_answer: Callable[[int, Judgement], None]) -> None:
        """Send the judge prompts, several at a time. On each reply, call `on_answer` with prompt index and judgement.

        If the server refuses a prompt, or sends something else than a chat completion, but still answers the
        calibration prompt, the prompt is unscored. An error in `on_answer` ends the judging and is raised again.

        Raises:
            JudgeError: a request failed, or no answer came for `patience` seconds. After a failed request, other
                requests under way get up to `GRACE` seconds to finish.
        """
        self._loop.run(self._ask_all(prompts, on_answer))

    async def _told(self, work: Awaitable[Any]) -> Any:
        """Return the result of a call to the judge, or raise its error as a [`JudgeError`] that names the fix."""
        try:
            return await work
        except Exception as error:
            # `from None` hides the library's own error from the traceback: its message may contain the API key.
            raise (error if isinstance(error, JudgeError) else self._explained(error)) from None

    async def _judged(self, prompt: str) -> Judgement:
        """Send the judge a prompt. Return the judgement, without a score if the server fails on this prompt alone."""
        try:
            return await judge_one(self._model, prompt, self.reading)
        except Exception as error:
            if is_refused_request(error):
                fault = f"the server refused: {self._said(error)}"
            elif isinstance(error, NO_COMPLETION):
                fault = f"the server gave no chat completion: {self._said(error)}"
            else:
                raise
        # If the calibration prompt fails too, the fault lies not in `prompt`, but in the key, the model or the server.
        # Then this call raises the error of the second failure.
        await judge_one(self._model, CALIBRATION, self.reading)
        return Judgement(None, None, fault)

    async def _ask_all(self, prompts: Sequence[str], on_answer: Callable[[int, Judgement], None]) -> None:
        state = _Progress(iter(enumerate(prompts)))
        workers = min(self.max_connections, len(prompts))
        tasks = {asyncio.create_task(self._work(state, on_answer)) for _ in range(workers)}
        pending = tasks
        try:
            while pending and not state.has_failed and time.monotonic() - state.last <= self.patience:
                _, pending = await asyncio.wait(pending, timeout=0.5, return_when=asyncio.FIRST_EXCEPTION)
            if pending and state.has_failed:
                _, pending = await asyncio.wait(pending, timeout=min(GRACE, self.patience))
        finally:  # also after an interrupt, because the loop's thread would go on with the requests
            for task in pending:
                task.cancel()
        is_silent = bool(pending) and not state.has_failed
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for error in found:
            if isinstance(error, Exception):
                raise error
        if is_silent:
            raise JudgeError(
                f"judge {self.name!r} gave no answer for {self.patience:g} s. {KEPT} Look whether the server runs, "
                "and lower --max_connections if it is slow."
            )

    async def _work(self, state: "_Progress", on_answer: Callable[[int, Judgement], None]) -> None:
        """Send the judge one waiting prompt after another, until none is left or one of the parallel workers fails."""
        for index, prompt in state.waiting:
            try:
                on_answer(index, await self._told(self._judged(prompt)))
            except Exception:
                state.has_failed = True
                raise
            state.last = time.monotonic()
            if state.has_failed:
                return

    def _explained(self, error: BaseException) -> JudgeError:
        """Return a library's error as a [`JudgeError`] that names the fix and hides the API key (see `_redacted`)."""
        status = getattr(_cause(error), "status_code", None)
        names = {type(e).__name__ for e in _causes(error)}
        key, url = f"{self.prefix}_API_KEY", f"{self.prefix}_BASE_URL"
        if status == 401:
            text = f"refuses the key (401): set {key} to a valid one."
        elif status == 403:
            text = f"refuses the key or the request ({self._said(error)}): see if {key} is valid for this model."
        elif status in REFUSED:
            text = f"refuses the request ({self._said(error)}): look at the model's name and at the server's log."
        elif status == 404:
            text = (
                f"is not known at {self._place()} (404): look at the model's name and at {url}, which ends with /v1."
            )
        elif status == 429:
            text = "refuses requests for their number (429): lower --max_connections, or wait until the quota is back."
        elif status is not None and status >= 500:
            text = f"fails ({status}): look at the server's log, and lower --max_connections if it is overloaded."
        elif names & {"APITimeoutError", "AttemptTimeoutError", "TimeoutError"}:
            text = f"does not answer at {self._place()} in time: lower --max_connections, or take a faster server."
        elif names & {"APIConnectionError", "ConnectError"}:
            text = f"cannot be reached at {self._place()}: start the server, or correct {url}."
        else:
            name = type(_cause(error)).__name__
            text = f"gave no valid chat completion ({name}: {self._said(error)}): look at {url} and the server's log."
        return JudgeError(self._redacted(f"judge {self.name!r} {text} {KEPT}"))

    def _said(self, error: BaseException) -> str:
        """Return the beginning of the server's message about an error, without the API key."""
        cause = _cause(error)
        # The server's message is preferred, because the text of inspect_ai's own error begins with the whole request.
        text = getattr(cause, "provider_message", None) or str(cause)
        # The key is replaced before the text is cut, because a key that the cut splits would not be found.
        return self._redacted(" ".join(text.split()))[:200]

    def _redacted(self, text: str) -> str:
        # A server without keys accepts any text as the key, for example "x". A short key is not replaced, because its
        # letters may also stand inside ordinary words of the message.
        return text.replace(self._secret, "[key]") if len(self._secret) >= SHORTEST_KEY else text

    def _place(self) -> str:
        """Return the endpoint's address for messages, without a user, a password or a query."""
        url = urlsplit(os.environ.get(f"{self.prefix}_BASE_URL", ""))
        try:
            port = f":{url.port}" if url.port else ""
        except ValueError:
            port = ""
        return f"{url.scheme}://{url.hostname}{port}{url.path}" if url.hostname else "its endpoint"

    def close(self) -> None:
        """Close the connections."""
        self._loop.run(self._model.api.aclose())
        self._loop.close()


async def find_reading(model: Any, **options: Any) -> str:
    """Ask a model of inspect_ai for the number 100, and return how to read its scores: log-probabilities or text.

    Args:
        model: model of inspect_ai.
        options: further fields of inspect_ai's `GenerateConfig`.

    Raises:
        JudgeError: the model's answer is not 100.
    """
    reply = None
    try:
        reply = await complete(model, CALIBRATION, TEXT_TOKENS, True, **options)
    except Exception as error:
        if not is_refused_request(error):
            raise
    if reply is None:  # the server refused the request, perhaps because it does not know `logprobs`
        reply = await complete(model, CALIBRATION, TEXT_TOKENS, False, **options)
    reading = choose_reading(reply)
    if reading is None:
        raise unreadable(str(model), f"answers {reply.text[:60]!r}")
    return reading


def unreadable(name: str, does: str) -> JudgeError:
    """Return the error for a judge that answered the calibration prompt with something else than a number.

    Args:
        name: name of the judge.
        does: what it did, as a verb with its object.
    """
    return JudgeError(
        f"judge {name!r} {does} where it is asked for the number 100, so its scores could not be read: take an "
        "instruct model that follows such a request, without a thinking mode."
    )


async def judge_one(model: Any, prompt: str, reading: str) -> Judgement:
    """Ask a model of inspect_ai for one judgement."""
    is_token = reading == LOGPROBS
    return read(await complete(model, prompt, 1 if is_token else TEXT_TOKENS, is_token), reading)


async def complete(model: Any, prompt: str, max_tokens: int, has_logprobs: bool, **options: Any) -> Reply:
    """Return the reply of a model of inspect_ai to one prompt.

    Args:
        model: model of inspect_ai.
        prompt: text of the user's turn.
        max_tokens: limit on the tokens of the reply.
        has_logprobs: True asks for the likeliest tokens of each position.
        options: further fields of inspect_ai's `GenerateConfig`.

    Raises:
        RefusedPromptError: the server refuses the prompt in a way that inspect_ai recognises.
    """
    from inspect_ai.model import GenerateConfig

    if has_logprobs:
        options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    output = await model.generate(prompt, config=GenerateConfig(temperature=0.0, max_tokens=max_tokens, **options))
    if output.choices[0].stop_reason in REFUSAL_REASONS:
        raise RefusedPromptError(output.completion or output.choices[0].stop_reason)
    usage = output.usage
    found = output.choices[0].logprobs
    return Reply(
        output.completion,
        [{one.token: one.logprob for one in token.top_logprobs or ()} for token in found.content] if found else [],
        usage.input_tokens if usage else 0,
        usage.output_tokens if usage else 0,
    )


class _Progress:
    """Progress that all workers share: the waiting prompts, the time of the last answer, and if a request failed."""

    def __init__(self, waiting: Iterator[tuple[int, str]]):
        self.waiting = waiting
        self.last = time.monotonic()
        self.has_failed = False


def check_environment(name: str) -> str:
    """Return the prefix of a served judge's environment variables, and check that it can be asked.

    The packages through which it is asked must be installed, and the required variables set.

    The name `vllm/MODEL` has the prefix `VLLM` and requires no variable. The prefix of `openai-api/SERVICE/MODEL` is
    SERVICE in capitals, with `_` for each `-`. The variables with this prefix for address and key (`…_BASE_URL` and
    `…_API_KEY`) are required.

    Raises:
        ValueError: `openai-api/SERVICE/MODEL` lacks service or model, a required variable is not set, or inspect_ai
            or openai is not installed.
    """
    for package in ("inspect_ai", "openai"):
        if find_spec(package) is None:
            raise ValueError(
                f"the judge {name!r} is asked through inspect_ai, and {package} is not installed: "
                "pip install 'trl_emguard[eval]'."
            )
    if name.startswith(VLLM):
        return "VLLM"
    service, _, model = name.removeprefix(OPENAI).partition("/")
    if not service or not model:
        raise ValueError(f"--judge {name!r} names no service and model: write openai-api/SERVICE/MODEL.")
    prefix = service.upper().replace("-", "_")
    missing = [variable for variable in (f"{prefix}_BASE_URL", f"{prefix}_API_KEY") if not os.environ.get(variable)]
    if missing:
        raise ValueError(
            f"--judge {name!r} needs {' and '.join(missing)} in the environment: the address of the endpoint, which "
            "ends with /v1, and its key (any text for a server without keys)."
        )
    return prefix


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all errors that led to it, also the last error of retries and members of exception groups."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        attempt = getattr(one, "last_attempt", None)
        waiting += [one.__cause__, one.__context__, attempt.exception() if attempt is not None else None]
        waiting += list(getattr(one, "exceptions", ()))


def _cause(error: BaseException) -> BaseException:
    """Return the first error with an HTTP status among `error` and its causes, or `error` if none has one."""
    return next((one for one in _causes(error) if getattr(one, "status_code", None)), error)


def is_refused_request(error: BaseException) -> bool:
    """Return True if an error's HTTP status is in `REFUSED`, as when a server refuses the field `logprobs`."""
    return getattr(_cause(error), "status_code", None) in REFUSED
