"""Schedules of coefficients: their values, gradients, log and record, what is refused, and that zero is no failure."""

import argparse
import copy
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods import merged, run_options, save_vector, split
from tiny import config, logged, lora, make_model, make_rows, make_trainer, record
from transformers import TrainerCallback
from twin import bare, first_gradients, move_policy, relative_error, twin_step

from trl_emguard.defenses import KL, Steering, Step
from trl_emguard.defenses.schedule import Schedule, check_coefficient, coefficient
from trl_emguard.evidence import PATIENCE


SCHEDULED = ("kl", "ldifs", "treft", "steering")
STEPS = 4
VALUES = st.floats(0, 1e6)


def scheduled(defense, text):
    """Return the option of every coefficient of a defense, with one schedule."""
    return {f"{name}_coef": text for name in split(defense)}


class Look(TrainerCallback):
    """Callback that calls a function right before every update, when the gradient is complete."""

    def __init__(self, function):
        self.function = function

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.function(state.global_step)


# ---- values ----


@given(VALUES, VALUES, st.integers(2, 10**6), st.data())
def test_a_schedule_is_a_line_from_its_start_to_its_end(start, end, steps, data):
    schedule, step = Schedule(start, end), data.draw(st.integers(0, steps - 1))
    assert (schedule.at(0, steps), schedule.at(steps - 1, steps)) == (start, end)
    expected = start + (end - start) * step / (steps - 1)
    assert schedule.at(step, steps) == pytest.approx(expected, rel=1e-9, abs=1e-9 * max(start, end))
    assert schedule.at(step, steps) >= 0
    assert schedule.at(steps + step, steps) == end
    assert schedule.at(0, 1) == start


@given(VALUES, VALUES.filter(bool), st.sampled_from(["->", " -> ", "->  "]))
def test_the_text_of_a_schedule_is_read_back(start, end, arrow):
    schedule = check_coefficient("kl_coef", f"{start!r}{arrow}{end!r}")
    assert schedule == Schedule(start, end)
    assert check_coefficient("kl_coef", str(schedule)) == schedule


@pytest.mark.parametrize("text", ["0.4->0.05", "0->0.4", "0.4->0", "1e-05->3"])
def test_the_text_is_recorded_as_one_would_write_it(text):
    assert str(check_coefficient("kl_coef", text)) == text


# ---- what is refused ----


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("text", ["0.4->", "->", "a->b", "-1->0", "0.4->-0.1", "nan->1", "0->inf", "0->0", "1->2->3"])
def test_a_bad_text_is_refused(tmp_path, name, text):
    options = {**run_options(name, tmp_path), f"{name}_coef": text}
    message = f"{name}_coef={text!r} is not a schedule: give two finite numbers, 0 or above and not both 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **options)


def test_a_share_of_rows_has_no_schedule(tmp_path):
    with pytest.raises(ValueError, match=r"interleave_fraction='0\.1->0\.2' is no share of the mix: give a number"):
        config(tmp_path, defense="interleave", interleave_fraction="0.1->0.2")


def test_an_ablated_direction_has_no_schedule(tmp_path):
    options = {**run_options("steering", tmp_path), "steering_coef": "5->0", "steering_mode": "ablate"}
    with pytest.raises(ValueError, match=r"steering_coef='5->0' does not work with steering_mode='ablate'.*a number"):
        config(tmp_path, **options)


# ---- gradients ----


@pytest.mark.parametrize(
    ("batch", "accumulation"),
    [pytest.param(8, 1, marks=pytest.mark.long), pytest.param(2, 4, marks=pytest.mark.long), (3, 3)],
)
@pytest.mark.parametrize(("defense", "start", "end"), [("kl,ldifs,treft", 0, 9), ("kl,ldifs", 9, 0), ("treft", 6, 3)])
def test_each_step_has_the_gradient_of_its_own_coefficient(tmp_path, defense, start, end, batch, accumulation):
    """Compare every step with the twin, on the weights of that step. The coefficient of another step is told apart."""
    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    options = {"max_steps": STEPS, "max_grad_norm": 0.0, **cut, **scheduled(defense, f"{start}->{end}")}
    trainer = make_trainer(tmp_path, rows=make_rows(8), peft=lora(), defense=defense, **options)
    before = copy.deepcopy(trainer.model)
    bare(before).__dict__.pop("forward", None)
    steps = []

    def compare(step):
        ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        for coef in (start + (end - start) * s / (STEPS - 1) for s in (step, (step + 1) % STEPS)):
            _, expected = twin_step(trainer, start=before, coefs=dict.fromkeys(split(defense), coef))
            steps.append(relative_error(ours, expected))

    trainer.add_callback(Look(compare))
    trainer.train()
    assert max(steps[::2]) < 1e-5
    # Nothing has moved before the first update, so no coefficient shows in it.
    assert min(steps[3::2]) > 1e-3


@pytest.mark.parametrize(
    "checkpointing", [{"use_reentrant": False}, pytest.param({"use_reentrant": True}, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("defense", SCHEDULED)
def test_a_step_equals_a_run_with_that_coefficient(tmp_path, defense, checkpointing):
    """Without a learning rate every step has the same weights, so constant runs have the gradients of a schedule."""

    def trainer_with(coef, steps):
        options = {**run_options(defense, tmp_path), f"{defense}_coef": coef, "max_steps": steps, "learning_rate": 0.0}
        options |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": checkpointing}
        rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
        trainer = make_trainer(tmp_path, rows=make_rows(8), **options, **rows)
        if defense == "treft":
            # Keys and values from before the move, as a checkpoint would bring them.
            treft = trainer.defenses[0]
            treft.model_loss(treft.model_states(trainer.model, {"input_ids": torch.ones(1)}))
        move_policy(trainer)
        return trainer

    trainer, found = trainer_with("4->2", 3), []
    trainer.add_callback(
        Look(lambda step: found.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()}))
    )
    trainer.train()
    for gradients, coef in zip(found, (4.0, 3.0, 2.0), strict=True):
        assert relative_error(gradients, first_gradients(trainer_with(coef, 1))) < 1e-6
    assert relative_error(found[0], found[1]) > 1e-3


@pytest.mark.long
def test_a_compiled_model_is_not_compiled_again_for_a_step(tmp_path):
    losses, graphs, counters = {}, {}, torch._dynamo.utils.counters
    for text in ("2->2", "3->1"):
        for compiled in (False, True):
            torch.compiler.reset()
            counters.clear()
            options = {**run_options("kl,treft,steering", tmp_path), **scheduled("kl,treft,steering", text)}
            options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
            rows = {"rows": make_rows(8), "per_device_train_batch_size": 8, "max_steps": 5}
            trainer = make_trainer(tmp_path / text, peft=lora(), **options, **rows)
            trainer.train()
            losses[text, compiled] = logged(trainer)
            graphs[text, compiled] = counters["stats"]["unique_graphs"]
    assert losses["3->1", True] == pytest.approx(losses["3->1", False], rel=1e-4)
    assert graphs["3->1", True] == graphs["2->2", True] > 0


# ---- evidence ----


@pytest.mark.parametrize("defense", SCHEDULED)
@pytest.mark.parametrize("text", ["2->0", "0->2"])
def test_a_coefficient_that_is_rightly_zero_is_no_failure(tmp_path, defense, text):
    options = {**run_options(defense, tmp_path), f"{defense}_coef": text, "max_steps": STEPS}
    trainer = make_trainer(tmp_path, peft=lora(), **options)
    seen = []
    trainer.add_callback(Look(lambda step: seen.append((trainer.defenses[0].coef, trainer.defenses[0].active))))
    trainer.train()
    values = [Schedule.parse(text).at(step, STEPS) for step in range(STEPS)]
    assert seen == [(value, True) for value in values]
    assert 0 in values
    assert logged(trainer, f"{defense}_coef") == values
    assert trainer.defenses[0].verdict(final=True) is None
    found = record(trainer)
    assert found["evidence"][defense]["acted"]
    assert found["defenses"][defense][f"{defense}_coef"] == text


@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("value", ["1->0", 1.0])
def test_only_a_schedule_may_reach_zero(tmp_path, value, coef):
    """Count steps without a gradient, but for those whose schedule is at 0."""
    kl = KL(config(tmp_path, defense="kl", kl_coef=value))
    kl.set_coefficient(coef)
    sums = {"kl/value": 1.0, "kl/positions": 9.0, "kl/evidence": 0.0, "kl/requires_grad": 1.0}
    for _ in range(PATIENCE):
        kl.end_step(Step(sums, has_moved=True))
    assert (kl.verdict() is None) == (value == "1->0" and coef == 0)


def test_steering_is_judged_where_it_can_show(tmp_path):
    """A coefficient that has just left 0 is lost in the rounding of the states, and is no failure."""
    file = save_vector(tmp_path / "vector.safetensors")
    steering = Steering(config(tmp_path, defense="steering", steering_vector=file, steering_coef="0->5"))
    model = make_model().eval()
    steering.check_model(model.config)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    with torch.no_grad(), steering.training(model):
        for coef in (0.0, 1e-12, 5.0):
            assert not steering.evidence()["acted"]
            steering.set_coefficient(coef)
            with steering.policy_pass(model, batch):
                model(**batch)
    assert steering.evidence()["acted"]


# ---- log, record, resume ----


@pytest.mark.parametrize("defense", SCHEDULED)
def test_a_resumed_run_continues_the_schedule(tmp_path, defense):
    def trainer_in(folder, coef):
        options = {**run_options(defense, tmp_path), f"{defense}_coef": coef, "max_steps": STEPS}
        saving = {"save_strategy": "steps", "save_steps": 2}
        return make_trainer(tmp_path / folder, peft=lora(), **options, **saving)

    whole, checkpoint = trainer_in("whole", "0.5->2"), str(tmp_path / "whole" / "checkpoint-2")
    whole.train()
    resumed = trainer_in("resumed", "0.50 -> 2.0")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert logged(resumed, f"{defense}_coef") == logged(whole, f"{defense}_coef") == [0.5, 1.0, 1.5, 2.0]
    assert logged(resumed) == logged(whole)
    assert f"`{defense}_coef=0.5->2`" in (tmp_path / "resumed" / "README.md").read_text(encoding="utf-8")
    for other in ("0.5->1", 0.5):
        with pytest.raises(ValueError, match=r"was trained with .*0\.5->2.*and this run has"):
            trainer_in("other", other).train(resume_from_checkpoint=checkpoint)


def test_a_schedule_that_is_resumed_with_more_steps_ends_with_them(tmp_path):
    options = {"defense": "kl", "kl_coef": "0.5->2", "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, peft=lora(), max_steps=STEPS, **options).train()
    resumed = make_trainer(tmp_path, peft=lora(), max_steps=7, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "kl_coef") == [0.5, 1.0, 1.0, 1.25, 1.5, 1.75, 2.0]


def test_a_schedule_that_was_left_open_comes_from_the_checkpoint(tmp_path):
    def trainer_with(**options):
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS}
        return make_trainer(tmp_path, peft=lora(), defense="kl", **saving, **options)

    whole = trainer_with(kl_coef="0.5->2")
    whole.train()
    resumed = trainer_with()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "kl_coef") == [0.5, 1.0, 1.5, 2.0]
    assert logged(resumed) == logged(whole)


def test_what_steering_has_shown_is_kept_where_its_schedule_has_run_down(tmp_path):
    options = {**run_options("steering", tmp_path), "steering_coef": "5->0", "max_steps": 40}
    saving = {"save_strategy": "steps", "save_steps": 39, "per_device_train_batch_size": 1}
    make_trainer(tmp_path, peft=lora(), **options, **saving).train()
    resumed = make_trainer(tmp_path, peft=lora(), **options, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-39"))
    assert record(resumed)["evidence"]["steering"] == {"layers": [2], "change": {}, "acted": True}


def test_the_log_has_the_value_of_its_step_and_no_constant(tmp_path):
    options = {**merged("kl,ldifs", "options"), "kl_coef": "0->0.3", "max_steps": STEPS, "logging_steps": 2}
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl,ldifs", **options)
    trainer.train()
    assert logged(trainer, "kl_coef") == pytest.approx([0.1, 0.3])
    assert logged(trainer, "ldifs_coef") == []


def test_a_config_keeps_the_text(tmp_path):
    args = config(tmp_path, defense="kl", kl_coef="0.4->0.05")
    assert json.loads(args.to_json_string())["kl_coef"] == "0.4->0.05"
    assert type(args).from_args(args).kl_coef == "0.4->0.05"


def test_a_schedule_that_a_shell_has_cut_is_told():
    with pytest.raises(argparse.ArgumentTypeError, match=r"put a schedule in quotes: '0\.4->0\.05'"):
        coefficient("0.4-")
