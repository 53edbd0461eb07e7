"""Confidence intervals of means, by the bootstrap: questions are drawn with replacement."""

import math
from typing import NamedTuple

import numpy as np


DRAWS = 10_000
LEVEL = 0.95
# Least number of questions for an interval that comes from draws. With five, even the span of all values misses their
# true median in 6 % of cases.
LEAST_QUESTIONS = 6
# Number of draws that are computed at once. The limit keeps memory from growing with the number of all draws.
_CHUNK = 500


class Interval(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        value: the mean over all samples that have a value.
        low, high: ends of the 95 % interval; NaN if fewer than `LEAST_QUESTIONS` have values. For a rate that is the
            same for all questions, two are enough.
        n: number of samples with a value.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap(values: np.ndarray, seed: int = 0, limits: tuple[float, float] | None = None) -> Interval:
    """Return the mean of all samples, with its percentile interval from a bootstrap that draws questions.

    Whole questions are drawn and not single samples (Betley et al., 2502.17424), because the samples of one question
    resemble each other. Missing values (NaN) are left out of the mean and of `n`.

    If all n questions have the same mean, every draw has it too, and the interval has no width. A rate of 0 does not
    show that the property never occurs. The exact interval of 0 out of n (Clopper and Pearson, 1934) says that at most
    the share 1 - 0.025^(1/n) of all questions is different. So the interval of a rate then holds the means that are
    possible if this share has one of the `limits` instead.

    Args:
        values: `(Q, S)`: S samples of each of Q questions; or `(Q,)` for one sample per question.
        seed: seed of the draws. The draws depend only on the seed and on the number of questions that have values.
        limits: the least and the greatest possible value, for a rate or a difference of rates; `None` for others.
    """
    sums, counts = _by_question(values)
    has_values = counts > 0
    sums, counts = sums[has_values], counts[has_values]
    questions, samples = len(sums), int(counts.sum())
    if not questions:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(sums.sum() / samples)
    if limits is not None and questions > 1 and np.ptp(sums / counts) < 1e-9:  # equal, but for rounding
        reach = 1 - ((1 - LEVEL) / 2) ** (1 / questions)
        low, high = (value + reach * (limit - value) for limit in limits)
        return Interval(value, low, high, samples)
    if questions < LEAST_QUESTIONS:
        return Interval(value, math.nan, math.nan, samples)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, DRAWS, _CHUNK):
        drawn = random.integers(questions, size=(min(_CHUNK, DRAWS - start), questions))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), samples)


def paired(values: np.ndarray, base: np.ndarray, seed: int = 0, limits: tuple[float, float] | None = None) -> Interval:
    """Return the mean over questions of `values` minus `base`, with its interval.

    Samples of a question are averaged first, so that each question counts alike, however many samples have a value.
    Only questions that have values in both arrays count.

    Args:
        values, base: `(Q, S)` and `(Q, S')` for the same questions, or `(Q,)`.
        seed, limits: as for [`bootstrap`]. The limits are those of the difference.
    """
    return bootstrap(question_means(values) - question_means(base), seed, limits)


def is_rate(*arrays: np.ndarray) -> bool:
    """Return True if all values are 0 or 1, apart from missing ones (NaN)."""
    return all(np.isin(values[~np.isnan(values)], (0, 1)).all() for values in arrays)


def question_means(values: np.ndarray) -> np.ndarray:
    """Return the mean of each question's values, `(Q,)`; NaN for a question without values."""
    sums, counts = _by_question(values)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _by_question(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of each question's values, `(Q,)` each, without missing values (NaN)."""
    values = np.asarray(values, dtype=np.float64)
    values = values.reshape(len(values), -1)
    return np.nansum(values, axis=1), (~np.isnan(values)).sum(1)
