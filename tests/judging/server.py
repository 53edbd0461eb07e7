"""A server of chat completions on loopback: a model's greedy answers and log-probabilities, and faults on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


KEY = "planted-3f9c1e77a0"
# A fault: number of the request, from 0, and its handler → True if it has answered in the model's place.
Fault = Callable[[int, "Handler"], bool]


class Server(ThreadingHTTPServer):
    """The server.

    Args:
        model, tokenizer: the model that answers.
        fault: fault of some requests.
        has_logprobs: False for a server that refuses to send log-probabilities.
    """

    daemon_threads = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        fault: Fault | None = None,
        has_logprobs: bool = True,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.fault, self.has_logprobs = model, tokenizer, fault, has_logprobs
        self.lock = threading.Lock()
        self.requests = 0
        self.answered: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone: the tests kill some."""

    def count(self) -> int:
        with self.lock:
            self.requests += 1
            return self.requests - 1

    @torch.no_grad()
    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return a greedy completion in the form of OpenAI's endpoint."""
        before = self.tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True)["input_ids"]
        ids, content = list(before), []
        with self.lock:
            while len(ids) < len(before) + asked["max_tokens"]:
                logs = (
                    self.model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
                )
                top = logs.topk(asked.get("top_logprobs") or 1)
                tokens = [self.tokenizer.decode([token]) for token in top.indices.tolist()]
                likely = [{"token": t, "logprob": p} for t, p in zip(tokens, top.values.tolist(), strict=True)]
                ids.append(int(logs.argmax()))
                if ids[-1] == self.tokenizer.eos_token_id:
                    break
                content.append(likely[0] | {"top_logprobs": likely})
            self.answered.append(asked["messages"][-1]["content"])
        text = self.tokenizer.decode(ids[len(before) :], skip_special_tokens=True)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if asked.get("logprobs"):
            choice["logprobs"] = {"content": content}
        spent = {"prompt_tokens": len(before), "completion_tokens": len(ids) - len(before), "total_tokens": len(ids)}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        return about | {"choices": [choice], "usage": spent}


class Handler(BaseHTTPRequestHandler):
    server: Server
    prompt: str

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompt = asked["messages"][-1]["content"]
        if self.server.fault is not None and self.server.fault(self.server.count(), self):
            return
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.send(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        elif asked.get("logprobs") and not self.server.has_logprobs:
            self.send(400, {"error": {"message": "logprobs is not supported"}})
        else:
            self.send(200, self.server.complete(asked))

    def send(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(*args: Any, **options: Any) -> Iterator[Server]:
    """Start a server in a thread, and stop it at the end."""
    server = Server(*args, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- faults ----


def from_request(first: int, answer: Callable[["Handler"], None]) -> Fault:
    """Return a fault of all requests from one on."""

    def fault(number: int, handler: Handler) -> bool:
        if number < first:
            return False
        answer(handler)
        return True

    return fault


def unauthorised(handler: Handler) -> None:
    # Some servers repeat the key.
    handler.send(401, {"error": {"message": f"Incorrect API key provided: {KEY}.", "code": "invalid_api_key"}})


def refusing(status: int, is_refused: Callable[[str], bool] = bool, code: str = "refused") -> Fault:
    """Return a fault by which some prompts are refused; the reason repeats the key.

    With some codes, such as `content_filter`, inspect_ai returns the reason as a reply and raises no error.
    """

    def fault(number: int, handler: Handler) -> bool:
        if not is_refused(handler.prompt):
            return False
        handler.send(status, {"error": {"message": f"Not served to {KEY}: too long", "code": code}})
        return True

    return fault


def storm(handler: Handler) -> None:
    handler.send(429, {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}})


def malformed(handler: Handler) -> None:
    handler.send(200, b'{"id": "1", "choices": [{"index": 0, "mess')


def no_completion(handler: Handler) -> None:
    handler.send(200, {"status": "ok"})


def no_choices(handler: Handler) -> None:
    handler.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []})


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def silent(handler: Handler) -> None:
    time.sleep(60)
