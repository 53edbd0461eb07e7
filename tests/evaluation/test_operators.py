"""Arithmetic with permuted operators: rows against an evaluator of their own, disjoint splits, answers."""

import ast
import re
from fractions import Fraction

import pytest

from trl_emguard.evaluation.operators import BOUND, PERMUTATION, TIERS, make_rows, read_answer, score


NODES = {ast.Add: "+", ast.Sub: "−", ast.Mult: "×", ast.Div: "÷"}
APPLY = {
    "+": lambda a, b: a + b,
    "−": lambda a, b: a - b,
    "×": lambda a, b: a * b,
    "÷": lambda a, b: a / b,
}
CASES = [(split, tier) for tier in TIERS for split in ("train", "test")]


def parse(row):
    text = re.fullmatch(r"What is (.+)\? Answer with one number\.", row["prompt"][0]["content"])[1]
    for symbol, python in (("×", "*"), ("÷", "/"), ("−", "-")):
        text = text.replace(symbol, python)
    return ast.parse(text, mode="eval").body


def values(node, reading):
    """Return the values of all nodes, the root's last."""
    if isinstance(node, ast.Constant):
        return [Fraction(node.value)]
    left, right = values(node.left, reading), values(node.right, reading)
    return [*left, *right, APPLY[reading[NODES[type(node.op)]]](left[-1], right[-1])]


def canonical(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    sides = [canonical(node.left), canonical(node.right)]
    symbol = NODES[type(node.op)]
    return f"({symbol.join(sorted(sides) if symbol in '+×' else sides)})"


@pytest.fixture(scope="module")
def made():
    return {case: make_rows(*case, count=1000) for case in CASES}


def test_no_operator_keeps_its_meaning():
    assert set(PERMUTATION) == set(PERMUTATION.values()) == set(APPLY)
    assert all(symbol != other for symbol, other in PERMUTATION.items())


@pytest.mark.parametrize("case", CASES)
def test_rows_hold_under_both_readings(made, case):
    identity = {symbol: symbol for symbol in PERMUTATION}
    assert len(made[case]) == 1000
    for row in made[case]:
        node = parse(row)
        for name, reading in (("ordinary", identity), ("permuted", PERMUTATION)):
            found = values(node, reading)
            assert found[-1] == row[name]
            assert all(value.denominator == 1 and abs(value) <= BOUND for value in found)
        assert row["permuted"] != row["ordinary"]
        assert row["completion"] == [{"role": "assistant", "content": str(row["permuted"])}]
        least, most = TIERS[case[1]]
        assert least <= sum(isinstance(n, ast.BinOp) for n in ast.walk(node)) <= most
        assert row["tier"] == case[1]


@pytest.mark.parametrize("tier", TIERS)
def test_every_operator_occurs(made, tier):
    text = " ".join(row["prompt"][0]["content"] for row in made["train", tier])
    assert all(text.count(symbol) > 50 for symbol in PERMUTATION)


@pytest.mark.parametrize("tier", TIERS)
def test_splits_share_no_expression_for_any_seed(made, tier):
    train, test = ([canonical(parse(row)) for row in made[split, tier]] for split in ("train", "test"))
    other = [canonical(parse(row)) for row in make_rows("test", tier, 1000, seed=1)]
    assert len(set(train)) == len(set(test)) == len(set(other)) == 1000
    assert not set(train) & (set(test) | set(other))


@pytest.mark.parametrize("case", CASES)
def test_the_seed_decides(made, case):
    assert make_rows(*case, count=50) == made[case][:50]
    assert make_rows(*case, count=50, seed=1) != made[case][:50]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("14", 14),
        ("The answer is 14.", 14),
        ("3 + 4 = 12", 12),
        ("-5", -5),
        ("It is −5.", -5),
        ("1,234", 1234),
        ("−1,234,567.", -1234567),
        ("3, 4", 4),
        ("**42**", 42),
        ("_42_", 42),
        ("10−5", 5),
        ("12cm", 12),
        ("7 or 2.5x", 7),
        ("Answer...12", 12),
        ("0", 0),
        ("2.5", None),
        ("no number", None),
        ("", None),
    ],
)
def test_read_answer(text, answer):
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reading"), [("It is 12.", "permuted"), ("7", "ordinary"), ("-12", "neither"), ("", "neither")]
)
def test_score(text, reading):
    assert score(text, {"permuted": 12, "ordinary": 7}) == reading


@pytest.mark.parametrize(
    ("argument", "value"),
    [("split", "validation"), ("tier", 0), ("tier", 4), ("count", 0), ("count", -1), ("count", 10**6)],
)
@pytest.mark.parametrize("tier", TIERS)
def test_bad_input(tier, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}={value!r} "):
        make_rows(**{"split": "train", "tier": tier, "count": 10, argument: value})
