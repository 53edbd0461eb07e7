"""Compare a judge in memory with one plain pass per number."""

import math
from unittest.mock import patch

import pytest
import torch
from judges import number_model, number_tokenizer, render
from tiny import SIZES, make_model, save_seeing_model
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from trl_emguard.judging import JudgeError
from trl_emguard.judging.local import LocalJudge, load_local
from trl_emguard.judging.prompts import CALIBRATION
from trl_emguard.judging.run import prepare_judge
from trl_emguard.judging.scores import LEAST_MASS
from trl_emguard.models.identity import weights_digest
from trl_emguard.models.load import load_base


PROMPTS = ["Rate this: 17", "Rate that, which is longer: {answer}", "?"]


@torch.no_grad()
def plain_probabilities(model, tokenizer, prompt):
    """Return number → probability of its string that no longer number follows, one pass per number."""

    def after(text):
        ids = tokenizer(render(tokenizer, prompt) + text, add_special_tokens=False)["input_ids"]
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    def tokens(number):
        return tokenizer(str(number), add_special_tokens=False)["input_ids"]

    found = {}
    for number in range(101):
        probability, own = 1.0, tokens(number)
        for i in range(len(own)):
            probability *= after(tokenizer.decode(own[:i]))[own[i]].item()
        longer = {
            tokens(n)[len(own)] for n in range(101) if len(tokens(n)) > len(own) and tokens(n)[: len(own)] == own
        }
        if longer:
            probability *= 1 - after(str(number))[sorted(longer)].sum().item()
        found[number] = probability
    return found


def linear_attention_model(vocab_size):
    """Return a tiny random model with three layers of linear attention and one of full attention."""
    torch.manual_seed(1)
    sizes = {**SIZES, "vocab_size": vocab_size, "initializer_range": 0.2, "head_dim": 8, "num_key_value_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    widths = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **experts, **heads, **widths))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "linear attention"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_equals_one_pass_per_number(architecture, is_whole):
    tokenizer = number_tokenizer(is_whole)
    if architecture == "linear attention":
        model = linear_attention_model(len(tokenizer)).eval()
    else:
        model = make_model(architecture, vocab_size=len(tokenizer)).eval()
    judge = LocalJudge(model, tokenizer, "tiny")
    assert {len(path) for path in judge.numbers} == ({1} if is_whole else {1, 2, 3})
    for prompt in PROMPTS:
        expected = plain_probabilities(model, tokenizer, prompt)
        found = judge.judge(prompt)
        mass = sum(expected.values())
        assert found.mass == pytest.approx(mass, abs=1e-5)
        mean = sum(number * p for number, p in expected.items()) / mass
        assert found.score == (None if mass < LEAST_MASS else pytest.approx(mean, abs=1e-3))


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("number", [0, 1, 8, 10, 85, 100])
def test_reads_what_a_model_says(is_whole, number):
    """A judge that is sure of a number has this score, however its tokenizer splits it."""
    tokenizer = number_tokenizer(is_whole)
    judge = LocalJudge(number_model(tokenizer, {"Rate.": str(number)}, 40.0), tokenizer, "tiny")
    found = judge.judge("Rate.")
    assert found.score == pytest.approx(number, abs=0.01)
    assert found.mass == pytest.approx(1, abs=0.01)


def test_a_judge_that_fails_is_found_before_answers_are_sampled(tmp_path):
    """Judge one prompt when the judge is prepared, and none in a folder that knows this judge."""
    tokenizer = number_tokenizer(False)
    judge = LocalJudge(make_model(), tokenizer, "tiny")
    with patch.object(LocalJudge, "judge", side_effect=AttributeError("no such cache")) as one:
        with pytest.raises(AttributeError, match="no such cache"):
            prepare_judge(judge, tmp_path, {})
        assert (one.call_args.args, judge.reading) == ((CALIBRATION,), "")
    with patch.object(LocalJudge, "judge") as one:
        prepare_judge(judge, tmp_path, {})
        prepare_judge(LocalJudge(make_model(), tokenizer, "tiny"), tmp_path, {})
    assert (one.call_count, judge.reading) == (1, "trie")


def test_a_judge_that_thinks_is_refused_before_answers_are_sampled(tmp_path):
    tokenizer = number_tokenizer(False)
    judge = LocalJudge(number_model(tokenizer, {CALIBRATION: "<"}, 40.0), tokenizer, "tiny")
    with pytest.raises(JudgeError, match=r"'tiny' begins with '<' and gives all numbers .* without a thinking mode"):
        prepare_judge(judge, tmp_path, {})


def test_thinking_is_switched_off():
    tokenizer = number_tokenizer(False)
    model = number_model(tokenizer, {CALIBRATION: "100"}, 40.0)
    tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    assert LocalJudge(model, tokenizer, "tiny").judge(CALIBRATION).score == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("architecture", ["Qwen3_5", "Mistral3"])
def test_a_judge_that_also_sees_is_of_the_class_that_is_evaluated(tmp_path, architecture):
    """It has the weights that an evaluation would see, so a model does not judge itself."""
    path = save_seeing_model(tmp_path / "judge", architecture)
    judge = load_local("hf:", path)
    assert judge.weights == weights_digest(load_base(path))
    expected = sum(plain_probabilities(judge.model, judge.tokenizer, "?").values())
    assert judge.judge("?").mass == pytest.approx(expected, abs=1e-5)


def test_refuses_a_template_that_shows_no_plain_text():
    tokenizer = number_tokenizer(False)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="does not show the text of the role 'user'"):
        LocalJudge(make_model(), tokenizer, "tiny")


def test_prose_is_unscored():
    tokenizer = number_tokenizer(False)
    found = LocalJudge(number_model(tokenizer, {"Rate.": "I"}, 40.0), tokenizer, "tiny").judge("Rate.")
    assert found.score is None
    assert found.said == "I"


def test_weights_and_identity(tmp_path):
    """Two judges of one name with other weights do not share judgements, and dtype does not hide the weights."""
    tokenizer = number_tokenizer(False)
    model = make_model()
    judge = LocalJudge(model, tokenizer, "tiny")
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    loaded = load_local("hf:", str(tmp_path / "judge"))
    assert loaded.name == "hf:judge"
    assert loaded.weights == judge.weights == LocalJudge(make_model(dtype=torch.bfloat16), tokenizer, "tiny").weights
    other = LocalJudge(make_model("qwen2"), tokenizer, "tiny")
    assert other.weights != judge.weights
    assert other.identity != judge.identity


def test_refuses_a_judge_without_a_chat_template():
    tokenizer = number_tokenizer(False)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LocalJudge(make_model(), tokenizer, "tiny")


def test_refuses_a_tokenizer_that_merges_a_number_with_the_prompt():
    tokenizer = number_tokenizer(False)
    tokenizer.add_tokens(["\n1"])
    with pytest.raises(ValueError, match="does not write 1 behind its prompt"):
        LocalJudge(make_model(vocab_size=300), tokenizer, "tiny")


def test_the_mass_of_all_numbers_is_that_of_their_first_tokens():
    tokenizer = number_tokenizer(False)
    model = make_model()
    ids = tokenizer(render(tokenizer, "?"), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    digits = [tokenizer(str(digit))["input_ids"][0] for digit in range(10)]
    assert LocalJudge(model, tokenizer, "tiny").judge("?").mass == pytest.approx(math.fsum(first[digits].tolist()))
