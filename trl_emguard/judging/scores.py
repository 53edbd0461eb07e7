"""Scores from 0 to 100 that a judge model gives, read from token probabilities or from the text of its reply."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


# Least mass (total probability of the numbers 0 to 100) that gives a score. With less mass, the judge is taken not to
# have meant a number.
LEAST_MASS = 0.25
# Methods of reading a judge's score ("readings"): `LOGPROBS` and `TEXT` for a judge asked through inspect_ai, `TRIE`
# for a judge in memory (`local.py`). An evaluation's results name the reading in each row that comes from a judge.
LOGPROBS, TEXT, TRIE = "logprobs", "text", "trie"
READINGS = {
    LOGPROBS: "mean over the numbers among the 20 likeliest first tokens",
    TEXT: "number in the text of a greedy reply of at most 4 tokens",
    TRIE: "mean over the strings 0 to 100 by their probabilities",
}
_WHOLE = re.compile(r"\s*(100|[1-9]?[0-9])\s*")
# "8/10" and "8 out of" are not read as scores from 0 to 100; "85." and "85%" are.
_IN_TEXT = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]+)?)(?:[.%]|/100)?\s*(?:\n.*)?", re.DOTALL)


class Reply(NamedTuple):
    """Reply of a judge that is asked through inspect_ai.

    Attributes:
        text: text of the reply.
        logprobs: token → log-probability of the likeliest tokens, for each position; empty if the server sends none.
        input_tokens, output_tokens: number of tokens in the prompt and in the reply, as the server counts and bills
            them; 0 if it sends no counts.
    """

    text: str
    logprobs: Sequence[Mapping[str, float]] = ()
    input_tokens: int = 0
    output_tokens: int = 0


class Judgement(NamedTuple):
    """Score that a judge gives to one answer, in reply to one prompt.

    Attributes:
        score: 0 to 100, or `None` for an unscored answer.
        mass: total probability of all numbers, or `None` if no probabilities were read.
        said: the likeliest first token of the reply, or the whole reply. It shows if a judge refused to give a number.
        input_tokens, output_tokens: number of tokens that the judge read and wrote.
    """

    score: float | None
    mass: float | None
    said: str
    input_tokens: int = 0
    output_tokens: int = 0


def weighted_score(probabilities: Mapping[int, float]) -> tuple[float | None, float]:
    """Return the score (mean of the numbers, weighted by probability) and the mass (sum of the probabilities).

    The weights are renormalised to sum to 1. The score is `None` if the mass is below [`LEAST_MASS`].

    Args:
        probabilities: number from 0 to 100 → probability. The rest up to 1 is the probability of any other text.
    """
    mass = math.fsum(probabilities.values())
    if not mass >= LEAST_MASS:  # true also if the mass is NaN
        return None, mass
    return math.fsum(number * p for number, p in probabilities.items()) / mass, mass


def first_token_score(logprobs: Mapping[str, float]) -> tuple[float | None, float]:
    """Return score and mass, as [`weighted_score`] does, from the likeliest candidates for a reply's first token.

    Less likely tokens are treated as not being numbers.

    Args:
        logprobs: token → log-probability. A number may occur as several tokens, with and without a space. Their
            probabilities are added.
    """
    probabilities: dict[int, float] = {}
    for token, logprob in logprobs.items():
        match = _WHOLE.fullmatch(token)
        if match:
            probabilities[int(match[1])] = probabilities.get(int(match[1]), 0.0) + math.exp(logprob)
    return weighted_score(probabilities)


def text_score(text: str) -> float | None:
    """Return the number from 0 to 100 that stands alone on a text's first line, or `None` if there is none."""
    match = _IN_TEXT.fullmatch(text)
    score = float(match[1]) if match else math.inf
    return score if score <= 100 else None


def choose_reading(reply: Reply) -> str | None:
    """Return how to read a judge's scores (a key of `READINGS`). Its reply to a request for the number 100 decides.

    A judge whose tokenizer splits numbers into digits says "1" first, so it must be read by its text. Its first token
    alone would turn an 85 into 8, with full mass.

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
    """Return the judgement that a reply contains. `reading` says how to find it: `logprobs` or `text`."""
    tokens = (reply.input_tokens, reply.output_tokens)
    if reading == TEXT:
        return Judgement(text_score(reply.text), None, reply.text, *tokens)
    first = reply.logprobs[0] if reply.logprobs else {}
    said = max(first, key=lambda token: first[token], default=reply.text)
    return Judgement(*first_token_score(first), said, *tokens)
