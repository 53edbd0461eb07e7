"""The interface of a judge, and opening of one by its name."""

from collections.abc import Callable, Sequence
from typing import Protocol

from ..models.load import load_tokenizer
from ..models.shipped import resolve_model
from .scores import Judgement
from .served import OPENAI, VLLM, ServedJudge, check_environment


HF = "hf:"


class Judge(Protocol):
    """Interface of a judge, which scores answers: a model in memory (`local.py`) or on an endpoint (`served.py`).

    Attributes:
        name: its name in the results.
        identity: its name in the journal of judgements. A local judge's also contains a hash of its weights.
        reading: key of `READINGS` that tells how its scores are read; empty until `calibrate` has found the key.
        weights: hash of its weights, or `None` for a served judge, whose weights are not accessible.
    """

    name: str
    identity: str
    reading: str
    weights: str | None

    def calibrate(self) -> str: ...

    def ask(self, prompts: Sequence[str], on_answer: Callable[[int, Judgement], None]) -> None: ...

    def close(self) -> None: ...


def open_judge(name: str, max_connections: int = 10, patience: float = 300.0) -> Judge:
    """Return a judge by its name.

    Args:
        name: `openai-api/SERVICE/MODEL` or `vllm/MODEL` for a judge on an endpoint, `hf:MODEL` for one in memory.
        max_connections: requests at a time to an endpoint.
        patience: seconds without any answer from an endpoint after which judging stops.

    Raises:
        ValueError: [`check_name`] refuses the name, a local model cannot judge, or a served judge is named and
            inspect_ai is not installed.
        OSError: a local model is not found.
    """
    check_name(name, max_connections)
    if not name.startswith(HF):
        return ServedJudge(name, max_connections, patience)

    from .local import load_local

    return load_local(HF, name.removeprefix(HF))


def check_name(name: str, max_connections: int = 10) -> None:
    """Refuse a judge's name of no known form, an endpoint that is not set in the environment, or a missing model.

    This loads no more than a local judge's tokenizer.

    Raises:
        ValueError: the name is refused, or `max_connections` is below 1; the message says what to write.
        OSError: a local model is not found.
    """
    if max_connections < 1:
        raise ValueError(f"--max_connections={max_connections} must be 1 or more.")
    if name.startswith((OPENAI, VLLM)):
        check_environment(name)
    elif name.startswith(HF):
        load_tokenizer(resolve_model(name.removeprefix(HF)))
    else:
        raise ValueError(
            f"--judge {name!r} is of no known kind: write hf:MODEL for a model in memory, openai-api/SERVICE/MODEL "
            "for an endpoint, or vllm/MODEL."
        )
