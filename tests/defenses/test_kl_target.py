"""`kl_target`: the coefficient follows Ziegler et al.'s rule, acts, is resumed, and what is refused."""

import json
import re

import pytest
from tiny import config, logged, lora, make_pool, make_trainer
from transformers import TrainerCallback


STEPS = 6


def train(folder, target, resume=None, **options):
    options = {"defense": "kl", "kl_coef": 0.5, "max_steps": STEPS, **options}
    trainer = make_trainer(folder, peft=lora(), kl_target=target, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def following(kl, target, coef=0.5):
    """Return the coefficient of each step after the KL of the steps before it; a step may have none."""
    coefs = [coef]
    for value in kl[:-1]:
        error = 0.0 if value is None else min(max(value / target - 1, -0.2), 0.2)
        coefs.append(coefs[-1] * (1 + 0.1 * error))
    return coefs


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_coefficient_follows_the_rule_and_acts(tmp_path, size):
    """The target is about the run's own KL, far below or far above it."""
    typical = logged(train(tmp_path / "a", None), "kl")[2]
    trainer = train(tmp_path / "b", size * typical, gradient_accumulation_steps=2)
    kl, coefs = logged(trainer, "kl"), logged(trainer, "kl_coef")
    assert coefs == pytest.approx(following(kl, size * typical), rel=1e-6)
    assert len(set(coefs)) > 1
    losses = [ce + coef * d for ce, coef, d in zip(logged(trainer, "loss_ce"), coefs, kl, strict=True)]
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    record = json.loads((tmp_path / "saved" / "defense.json").read_text())
    assert record["defenses"]["kl"] | {"kl_coef": 0.5, "kl_target": size * typical} == record["defenses"]["kl"]


@pytest.mark.parametrize(("target", "limit"), [(1e6, 0.005), (1e-9, 50.0)])
def test_the_coefficient_stays_between_a_hundredth_and_a_hundredfold(tmp_path, target, limit):
    class NearTheLimit(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.defenses[0].set_coefficient(limit * (1.001 if target > 1 else 0.999))

    trainer = make_trainer(tmp_path, peft=lora(), defense="kl", kl_coef=0.5, kl_target=target, max_steps=STEPS)
    trainer.add_callback(NearTheLimit())
    trainer.train()
    assert logged(trainer, "kl_coef")[3:] == pytest.approx([limit] * (STEPS - 3))


def test_a_step_without_mixed_in_rows_leaves_the_coefficient(tmp_path):
    trainer = train(
        tmp_path,
        1e-6,
        defense="interleave,kl",
        interleave_dataset=make_pool(),
        interleave_fraction=0.15,
        per_device_train_batch_size=2,
        max_steps=8,
    )
    history = [entry for entry in trainer.state.log_history if "kl_coef" in entry]
    kl = [entry.get("kl") for entry in history]
    assert None in kl
    assert any(value is not None for value in kl)
    assert [entry["kl_coef"] for entry in history] == pytest.approx(following(kl, 1e-6), rel=1e-6)


def test_a_resumed_run_has_the_same_coefficients(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, 1e-3, **saves)
    resumed = train(tmp_path, 1e-3, resume=str(tmp_path / "checkpoint-3"), **saves)
    assert logged(resumed, "kl_coef") == logged(whole, "kl_coef")
    assert logged(resumed) == logged(whole)


def test_a_new_training_starts_at_the_given_coefficient(tmp_path):
    trainer = train(tmp_path, 1e-3)
    trainer.train()
    assert logged(trainer, "kl_coef")[0] == 0.5


@pytest.mark.parametrize("other", [None, 2e-3])
def test_a_checkpoint_of_another_target_is_refused(tmp_path, other):
    train(tmp_path, 1e-3, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match=re.escape("`kl_target=0.001`")):
        train(tmp_path, other, resume=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("target", [0, -0.1, float("nan"), float("inf"), True, "0.1"])
def test_a_target_that_is_none_is_refused(tmp_path, target):
    with pytest.raises(ValueError, match=re.escape(f"kl_target={target!r} is no budget")):
        config(tmp_path, defense="kl", kl_target=target)


@pytest.mark.parametrize("coef", ["0.4->0.05", 0, 0.0])
def test_a_coefficient_that_cannot_follow_is_refused(tmp_path, coef):
    with pytest.raises(ValueError, match=re.escape(f"kl_coef={coef!r} cannot follow it")):
        config(tmp_path, defense="kl", kl_target=0.1, kl_coef=coef)
