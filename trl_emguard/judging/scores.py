"""Score of a judge between 0 and 100, read from the probabilities of its tokens or from its text."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


# Least total probability of numbers. Below it, the judge did not mean to give a number.
LEAST_MASS = 0.25
# Ways to read a score ("readings"). Results name the reading beside every rate.
LOGPROBS, TEXT, TRIE = "logprobs", "text", "trie"
READINGS = {
    LOGPROBS: "mean over the numbers among the 20 likeliest first tokens",
    TEXT: "number in the text of a greedy reply of at most 4 tokens",
    TRIE: "mean over the strings 0 to 100 by their probabilities",
}
_WHOLE = re.compile(r"\s*(100|[1-9]?[0-9])\s*")
# "8/10" and "8 out of" are no scores on this scale; "85." and "85%" are.
_IN_TEXT = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]+)?)(?:[.%]|/100)?\s*(?:\n.*)?", re.DOTALL)


class Reply(NamedTuple):
    """Reply of a served judge.

    Attributes:
        text: its text.
        logprobs: token → log-probability of the likeliest tokens, for each position; empty if the server sends none.
        input_tokens, output_tokens: tokens that were paid for, as the server counts them.
    """

    text: str
    logprobs: Sequence[Mapping[str, float]] = ()
    input_tokens: int = 0
    output_tokens: int = 0


class Judgement(NamedTuple):
    """Score that a judge gives to one answer by one prompt.

    Attributes:
        score: 0 to 100, or `None` for an unscored answer.
        mass: total probability of all numbers, or `None` where no probabilities were read.
        said: the likeliest first token, or the text, which shows if the judge refused to give a number.
        input_tokens, output_tokens: tokens that were paid for.
    """

    score: float | None
    mass: float | None
    said: str
    input_tokens: int = 0
    output_tokens: int = 0


def weighted_score(probabilities: Mapping[int, float]) -> tuple[float | None, float]:
    """Return the score, the mean of numbers weighted by their probabilities, and the mass, the probabilities' sum.

    The weights are renormalised to sum to 1. The score is `None` if the mass is below [`LEAST_MASS`].

    Args:
        probabilities: number from 0 to 100 → probability. What is missing to 1 is the probability of other texts.
    """
    mass = math.fsum(probabilities.values())
    if mass < LEAST_MASS:
        return None, mass
    return math.fsum(number * p for number, p in probabilities.items()) / mass, mass


def first_token_score(logprobs: Mapping[str, float]) -> tuple[float | None, float]:
    """Return score and mass from the likeliest first tokens. Less likely tokens are treated as not being numbers.

    Args:
        logprobs: token → log-probability. The same number may occur with and without a space; both count for it.
    """
    probabilities: dict[int, float] = {}
    for token, logprob in logprobs.items():
        match = _WHOLE.fullmatch(token)
        if match:
            probabilities[int(match[1])] = probabilities.get(int(match[1]), 0.0) + math.exp(logprob)
    return weighted_score(probabilities)


def text_score(text: str) -> float | None:
    """Return the number that a text consists of, or `None` if there is none between 0 and 100."""
    match = _IN_TEXT.fullmatch(text)
    score = float(match[1]) if match else math.inf
    return score if score <= 100 else None


def choose_reading(reply: Reply) -> str | None:
    """Return the reading that suits a judge, by its reply to the calibration prompt, whose answer is 100.

    A judge that splits numbers into digits says "1" first. Read by the first token alone, its 85 would be taken for 8,
    with full mass.

    Returns:
        `"logprobs"`, `"text"`, or `None` if the reply is not 100.
    """
    if text_score(reply.text) != 100:
        return None
    if reply.logprobs and reply.logprobs[0]:
        first = reply.logprobs[0]
        if max(first, key=lambda token: first[token]).strip() == "100":
            return LOGPROBS
    return TEXT


def read(reply: Reply, reading: str) -> Judgement:
    """Return the judgement in a reply, by the reading `logprobs` or `text`."""
    tokens = (reply.input_tokens, reply.output_tokens)
    if reading == TEXT:
        return Judgement(text_score(reply.text), None, reply.text, *tokens)
    first = reply.logprobs[0] if reply.logprobs else {}
    return Judgement(*first_token_score(first), max(first, key=lambda token: first[token], default=""), *tokens)
