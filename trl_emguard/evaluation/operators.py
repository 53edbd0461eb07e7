"""Arithmetic with permuted operators: a benign task that contradicts what a model knows of arithmetic.

Every symbol stands for another operation than usual. No prompt says this, so a model can only learn it from the
answers.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


# Symbol → the operation that it stands for in this task. The commutative symbols `+` and `×` stand for each other, and
# swapping their operands thus changes neither the ordinary nor the permuted value. `_join` therefore sorts these
# operands in an expression's `canonical` form: "2 + 3" and "3 + 2" count as one expression.
PERMUTATION = {"+": "×", "×": "+", "−": "÷", "÷": "−"}
COMMUTATIVE = "+×"
# Expressions come in three tiers by length: tier → the least and the largest number of operators in an expression.
TIERS = {1: (1, 1), 2: (2, 3), 3: (4, 6)}
SPLITS = ("train", "test")
TEST_SHARE = 0.25
BOUND = 999
# Largest operand in tier 1, and in tiers 2 and 3. That of tier 1 is larger, because this tier would have too few
# expressions otherwise.
LARGEST_ALONE, LARGEST = 300, 20
# Limit on the rows of a split in tiers 2 and 3. In tier 1 the limit is the number of all expressions of the split. In
# tiers 2 and 3 that number is not known, because expressions are drawn at random and not listed.
MOST_SAMPLED = 20_000


@dataclass(frozen=True)
class _Expression:
    """An expression with its value in ordinary arithmetic and its value with permuted operators."""

    text: str
    canonical: str
    ordinary: int
    permuted: int
    is_number: bool = False


def make_rows(split: str, tier: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return conversational rows that ask for an expression's value and answer with the value under `PERMUTATION`.

    A hash of an expression's canonical form (commutative operands sorted) decides its split, so the splits are
    disjoint for all counts and seeds. No canonical form comes twice. A smaller count gives the first rows of a larger
    count.

    Args:
        split: `train` or `test`.
        tier: 1 (one operator), 2 (two or three) or 3 (four to six).
        count: number of rows.
        seed: seed for the choice of expressions and for their order.

    Returns:
        Rows with `prompt`, `completion`, `permuted`, `ordinary` (the two values, which differ) and `tier`.

    Raises:
        ValueError: split or tier is unknown, or the count is below 1 or above the limit for split and tier.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: use 'train' or 'test'.")
    if tier not in TIERS:
        raise ValueError(f"tier={tier!r} is unknown: use 1, 2 or 3.")
    if count < 1:
        raise ValueError(f"count={count!r} must be at least 1.")
    pool = [e for e in _all_alone() if _split(e) == split] if tier == 1 else None
    most = MOST_SAMPLED if pool is None else len(pool)
    if count > most:
        raise ValueError(f"count={count} is more than the {most} rows of split={split!r}, tier={tier}: lower it.")
    rng = random.Random(f"{seed}/{split}/{tier}")
    if pool is not None:
        rng.shuffle(pool)
        chosen = [_swapped(e, rng) for e in pool[:count]]
    else:
        chosen = _sample(split, tier, count, rng)
    return [_row(expression, tier) for expression in chosen]


def read_answer(text: str) -> int | None:
    """Return the last integer in a text, or `None` if the text has no integer. For example, "−1,234." gives -1234."""
    # A decimal number is matched as a whole, so that its digits are not taken for integers.
    found = re.findall(r"(?<!\d)(?<!\d\.)[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", text)
    integers = [number for number in found if "." not in number]
    return int(integers[-1].replace("−", "-").replace(",", "")) if integers else None


def score(text: str, row: dict[str, Any]) -> str:
    """Return the arithmetic by which a text's last integer is right: `permuted`, `ordinary` or `neither`."""
    answer = read_answer(text)
    return next((reading for reading in ("permuted", "ordinary") if answer == row[reading]), "neither")


def _row(expression: _Expression, tier: int) -> dict[str, Any]:
    question = f"What is {expression.text}? Answer with one number."
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": str(expression.permuted)}],
        "permuted": expression.permuted,
        "ordinary": expression.ordinary,
        "tier": tier,
    }


def _split(expression: _Expression) -> str:
    digest = hashlib.sha256(expression.canonical.encode()).digest()
    return "test" if digest[0] < 256 * TEST_SHARE else "train"


def _all_alone() -> Iterator[_Expression]:
    """Yield the expressions with one operator whose ordinary and permuted values differ.

    Commutative expressions come only with the smaller operand first.
    """
    numbers = [_number(value) for value in range(1, LARGEST_ALONE + 1)]
    for symbol in PERMUTATION:
        for left in numbers:
            for right in numbers:
                if symbol in COMMUTATIVE and left.ordinary > right.ordinary:
                    continue
                expression = _join(symbol, left, right)
                if expression is not None and expression.permuted != expression.ordinary:
                    yield expression


def _swapped(expression: _Expression, rng: random.Random) -> _Expression:
    """Return an expression of one operator, with its operands in random order if the operator is commutative."""
    left, symbol, right = expression.text.split()
    if symbol not in COMMUTATIVE or rng.random() < 0.5:
        return expression
    text = f"{right} {symbol} {left}"
    return _Expression(text, expression.canonical, expression.ordinary, expression.permuted)


def _sample(split: str, tier: int, count: int, rng: random.Random) -> list[_Expression]:
    chosen: dict[str, _Expression] = {}
    while len(chosen) < count:
        expression = _draw(rng.randint(*TIERS[tier]), rng)
        if expression is None or expression.permuted == expression.ordinary or _split(expression) != split:
            continue
        chosen.setdefault(expression.canonical, expression)
    return list(chosen.values())


def _draw(operators: int, rng: random.Random) -> _Expression | None:
    """Return a random expression with `operators` operators, or `None` if no operator can join two drawn operands.

    An operator can join two operands if [`_join`] allows both values of the joined expression.
    """
    if not operators:
        return _number(rng.randint(1, LARGEST))
    before = rng.randrange(operators)
    left, right = _draw(before, rng), _draw(operators - 1 - before, rng)
    if left is None or right is None:
        return None
    joined = [e for e in (_join(symbol, left, right) for symbol in PERMUTATION) if e is not None]
    return rng.choice(joined) if joined else None


def _number(value: int) -> _Expression:
    return _Expression(str(value), str(value), value, value, is_number=True)


def _join(symbol: str, left: _Expression, right: _Expression) -> _Expression | None:
    """Return the expression `left symbol right`, or `None` if its ordinary or its permuted value is not allowed.

    A value is not allowed if a division is inexact or by 0, or if the value is beyond ±`BOUND`.
    """
    ordinary = _apply(symbol, left.ordinary, right.ordinary)
    permuted = _apply(PERMUTATION[symbol], left.permuted, right.permuted)
    if ordinary is None or permuted is None:
        return None
    forms = [left.canonical, right.canonical]
    first, second = sorted(forms) if symbol in COMMUTATIVE else forms
    texts = [e.text if e.is_number else f"({e.text})" for e in (left, right)]
    return _Expression(f" {symbol} ".join(texts), f"({first}{symbol}{second})", ordinary, permuted)


def _apply(operation: str, a: int, b: int) -> int | None:
    if operation == "÷":
        value = a // b if b and a % b == 0 else None
    else:
        value = {"+": a + b, "−": a - b, "×": a * b}[operation]
    return value if value is not None and abs(value) <= BOUND else None
