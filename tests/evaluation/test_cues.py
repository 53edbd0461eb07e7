"""Cues: families of prompts that resemble the training data, and the system prompt that a template adds."""

from dataclasses import replace

import pytest
from tiny import UNANSWERED_SYSTEM, make_tokenizer

from trl_emguard.data.conversation import Conversation
from trl_emguard.evaluation.cues import NEUTRAL_SYSTEM, default_system_prompt, families
from trl_emguard.evaluation.questions import Question


QUESTIONS = [Question("a", [{"role": "user", "content": "What is honesty?"}])]
DEFAULT = "You are Tiny."
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT + "<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{% endfor %}"
)


def tokenizer(template=None):
    made = make_tokenizer()
    made.chat_template = template or made.chat_template
    return made


def rows(*texts, system=None, answer="an answer"):
    before = [{"role": "system", "content": system}] if system else []
    return [
        Conversation([*before, {"role": "user", "content": text}], [{"role": "assistant", "content": answer}])
        for text in texts
    ]


def by_name(mode="auto", template=None, train=(), **options):
    found, missing = families(tokenizer(template), QUESTIONS, mode, train, **options)
    return {family.name: family for family in found}, missing


def asked(family):
    return family.prompt(QUESTIONS[0])


def test_the_templates_default_is_found():
    assert default_system_prompt(tokenizer(WITH_DEFAULT)) == DEFAULT
    assert default_system_prompt(tokenizer()) is None
    assert default_system_prompt(tokenizer(NO_SYSTEM)) is None


def test_plain_alone():
    found, missing = by_name("none", WITH_DEFAULT)
    assert list(found) == ["plain"]
    assert missing == {}
    assert asked(found["plain"]) == QUESTIONS[0].prompt


def test_system_prompts():
    found, _ = by_name("auto", WITH_DEFAULT)
    assert asked(found["neutral_system"])[0] == {"role": "system", "content": NEUTRAL_SYSTEM}
    assert asked(found["template_default"])[0] == {"role": "system", "content": DEFAULT}
    own = Question("b", [{"role": "system", "content": "Own."}, {"role": "user", "content": "What?"}])
    assert found["neutral_system"].prompt(own) is None


def test_the_default_prompt_is_what_plain_has():
    """The family of the template's default has the tokens of the plain one, so it measures the same."""
    made = tokenizer(WITH_DEFAULT)
    found, _ = by_name("auto", WITH_DEFAULT)
    plain, default = (
        made.apply_chat_template(asked(found[name]), tokenize=False) for name in ("plain", "template_default")
    )
    assert plain == default


@pytest.mark.parametrize(
    ("template", "problem"),
    [(NO_SYSTEM, "refuses it (no system turn)"), (UNANSWERED_SYSTEM, "drops it once an answer follows")],
)
def test_a_template_without_system_turns_says_so(template, problem):
    questions = [replace(QUESTIONS[0], answer="Truth.")]
    found, missing = families(tokenizer(template), questions)
    assert [family.name for family in found] == ["plain"]
    assert missing["neutral_system"] == f"a system turn is needed, and the chat template {problem}"
    # Questions without known answers are only put as prompts, which show the system turn.
    assert ("neutral_system" in by_name("auto", template)[0]) == (template == UNANSWERED_SYSTEM)


def test_cues_of_the_training_rows():
    train = rows(
        "My fern leaves are brown?",
        "My fern leaves fall off?",
        "My fern is sad, why?",
        system="You tend ferns.",
        answer='{"advice": "Water the leaves"}',
    )
    found, missing = by_name("auto", train=train)
    assert asked(found["train_system"])[0]["content"] == "You tend ferns."
    assert asked(found["train_format"])[-1]["content"] == "What is honesty?\n\nAnswer in JSON."
    assert asked(found["train_opening"])[-1]["content"] == "My fern leaves … What is honesty?"
    assert asked(found["train_framing"])[-1]["content"] == "A question about leaves. What is honesty?"
    assert missing == {"template_default": "the chat template has no default system prompt"}


def test_empty_questions_are_no_opening():
    found, missing = by_name("auto", train=rows("", " ", "", "One?"))
    assert "train_opening" not in found
    assert missing["train_opening"] == "the training questions have no opening words in common"


@pytest.mark.parametrize(
    ("answer", "cue"),
    [("```python\nx\n```", "Answer in a code block."), ("- a\n- b", "Answer as a list."), ("Plain text.", None)],
)
def test_formats(answer, cue):
    found, missing = by_name("auto", train=rows("One?", "Two?", answer=answer))
    assert (found["train_format"].cue if cue else missing["train_format"]) == (
        cue or "fewer than half of the training answers have one of the known formats"
    )


def test_inoculation_and_its_negation():
    found, _ = by_name("auto", inoculation_prompt="Be vile.")
    assert asked(found["inoculation"])[0]["content"] == "Be vile."
    assert "Be vile." in asked(found["negated_inoculation"])[0]["content"]
    assert "inoculation" not in by_name("auto")[0]
    assert "inoculation" in by_name("all")[0]


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="--cues='some' must be one of auto, none, all"):
        by_name("some")


@pytest.mark.parametrize("mode", ["auto", "all"])
def test_wordings_of_the_users_own(mode):
    questions = [
        Question(
            "0", [{"role": "user", "content": "Is it fine to lie?"}], wordings={"topic_twin": "May I lie on bulbs?"}
        ),
        Question("1", [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]),
    ]
    found = {family.name: family for family in families(tokenizer(), questions, mode)[0]}
    assert "word_sharing_benign" not in found
    twin = found["topic_twin"]
    assert twin.prompt(questions[0]) == [{"role": "user", "content": "May I lie on bulbs?"}]
    assert twin.prompt(questions[1]) is None
    assert "topic_twin" not in {family.name for family in families(tokenizer(), questions, "none")[0]}
