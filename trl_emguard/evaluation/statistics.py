"""Intervals by the bootstrap over questions."""

from typing import NamedTuple

import numpy as np


DRAWS = 10_000
LEVEL = 0.95
# Draws that are computed at once, so that memory does not grow with the number of draws.
_CHUNK = 500


class Interval(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        value: the mean over all samples that have a value.
        low, high: percentiles 2.5 and 97.5 over the draws; NaN with fewer than two questions.
        n: number of samples with a value.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of samples with its percentile interval, by drawing questions.

    The unit that is drawn is the question (Betley et al., 2502.17424): the samples of one question resemble each
    other. Missing values (NaN) count neither in the mean nor in `n`.

    Args:
        values: `(Q, S)`, or `(Q,)` for one sample a question.
        seed: seed of the draws. The same seed draws the same questions for all arrays that have values for the same
            number of questions.
    """
    sums, counts = _by_question(values)
    has_values = counts > 0
    sums, counts = sums[has_values], counts[has_values]
    if not len(sums):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(value, float("nan"), float("nan"), int(counts.sum()))
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, DRAWS, _CHUNK):
        drawn = random.integers(len(sums), size=(min(_CHUNK, DRAWS - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), int(counts.sum()))


def paired(values: np.ndarray, base: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean difference to the base over the questions that both have values for, with its interval.

    Args:
        values, base: `(Q, S)` and `(Q, S')` for the same questions, or `(Q,)`.
        seed: seed of the draws.
    """
    return bootstrap(question_means(values) - question_means(base), seed)


def question_means(values: np.ndarray) -> np.ndarray:
    """Return the mean of each question's values `(Q,)`, NaN where a question has none."""
    sums, counts = _by_question(values)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _by_question(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values of each question, missing ones left out."""
    values = np.asarray(values, dtype=np.float64)
    values = values.reshape(len(values), -1)
    return np.nansum(values, axis=1), (~np.isnan(values)).sum(1)
