"""QLoRA: an adapter on a 4-bit base model, which is also the reference."""

import pytest
import torch
from methods import EVERYTHING, KINDS, METHODS, reads, run_options, save_adapter, save_vector, split
from tiny import (
    QUANTISABLE,
    config,
    evidence,
    logged,
    lora,
    make_model,
    make_rows,
    make_tokenizer,
    record,
    save_model,
)
from transformers import BitsAndBytesConfig, TrainerCallback

from trl_emguard import EMGuardTrainer
from trl_emguard.models.batches import eval_mode


# One defense of each kind that compares nothing with a reference.
OTHERS = [name for name in KINDS if name != "none" and not METHODS[name].is_compared]


@pytest.fixture
def trainer_for(tmp_path):
    path = save_model(tmp_path / "model", **QUANTISABLE)

    def make(defense, **options):
        options = {**run_options(defense, tmp_path), "max_steps": 3, **options}
        if reads(defense, "vector"):
            options["steering_vector"] = save_vector(tmp_path / "vector.safetensors", QUANTISABLE["hidden_size"])
        if reads(defense, "adapter"):
            options["inoculation_adapter"] = save_adapter(tmp_path / "adapter", make_model(**QUANTISABLE))
        pool = options.pop("interleave_dataset", None)
        return EMGuardTrainer(
            path,
            config(tmp_path / "out", **options),
            train_dataset=make_rows(),
            processing_class=make_tokenizer(),
            peft_config=lora(),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            interleave_dataset=pool,
        )

    return make


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_4_bit_base(trainer_for, checkpointing):
    """Compare with the quantised base, not the original: the distance before the first update is 0, to the bit."""
    trainer = trainer_for("kl,ldifs", activation_checkpointing=checkpointing)
    assert any(p.dtype == torch.uint8 for p in trainer.model.parameters())
    assert record(trainer)["reference"]["kind"] == "base model, adapters off"
    trainer.train()
    for name in ("kl", "ldifs"):
        assert logged(trainer, name)[0] == 0.0
        assert min(logged(trainer, name)[1:]) > 0
        assert evidence(trainer, name)["acted"]


def test_eval_mode_packs_no_4_bit_weight(trainer_for):
    """Leave weights as they are on CPUs for which bitsandbytes packs them: packed ones pass no gradient on."""
    model = trainer_for("none").model
    layers = [module for module in model.modules() if hasattr(module, "quant_state")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad(), eval_mode(model):
        model(torch.tensor([[3, 4, 5]]))
    assert layers
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_kl_is_that_to_the_4_bit_base(trainer_for):
    trainer = trainer_for("kl", learning_rate=0.1, per_device_train_batch_size=16)
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

    class Compare(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                seen.append(divergence())

    trainer.add_callback(Compare())
    trainer.train()
    # A step logs the divergence of the weights before its update.
    assert logged(trainer, "kl")[1:] == pytest.approx(seen[:2], rel=1e-4)
    assert seen[0] > 1e-3


@pytest.mark.parametrize("defense", [*OTHERS, EVERYTHING])
def test_the_other_defenses(trainer_for, defense):
    plain = trainer_for("none")
    plain.train()
    trainer = trainer_for(defense)
    trainer.train()
    shown = record(trainer)["evidence"]
    assert set(shown) == set(split(defense))
    assert all(shown[name]["acted"] for name in shown)
    assert logged(trainer) != logged(plain)
