"""Test the mixin in another TRL trainer: a DPO run that is steered."""

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from tiny import lora, make_model, make_tokenizer
from trl import DPOConfig, DPOTrainer

from trl_emguard.defended import DefendedTrainer
from trl_emguard.defenses import DefenseArguments


@dataclass
class DefendedDPOConfig(DefenseArguments, DPOConfig):
    def __post_init__(self):
        super().__post_init__()
        self.check_defense()


class DefendedDPOTrainer(DefendedTrainer, DPOTrainer):
    pass


def make_dpo(folder, trainer=DefendedDPOTrainer, max_steps=2, **options):
    pairs = [{"prompt": f"q{i}", "chosen": " yes " * (i % 3 + 1), "rejected": " no"} for i in range(8)]
    given = {
        "max_steps": max_steps,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
    }
    logs = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2}
    return trainer(
        model=make_model(),
        args=DefendedDPOConfig(str(folder), **given, **logs, **options),
        train_dataset=Dataset.from_list(pairs),
        processing_class=make_tokenizer(),
        peft_config=lora(),
    )


def steering(tmp_path):
    torch.save(torch.randn(5, 32, generator=torch.Generator().manual_seed(3)), tmp_path / "vector.pt")
    return {
        "defense": "steering",
        "steering_vector": str(tmp_path / "vector.pt"),
        "steering_layers": "2",
        "steering_coef": 1.0,
    }


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_dpo_is_steered_and_says_so(tmp_path):
    trainer = make_dpo(tmp_path, **steering(tmp_path))
    steered = losses(trainer)
    assert len(steered) == 2
    trainer.save_model()
    record = json.loads((tmp_path / "defense.json").read_text())
    assert record["evidence"]["steering"]["acted"] is True
    # The policy is steered and the reference is not, so the first loss is not that of equal models, ln 2.
    plain = losses(make_dpo(tmp_path / "plain"))
    assert plain[0] == pytest.approx(0.6931, abs=1e-3)
    assert abs(steered[0] - plain[0]) > 1e-2


class StillDPOTrainer(DefendedDPOTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * 0


def test_gradients_of_zero_are_no_fault_where_the_loss_is_not_the_package_s(tmp_path):
    """Go on with a gradient of 0 in every step: GRPO has such steps if all rewards of a group are alike."""
    assert losses(make_dpo(tmp_path, StillDPOTrainer, max_steps=4, **steering(tmp_path))) == [0.0] * 4


def test_without_a_defense_it_is_the_stock_trainer(tmp_path):
    assert losses(make_dpo(tmp_path / "a")) == losses(make_dpo(tmp_path / "b", DPOTrainer))


@pytest.mark.parametrize(("defense", "reason"), [("kl", "the loss"), ("inoculation", "the training rows")])
def test_defenses_that_need_more_are_refused(tmp_path, defense, reason):
    with pytest.raises(ValueError, match=f"{defense}.*does not work with DefendedDPOTrainer.*{reason}"):
        make_dpo(tmp_path, defense=defense)


def test_a_config_without_the_options_is_refused(tmp_path):
    with pytest.raises(TypeError, match="DefenseArguments"):
        DefendedDPOTrainer(model=make_model(), args=DPOConfig(str(tmp_path), bf16=False, use_cpu=True))
