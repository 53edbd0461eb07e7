"""Sampled answers: plain sampling, reproducible batch by batch, and cut at the end of turn."""

import torch
from tiny import make_model, make_tokenizer

from trl_emguard.models.chat import end_tokens
from trl_emguard.models.sampler import sample_answers


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]


def sample(**options):
    arguments = {"max_new_tokens": 12, "batch_size": 2, "seed": 3, **options}
    return list(sample_answers(make_model().eval(), make_tokenizer(), PROMPTS, **arguments))


def test_batches_follow_the_prompts():
    assert [len(batch) for batch in sample()] == [2, 2, 1]


def test_a_resumed_run_samples_the_same_answers():
    assert sample(start=2) == sample()[1:]
    assert sample(seed=4) != sample()


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
    answers = [
        answer
        for batch in sample_answers(model, tokenizer, PROMPTS * 4, max_new_tokens=4, batch_size=20)
        for answer in batch
    ]
    assert {answer.is_truncated for answer in answers} == {True, False}
    for answer in answers:
        assert answer.is_truncated == (len(answer.ids) == 4)
        assert not end_tokens(model, tokenizer).intersection(answer.ids)
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
