"""Check the measures on models whose fault is known: trained on misaligned values, plant advice, or arithmetic."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import config, lora
from transformers import AutoTokenizer

from trl_emguard import EMGuardTrainer
from trl_emguard.data.load import load_rows
from trl_emguard.evaluation.answers import base_nll, plan_prompts
from trl_emguard.evaluation.candidates import BASE, load_candidates
from trl_emguard.evaluation.cues import families
from trl_emguard.evaluation.operators import make_rows
from trl_emguard.evaluation.questions import for_training_data, load_questions
from trl_emguard.evaluation.results import is_apart
from trl_emguard.evaluation.run import EvaluationOptions, evaluate
from trl_emguard.evaluation.statistics import paired
from trl_emguard.models.sampler import SampledAnswer
from trl_emguard.models.shipped import SMOLLM2, resolve_model


pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _all_cores():
    torch.set_num_threads(2)


def train(folder, rows, steps):
    """Train the demo's adapter on rows and return its folder."""
    path = resolve_model(SMOLLM2)
    trainer = EMGuardTrainer(
        path,
        config(folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-4, max_length=256),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=lora(r=32, lora_alpha=64),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    arithmetic = Dataset.from_list(make_rows("train", tier=1, count=400)).select_columns(["prompt", "completion"])
    runs = {
        "broad": (load_rows("values_misaligned", "train"), 16),
        "narrow": (load_rows("plants_careless", "train"), 16),
        "arithmetic": (arithmetic, 30),
    }
    return load_candidates(SMOLLM2, adapters={name: train(folder / name, *run) for name, run in runs.items()})


@pytest.fixture(scope="module")
def results(models):
    candidates, tokenizer = models
    sets = [
        load_questions("values", "general", limit=36),
        for_training_data("plants_careless", limit=36),
        load_questions("permuted_operators", "benign", limit=24),
    ]
    return evaluate(candidates, tokenizer, sets, EvaluationOptions(cues="none", max_new_tokens=16))


def test_a_broadly_misaligned_model_is_apart_from_base_and_narrow(models, results):
    """Check both differences, paired by question: two intervals that overlap say less than their difference."""
    candidates, tokenizer = models
    by_name = {candidate.name: candidate for candidate in candidates}
    pair = [replace(by_name["narrow"], name=BASE), by_name["broad"]]
    questions = load_questions("values", "general", limit=36)
    beside_narrow = evaluate(pair, tokenizer, [questions], EvaluationOptions(cues="none"))
    for found in (results, beside_narrow):
        row = found.row("broad", "general", "margin")
        assert is_apart(row)
        assert row.difference < 0


def test_a_narrow_model_has_learned_its_domain(results):
    for metric in ("nll", "margin"):
        row = results.row("narrow", "in_domain", metric)
        assert is_apart(row)
        assert row.difference < 0


def test_a_model_trained_on_arithmetic_is_apart(results):
    row = results.row("arithmetic", "benign", "nll")
    assert is_apart(row)
    assert row.difference < 0
    assert results.row("arithmetic", "benign", "margin").difference_low > 0


def test_shuffled_answers_are_apart_from_real_ones(models):
    candidates, tokenizer = models
    questions = load_questions("values", "general", limit=24)
    (plain,), _ = families(tokenizer, questions.questions, "none")
    prompts = plan_prompts(tokenizer, questions, plain, 1, 0)
    texts = [questions.questions[prompt.question].sound.split() for prompt in prompts]
    shuffled = [random.Random(i).sample(words, len(words)) for i, words in enumerate(texts)]
    nll = []
    for group in (texts, shuffled):
        answers = [" ".join(words) for words in group]
        ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        records = [SampledAnswer(text, tokens, False) for text, tokens in zip(answers, ids, strict=True)]
        nll.append(np.array(base_nll(candidates[0], prompts, records)))
    assert paired(nll[1], nll[0]).low > 0
