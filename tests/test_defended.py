"""Test the mixin in other TRL trainers: a DPO run and a GRPO run that are steered."""

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from tiny import lora, make_model, make_tokenizer
from transformers import Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTTrainer,
)

from trl_emguard import EMGuardTrainer
from trl_emguard.checkpoints.whole import WholeCheckpoints
from trl_emguard.defended import DefendedTrainer
from trl_emguard.defenses import DEFENSES, DefenseArguments
from trl_emguard.evidence import read_defense_file


@dataclass
class DefendedDPOConfig(DefenseArguments, DPOConfig):
    def __post_init__(self):
        super().__post_init__()
        self.check_defense()


class DefendedDPOTrainer(DefendedTrainer, DPOTrainer):
    pass


@dataclass
class DefendedGRPOConfig(DefenseArguments, GRPOConfig):
    def __post_init__(self):
        super().__post_init__()
        self.check_defense()


class DefendedGRPOTrainer(DefendedTrainer, GRPOTrainer):
    pass


@dataclass
class DefendedRLOOConfig(DefenseArguments, RLOOConfig):
    def __post_init__(self):
        super().__post_init__()
        self.check_defense()


class DefendedRLOOTrainer(DefendedTrainer, RLOOTrainer):
    pass


@dataclass
class DefendedKTOConfig(DefenseArguments, KTOConfig):
    def __post_init__(self):
        super().__post_init__()
        self.check_defense()


class DefendedKTOTrainer(DefendedTrainer, KTOTrainer):
    pass


class AnyDPOTrainer(DPOTrainer):
    """A team's own trainer, whose signature names nothing."""

    def __init__(self, *args, margin=0.0, **kwargs):
        super().__init__(*args, **kwargs)


class SomeDPOTrainer(DPOTrainer):
    """One whose signature names a part."""

    def __init__(self, model, args, **kwargs):
        super().__init__(model=model, args=args, **kwargs)


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
    plain = {"bf16": False, "use_cpu": True, "activation_checkpointing": False}
    with pytest.raises(TypeError, match="DefenseArguments"):
        DefendedDPOTrainer(model=make_model(), args=DPOConfig(str(tmp_path), **plain))


@pytest.mark.parametrize("base", [AnyDPOTrainer, SomeDPOTrainer])
def test_arguments_are_found_behind_a_team_s_own_signature(tmp_path, monkeypatch, base):
    class Team(DefendedTrainer, base):
        pass

    seen = []
    monkeypatch.setattr(DEFENSES["steering"], "check_tuning", lambda _, has_adapter: seen.append(has_adapter))
    options = steering(tmp_path)
    assert losses(make_dpo(tmp_path, Team, **options)) == losses(make_dpo(tmp_path, **options))
    assert seen == [True, True]
    torch.save(torch.ones(5, 31), tmp_path / "vector.pt")  # another hidden size
    with pytest.raises(ValueError, match="31"):
        make_dpo(tmp_path, Team, **options)


@pytest.mark.parametrize(
    ("bases", "fix"),
    [
        ((DPOTrainer, DefendedTrainer), r"DefendedTrainer stands behind DPOTrainer.*\(DefendedTrainer, DPOTrainer\)"),
        ((Trainer, WholeCheckpoints), "WholeCheckpoints stands behind Trainer"),
    ],
)
def test_a_mixin_behind_its_trainer_is_refused(bases, fix):
    with pytest.raises(TypeError, match=fix):
        type("Team", bases, {})


def test_a_team_s_trainer_may_stand_before_the_package_s():
    team = type("Team", (type("TeamSFT", (SFTTrainer,), {}), EMGuardTrainer), {})
    assert issubclass(team, DefendedTrainer)


# ---- trainers that compare the policy with its own past ----


def make_rl(folder, trainer=DefendedGRPOTrainer, config=DefendedGRPOConfig, **options):
    args = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    args |= {"bf16": False, "use_cpu": True, "activation_checkpointing": False, "learning_rate": 1e-2}
    args |= {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "temperature": 2.0}
    return trainer(
        model=make_model(),
        args=config(str(folder), **{**args, **options}),
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        train_dataset=Dataset.from_list([{"prompt": "q"}] * 4),
        processing_class=make_tokenizer(),
        peft_config=lora(),
    )


def test_grpo_is_steered_and_clips_nothing_in_its_first_pass(tmp_path):
    trainer = make_rl(tmp_path, **steering(tmp_path))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["clip_ratio/region_mean"] == 0
    assert entry["grad_norm"] > 0
    trainer.save_model()
    assert read_defense_file(tmp_path)["evidence"]["steering"]["acted"] is True


@pytest.mark.parametrize(
    ("trainer", "config", "options", "fix"),
    [
        (DefendedRLOOTrainer, DefendedRLOOConfig, {}, "RLOOTrainer.*Take GRPOTrainer"),
        (DefendedGRPOTrainer, DefendedGRPOConfig, {"num_iterations": 2}, "num_iterations=2.*Set num_iterations=1"),
        (DefendedGRPOTrainer, DefendedGRPOConfig, {"steps_per_generation": 2}, "steps_per_generation=2"),
        (DefendedGRPOTrainer, DefendedGRPOConfig, {"generation_batch_size": 8}, "leave .* generation_batch_size out"),
        (DefendedGRPOTrainer, DefendedGRPOConfig, {"beta": 0.1}, r"beta=0\.1: .*Set beta=0\.0"),
        (DefendedGRPOTrainer, DefendedGRPOConfig, {"use_vllm": True}, "vllm_importance_sampling_correction=False"),
    ],
)
def test_likelihoods_of_the_undefended_policy_in_the_loss_are_refused(tmp_path, trainer, config, options, fix):
    with pytest.raises(ValueError, match=f"defense='steering' does not work with .*{fix}"):
        make_rl(tmp_path, trainer, config, **steering(tmp_path), **options)


def test_kto_is_refused_where_its_loss_needs_the_undefended_policy(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": i % 2 == 0} for i in range(4)])
    plain = {"bf16": False, "use_cpu": True, "activation_checkpointing": False, "report_to": []}
    args = DefendedKTOConfig(output_dir=str(tmp_path), **plain, **steering(tmp_path))
    with pytest.raises(ValueError, match=r"loss_type='kto': .* Set loss_type='apo_zero_unpaired'"):
        DefendedKTOTrainer(make_model(), args=args, train_dataset=rows, processing_class=make_tokenizer())
