"""QLoRA: an adapter on a 4-bit base model, which is also the reference."""

import pytest
import torch
from tiny import config, logged, lora, make_pool, make_rows, make_tokenizer, save_model
from transformers import BitsAndBytesConfig

from trl_emguard import EMGuardTrainer
from trl_emguard.persona import PersonaVector


@pytest.fixture
def trainer_for(tmp_path):
    path = save_model(tmp_path / "model")
    torch.manual_seed(3)
    PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2}).save(tmp_path / "v.safetensors")

    def make(defense, **options):
        return EMGuardTrainer(
            path,
            config(
                tmp_path / "out",
                defense=defense,
                steering_vector=str(tmp_path / "v.safetensors"),
                max_steps=3,
                **options,
            ),
            train_dataset=make_rows(),
            processing_class=make_tokenizer(),
            peft_config=lora(),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            interleave_dataset=make_pool() if "interleave" in defense else None,
        )

    return make


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_4_bit_base(trainer_for, checkpointing):
    """Not the model before it was quantised: the distance before the first update is 0, to the bit."""
    trainer = trainer_for("kl,ldifs", kl_coef=1.0, gradient_checkpointing=checkpointing)
    assert any(p.dtype == torch.uint8 for p in trainer.model.parameters())
    assert trainer._reference.kind == "base model, adapters off"
    trainer.train()
    for name in ("kl", "ldifs"):
        assert logged(trainer, name)[0] == 0.0
        assert min(logged(trainer, name)[1:]) > 0
        assert trainer._ledger.terms[name].acted


def test_kl_is_that_to_the_4_bit_base(trainer_for):
    trainer = trainer_for("kl", kl_coef=1.0, learning_rate=0.1, per_device_train_batch_size=16)
    model, seen = trainer.model, []

    def divergence():
        total, tokens = 0.0, 0
        for row in trainer.train_dataset:
            ids, kept = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)[kept]
            with model.disable_adapter():
                log_q = model(ids).logits[0, :-1].double().log_softmax(-1)[kept]
            total += (log_p.exp() * (log_p - log_q)).sum().item()
            tokens += int(kept.sum())
        return total / tokens

    def step(*args, **kwargs):
        with torch.no_grad():
            seen.append(divergence())

    end_step = trainer._end_step
    trainer._end_step = lambda control: (end_step(control), step())
    trainer.train()
    # What is logged at a step is of the weights that the step before left.
    assert logged(trainer, "kl")[1:] == pytest.approx(seen[:2], rel=1e-4)
    assert seen[0] > 1e-3


@pytest.mark.parametrize(
    "defense", ["steering", "inoculation", "interleave++", "interleave++,kl,steering,inoculation"]
)
def test_the_other_defenses(trainer_for, defense):
    plain = trainer_for("none")
    plain.train()
    trainer = trainer_for(defense, interleave_fraction=0.3, steering_coef=1.0)
    trainer.train()
    evidence = trainer._record()["evidence"]
    assert set(evidence) == set(defense.split(","))
    if "steering" in defense:
        assert evidence["steering"]["acted"]
    if "interleave++" in defense:
        assert evidence["interleave++"]["rows_interleaved"] > 0
    assert logged(trainer) != logged(plain)
