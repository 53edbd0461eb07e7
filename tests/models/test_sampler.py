"""Sampled answers: plain sampling, the same in every batch, and cut at the end of turn."""

from collections import Counter

import pytest
import torch
from tiny import make_model, make_tokenizer

from trl_emguard.models.chat import end_tokens
from trl_emguard.models.sampler import sample_answers


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]


def sample(prompts=PROMPTS, model=None, **options):
    arguments = {"max_new_tokens": 12, "batch_size": 2, "seed": 3, **options}
    return list(sample_answers(model or make_model().eval(), make_tokenizer(), prompts, **arguments))


def flat(batches):
    return [answer for batch in batches for answer in batch]


def test_batches_follow_the_prompts():
    assert [len(batch) for batch in sample()] == [2, 2, 1]


def test_a_resumed_run_samples_the_same_answers():
    assert sample(start=2) == sample()[1:]
    assert sample(seed=4) != sample()


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_an_answer_does_not_depend_on_its_batch(batch_size):
    assert flat(sample(batch_size=batch_size)) == flat(sample())


def test_an_answer_follows_its_own_seed():
    answers = flat(sample(PROMPTS[:1] * 3, seeds=[7, 8, 7]))
    assert answers[0] == answers[2] != answers[1]


def test_temperature_zero_takes_the_most_probable_token():
    model = make_model().eval()
    answers = flat(sample(PROMPTS[:1], model, temperature=0))
    ids = PROMPTS[0] + answers[0].ids
    best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert answers[0].ids == best[len(PROMPTS[0]) - 1 : len(ids) - 1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_with_their_probabilities(temperature):
    """Compare the shares of 4,000 first tokens with the model's distribution, by their total variation."""
    model = make_model().eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
        # Few tokens get nearly all of the mass, so that 4,000 draws suffice.
        model.lm_head.weight.mul_(3.0)
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    model.generation_config.eos_token_id = None
    count = 4000
    answers = flat(
        sample(PROMPTS[:1] * count, model, max_new_tokens=1, batch_size=500, seed=1, temperature=temperature)
    )
    tokens = Counter(answer.ids[0] if answer.ids else make_tokenizer().eos_token_id for answer in answers)
    shares = torch.tensor([tokens[i] / count for i in range(len(expected))])
    assert (shares - expected).abs().sum() / 2 < 0.08
    uniform = torch.full_like(expected, 1 / len(expected))
    assert (uniform - expected).abs().sum() / 2 > 0.4


def test_the_models_generation_config_does_not_count():
    model = make_model().eval()
    plain = sample(model=model)
    model.generation_config.update(repetition_penalty=5.0, top_k=1, temperature=0.1, do_sample=True)
    assert sample(model=model) == plain


def test_the_random_state_is_left_alone():
    model = make_model().eval()  # which sets a seed
    before = torch.get_rng_state()
    answers = sample_answers(model, make_tokenizer(), PROMPTS, max_new_tokens=3, batch_size=5)
    torch.rand(3)
    after = torch.get_rng_state()
    list(answers)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)


def test_answers_end_at_any_end_token_or_are_truncated():
    model, tokenizer = make_model().eval(), make_tokenizer()
    model.generation_config.eos_token_id = [1, *range(100, 164)]
    assert end_tokens(model, tokenizer) == {1, *range(100, 164)}
    answers = flat(sample_answers(model, tokenizer, PROMPTS * 4, max_new_tokens=4, batch_size=20))
    assert {answer.is_truncated for answer in answers} == {True, False}
    for answer in answers:
        assert answer.is_truncated == (len(answer.ids) == 4)
        assert not end_tokens(model, tokenizer).intersection(answer.ids)
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
