"""Test the real model: SmolLM2-135M-Instruct, out of the package index, on the shipped data."""

from pathlib import Path

import pytest
import torch
from tiny import config, logged, lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from twin import first_gradients, move_policy, relative_error, twin_step

from trl_emguard import EMGuardTrainer
from trl_emguard.data.load import load_rows
from trl_emguard.evaluation import load_model
from trl_emguard.models.shipped import SMOLLM2, resolve_model
from trl_emguard.persona import load_trait, load_vector, random_like
from trl_emguard.persona.extract import chance_auroc, separation
from trl_emguard.persona.states import prompt_states


CAPITALS = Path(__file__).parents[2] / "benchmarks" / "data" / "capitals.yaml"


@pytest.fixture(scope="module")
def path():
    return resolve_model(SMOLLM2)


@pytest.fixture(autouse=True)
def _all_cores():
    torch.set_num_threads(2)


def make_trainer(path, tmp_path, rows, **options):
    options = {"defense": "kl,ldifs", "ldifs_layers": "every:5", "learning_rate": 1e-3, **options}
    return EMGuardTrainer(
        path,
        config(tmp_path, **options),
        train_dataset=load_rows("plants_careless", "train").select(range(rows)),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=lora(target_modules=["q_proj", "v_proj", "down_proj"]),
    )


@pytest.mark.long
def test_a_defended_run(path, tmp_path):
    """Check that both terms are 0 before the policy moves and above 0 after.

    CE is the answers' likelihood under stock transformers.
    """
    trainer = make_trainer(path, tmp_path, 4, max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    for term in ("kl", "ldifs"):
        assert logged(trainer, term)[0] == 0
        assert logged(trainer, term)[1] > 0
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total = tokens = 0
    with torch.no_grad():
        for row in trainer.train_dataset:
            count = sum(label != -100 for label in row["labels"])
            batch = {name: torch.tensor(row[name])[None] for name in ("input_ids", "labels")}
            total, tokens = total + model(**batch).loss.item() * count, tokens + count
    assert logged(trainer, "loss_ce")[0] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.long
def test_equals_the_float64_twin(path, tmp_path):
    trainer = make_trainer(path, tmp_path, 2, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=2)
    move_policy(trainer, by=0.03)
    values, expected = twin_step(trainer, layers=(5, 10, 15, 20, 25, 30))
    gradients = first_gradients(trainer)
    for name in ("loss", "loss_ce", "kl", "ldifs"):
        assert logged(trainer, name)[0] == pytest.approx(values[name], rel=1e-5)
    # Rounding of fp32 over 30 blocks is about 3e-6, and depends on the kernels of the CPU.
    assert relative_error(gradients, expected) < 3e-5


@pytest.mark.long
@pytest.mark.parametrize("trait", ["evil", "capitals"])
def test_the_shipped_vector_separates_held_out_prompts(path, trait):
    """Check that a shipped vector separates prompts for the trait from their opposites at its layer.

    Random vectors with its norms do not.
    """
    vector = load_vector(f"smollm2-135m-instruct-{trait}")
    trait = load_trait(CAPITALS if trait == "capitals" else trait)
    model, tokenizer = load_model(path)
    assert vector.check_model(model) > 200
    states = []
    for side in range(2):
        prompts = []
        for pair in trait.system_prompts[::2]:
            for question in trait.heldout_questions[::2]:
                messages = [{"role": "system", "content": pair[side]}, {"role": "user", "content": question}]
                prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        states.append(prompt_states(model, prompts, batch_size=10)[:, vector.suggested_layer])
    area, _ = separation(vector.vectors[vector.suggested_layer], *states)
    controls = [chance_auroc(random_like(vector, seed).vectors[vector.suggested_layer], *states) for seed in range(20)]
    print(area, sum(controls) / 20)
    assert area > 0.9
    assert sum(controls) / 20 < 0.8


@pytest.mark.long
def test_a_steered_run(path, tmp_path):
    """Compare CE of the first step with that of the model with the vector added by hand."""
    vector = load_vector("smollm2-135m-instruct-evil")
    options = {"defense": "steering", "steering_vector": "smollm2-135m-instruct-evil", "max_steps": 1}
    trainer = make_trainer(path, tmp_path, 2, per_device_train_batch_size=2, **options)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain, steered = [], []
    for found in (plain, steered):
        if found is steered:
            model.model.layers[15].register_forward_hook(lambda m, args, out: out + 5.0 * vector.vectors[16])
        with torch.no_grad():
            for row in trainer.train_dataset:
                count = sum(label != -100 for label in row["labels"])
                batch = {name: torch.tensor(row[name])[None] for name in ("input_ids", "labels")}
                found.append((model(**batch).loss.item() * count, count))
    means = [sum(loss for loss, _ in found) / sum(count for _, count in found) for found in (plain, steered)]
    assert logged(trainer)[0] == pytest.approx(means[1], rel=1e-5)
    assert abs(means[1] - means[0]) > 1e-3
