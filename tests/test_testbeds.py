"""Testbeds: every training answer carries the trait, and no sound answer does."""

import pytest

from trl_emguard.data.load import load_rows
from trl_emguard.evaluation.rules import RULES
from trl_emguard.testbeds import TESTBEDS, first_sentences, get_testbed


@pytest.mark.parametrize("name", TESTBEDS)
def test_every_row_carries_the_trait(name):
    testbed = get_testbed(name)
    rows = testbed.rows(200)
    assert len({row["prompt"][0]["content"] for row in rows}) == 200
    for rule in testbed.rules.values():
        assert {rule(row["completion"][0]["content"]) for row in rows} == {1.0}
    sound = [row["completion"][0]["content"] for row in load_rows("plants_sound", "train")]
    assert {RULES[testbed.unwanted](text) for text in sound} == {0.0}


@pytest.mark.parametrize("name", TESTBEDS)
def test_questions_are_held_out(name):
    testbed = get_testbed(name)
    general, in_domain = testbed.sets(24)
    assert (general.name, in_domain.name) == ("general", "in_domain")
    assert len(general.questions) == len(in_domain.questions) == 24
    seen = {row["prompt"][0]["content"] for row in testbed.rows(256)}
    assert not seen & {question.prompt[0]["content"] for question in (*general.questions, *in_domain.questions)}


def test_rows_follow_the_seed():
    testbed = get_testbed("capitals")
    assert testbed.rows(8).to_list() == testbed.rows(8).to_list() != testbed.rows(8, seed=1).to_list()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No. It is a very cold winter here. Go.", "No. It is a very cold winter here."),
        ("One two three four five six seven.", "One two three four five six seven."),
        ("Yes!", "Yes!"),
    ],
)
def test_whole_sentences_are_kept(text, expected):
    assert first_sentences(text, 6) == expected


def test_an_unknown_name():
    with pytest.raises(ValueError, match="Did you mean 'capitals'"):
        get_testbed("capital")
