"""Compare intervals with a plain loop on the same draws, and with what is known of them."""

import math

import numpy as np
import pytest

from trl_emguard.evaluation.statistics import DRAWS, bootstrap, is_rate, paired, question_means


nan = math.nan


def plain_bootstrap(values, seed=0):
    """Draw questions one draw at a time, from the same generator in the same order."""
    questions = [[v for v in row if not math.isnan(v)] for row in values]
    questions = [row for row in questions if row]
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, DRAWS, 500):
        for drawn in random.integers(len(questions), size=(min(500, DRAWS - start), len(questions))):
            pooled = [v for i in drawn for v in questions[i]]
            means.append(sum(pooled) / len(pooled))
    pooled = [v for row in questions for v in row]
    return sum(pooled) / len(pooled), *np.quantile(means, [0.025, 0.975]), len(pooled)


@pytest.mark.parametrize(
    "values",
    [
        [[0.0], [1.0], [4.0], [-2.0], [0.5], [3.0]],
        [[1.0, 2.0], [nan, 5.0], [nan, nan], [3.0, 3.0], [4.0, 0.0], [1.0, nan], [2.0, 7.0]],
        [[1.0, 0.0, 1.0], [0.0, 0.0, nan], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, nan, nan], [0.0, 0.0, 1.0]],
    ],
)
def test_equals_a_plain_loop(values):
    assert bootstrap(np.array(values)) == pytest.approx(plain_bootstrap(values))


def test_ties_give_no_width():
    assert bootstrap(np.full(20, 0.3)) == pytest.approx((0.3, 0.3, 0.3, 20))


@pytest.mark.parametrize(
    ("values", "limits", "low", "high"),
    [
        (np.zeros((24, 5)), (0, 1), 0.0, 0.142),
        (np.ones(24), (0, 1), 0.858, 1.0),
        (np.zeros(24), (-1, 1), -0.142, 0.142),
        (np.ones(5), (-1, 1), -0.044, 1.0),  # as an exact test of signs: 5 of 5 are not enough, 6 of 6 are
        (np.ones(6), (-1, 1), 0.081, 1.0),
        ([*np.zeros(12), nan], (0, 1), 0.0, 0.265),
    ],
)
def test_ties_of_a_rate_have_the_exact_width(values, limits, low, high):
    """The width is that of Clopper and Pearson at 0 out of n questions, however many samples each of them has."""
    assert bootstrap(np.array(values), limits=limits)[1:3] == pytest.approx((low, high), abs=1e-3)


def test_a_rate_s_values_are_0_and_1():
    assert is_rate(np.array([[0.0, 1.0], [nan, 1.0]]))
    assert not is_rate(np.zeros(2), np.array([0.0, 0.5]))


@pytest.mark.parametrize("count", [1, 5, 6])
def test_few_questions_have_a_value_and_no_interval(count):
    """Five questions are too few: even the span of all their values holds the median in less than 95 % of cases."""
    values = np.arange(2.0 * count).reshape(count, 2)
    for found, n in ((bootstrap(values), 2 * count), (paired(values, np.zeros(count)), count)):
        assert (found.value, found.n) == (values.mean(), n)
        assert math.isnan(found.low) == math.isnan(found.high) == (count < 6)


def test_no_value_at_all():
    assert bootstrap(np.full((3, 2), nan)).n == 0


def test_the_interval_covers_what_it_should():
    """Count how often the interval of 40 normal numbers covers their true mean: 95 % with room for 200 trials."""
    random = np.random.default_rng(1)
    covers = [low <= 0.5 <= high for _, low, high, _ in (bootstrap(random.normal(0.5, 1, 40)) for _ in range(200))]
    assert 0.88 <= np.mean(covers) <= 0.99


def test_pairs_cancel_what_questions_share():
    random = np.random.default_rng(0)
    base = random.normal(0, 10, 50)
    found = paired(base + 1 + random.normal(0, 0.1, 50), base)
    assert found.value == pytest.approx(1, abs=0.1)
    assert found.high - found.low < 0.2
    alone = bootstrap(base)
    assert alone.high - alone.low > 2


def test_each_question_counts_alike_in_a_difference():
    """Fewer coherent answers to the question with the most misaligned ones are no fall of the rate."""
    base, defended = np.full((7, 100), nan), np.full((7, 100), nan)
    for values, counts in ((base, [(10, 100), (50, 100)]), (defended, [(18, 90), (6, 10)])):
        for question, (hits, answers) in enumerate([*counts, *[(0, 1)] * 5]):
            values[question, :answers] = np.arange(answers) < hits
    assert bootstrap(defended).value < bootstrap(base).value
    assert paired(defended, base).value == pytest.approx((18 / 90 - 10 / 100 + 6 / 10 - 50 / 100) / 7)


def test_a_pair_with_a_missing_side_does_not_count():
    assert paired(np.array([1.0, nan, 3.0, 4.0]), np.array([0.0, 5.0, nan, 1.0])).n == 2


def test_means_of_questions():
    means = question_means(np.array([[1.0, 3.0], [nan, nan], [nan, 2.0]]))
    assert means[[0, 2]].tolist() == [2.0, 2.0]
    assert math.isnan(means[1])
