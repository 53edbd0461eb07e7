"""Test that a defense proves that it acts, or the run stops."""

import json
import os
from unittest.mock import Mock

import pytest
import torch
from methods import COMPARING, run_options
from peft import get_peft_model
from private import hooks_of
from tiny import FailWithin, Hub, config, evidence, lora, make_model, make_rows, make_tokenizer, make_trainer, record
from transformers import PreTrainedTokenizerFast, TrainerCallback

from trl_emguard import EMGuardTrainer, InactiveDefenseError
from trl_emguard.evidence import PATIENCE, Evidence, moves
from trl_emguard.ops.head import HeadOutput


def detach_term(monkeypatch, defense):
    """Give a term a value and no gradient, as the literature's LDIFS had."""
    if defense == "ldifs":
        from trl_emguard.defenses import LDIFS

        original = LDIFS.token_loss
        monkeypatch.setattr(LDIFS, "token_loss", lambda self, p, r: original(self, p, r).detach())
    else:
        from trl_emguard.guard import loss as guarded_forward

        original = guarded_forward.ce_divergence_head

        def detached(*args):
            output = original(*args)
            return HeadOutput(*output[:-1], divergence_evidence=torch.zeros_like(output.divergence_evidence))

        monkeypatch.setattr(guarded_forward, "ce_divergence_head", detached)


def test_an_interrupted_save_leaves_no_record_of_an_earlier_run(tmp_path, monkeypatch):
    """The weights that were written already are not those of the earlier run, which was defended."""
    first = make_trainer(tmp_path, peft=lora(), defense="kl", max_steps=2)
    first.train()
    first.save_model()
    assert evidence(first, "kl")["acted"] is True
    second = make_trainer(tmp_path, peft=lora(), max_steps=2)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", Mock(side_effect=OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        second.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "defense.json").exists()


@pytest.mark.parametrize("defense", COMPARING[:2])
def test_a_term_without_gradient_stops_the_run(tmp_path, monkeypatch, defense):
    detach_term(monkeypatch, defense)
    trainer = make_trainer(tmp_path, peft=lora(), defense=defense, max_steps=20)
    with pytest.raises(InactiveDefenseError, match=rf"{defense!r} has formed no gradient.*detached graph.*saved in"):
        trainer.train()
    assert trainer.state.global_step == 1 + PATIENCE
    checkpoint = tmp_path / f"checkpoint-{1 + PATIENCE}"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    shown = json.loads((checkpoint / "defense.json").read_text())["evidence"][defense]
    assert shown["acted"] is False
    assert shown["value"] > 0


def test_one_dead_term_of_two_stops_the_run(tmp_path, monkeypatch):
    detach_term(monkeypatch, "ldifs")
    with pytest.raises(InactiveDefenseError, match="'ldifs'"):
        make_trainer(tmp_path, peft=lora(), defense="kl,ldifs").train()


def test_a_short_run_is_judged_at_its_end(tmp_path, monkeypatch):
    detach_term(monkeypatch, "ldifs")
    with pytest.raises(InactiveDefenseError, match=r"in the last 1 step\(s\)"):
        make_trainer(tmp_path, peft=lora(), defense="ldifs", max_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "defense.json").is_file()
    assert "**This model was not defended.**" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_verdict_at_the_end_is_pushed(tmp_path, monkeypatch, strategy):
    detach_term(monkeypatch, "ldifs")
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    options = {"max_steps": 2, "save_strategy": strategy, "save_steps": 1, "push_to_hub": True}
    with pytest.raises(InactiveDefenseError, match=r"in the last 1 step\(s\)"):
        make_trainer(tmp_path, peft=lora(), defense="ldifs", **options).train()
    assert "**This model was not defended.**" in hub.pushed[-1].card
    assert hub.pushed[-1].record["global_step"] == 2


@pytest.mark.parametrize("layers", ["1", "1,2,3,4"])
def test_blocks_that_no_trained_weight_can_move_are_refused(tmp_path, layers):
    """Refuse blocks below the only one with LoRA. With checkpointing their states require grad all the same."""
    model = get_peft_model(make_model(), lora(target_modules=["q_proj"], layers_to_transform=[3]))
    with pytest.raises(
        ValueError, match="compares the output of block 1, but the lowest block with a trained weight is 4"
    ):
        make_trainer(tmp_path, model, defense="ldifs", ldifs_layers=layers)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_that_are_frozen_later_stop_the_run(tmp_path, checkpointing):
    trainer = make_trainer(
        tmp_path, peft=lora(), defense="ldifs", ldifs_layers="1", activation_checkpointing=checkpointing
    )
    for name, parameter in trainer.model.named_parameters():
        if ".layers.3." not in name:
            parameter.requires_grad_(False)
    with pytest.raises(InactiveDefenseError, match="frozen layers"):
        trainer.train()


def test_a_defense_that_dies_on_the_way_stops_the_run(tmp_path):
    """Stop a run whose defense acted for some steps, and whose reference then became the policy."""
    from transformers import TrainerCallback

    trainer = make_trainer(tmp_path, peft=lora(), defense="ldifs", max_steps=30)

    class Alias(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.reference.switch.modules.clear()

    trainer.add_callback(Alias())
    with pytest.raises(InactiveDefenseError, match="the reference has moved"):
        trainer.train()
    assert trainer.state.global_step == 4 + PATIENCE
    assert evidence(trainer, "ldifs")["acted"]


def test_the_model_is_saved_whatever_the_save_strategy(tmp_path, monkeypatch):
    detach_term(monkeypatch, "ldifs")
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, peft=lora(), eval_dataset=make_rows(4), defense="ldifs", max_steps=20, **options)
    with pytest.raises(InactiveDefenseError, match=rf"saved in .*checkpoint-{1 + PATIENCE}\."):
        trainer.train()
    assert (tmp_path / f"checkpoint-{1 + PATIENCE}" / "adapter_model.safetensors").is_file()
    assert "**This model was not defended.**" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("defense", COMPARING[:2])
def test_steps_at_rate_zero_do_not_count(tmp_path, defense):
    """Judge no step at rate 0, as at the beginning of a warm-up: the policy stands still."""
    trainer = make_trainer(tmp_path, peft=lora(), defense=defense, learning_rate=0.0, max_steps=6)
    trainer.train()
    shown = evidence(trainer, defense)
    assert shown["judged_steps"] == 0
    assert not shown["acted"]


@pytest.mark.parametrize("defense", COMPARING[:2])
def test_steps_without_positions_do_not_count(tmp_path, caplog, defense):
    rows = make_trainer(tmp_path, rows=make_rows(4), defense="none").train_dataset.to_list()
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    rows = type(make_rows(1)).from_list(rows)
    trainer = make_trainer(tmp_path, rows=rows, peft=lora(), defense=defense, max_steps=6)
    trainer.train()
    assert evidence(trainer, defense)["judged_steps"] == 0
    assert f"defense {defense!r}: training ended before the policy had moved" in caplog.text


def test_a_run_that_acts_has_the_evidence(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl,ldifs", gradient_accumulation_steps=2)
    trainer.train()
    found = record(trainer)["evidence"]
    assert found.keys() == {"kl", "ldifs"}
    for shown in found.values():
        assert shown["acted"]
        assert shown["requires_grad"] == 10
        assert shown["judged_steps"] == 4


def test_resumed_evidence_goes_on(tmp_path, monkeypatch):
    """Continue the count of steps without evidence in a resumed run."""
    options = {"peft": lora(), "defense": "ldifs", "save_strategy": "steps", "save_steps": 1}
    detach_term(monkeypatch, "ldifs")
    with pytest.raises(InactiveDefenseError):
        make_trainer(tmp_path, max_steps=2, **options).train()
    trainer = make_trainer(tmp_path, max_steps=20, **options)
    with pytest.raises(InactiveDefenseError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 1 + PATIENCE


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        # (learning rate, label tokens, positions, evidence) a step
        ([(1, 9, 9, 0)] + [(1, 9, 9, 0)] * PATIENCE, True),
        ([(1, 9, 9, 0)] + [(1, 9, 9, 0)] * (PATIENCE - 1), False),
        ([(1, 9, 9, 0)] * 3 + [(1, 9, 9, 1e-9)] + [(1, 9, 9, 0)] * (PATIENCE - 1), False),
        ([(1, 9, 9, 1)] * 9 + [(1, 9, 9, 0)] * PATIENCE, True),
        ([(1, 9, 9, float("nan"))] + [(1, 9, 9, 0)] * PATIENCE, True),
        ([(0.01, 9, 9, 0)] * 9, False),
        ([(0.01, 9, 9, 0)] * 9 + [(0.1, 9, 9, 0)] + [(0.01, 9, 9, 0)] * PATIENCE, True),
        ([(0, 9, 9, 0)] * 9, False),
        ([(1, 0, 9, 0)] * 9, False),
        ([(1, 9, 9, 0)] + [(1, 9, 0, 0)] * 9, False),
        ([(1, 9, 9, float("nan"))] * 9, False),
    ],
)
def test_verdict(steps, verdict):
    proof, has_moved = Evidence(), False
    for rate, tokens, positions, gradient in steps:
        proof.end_step(1.0, positions, gradient, 1, has_moved=has_moved)
        has_moved = has_moved or moves(rate, tokens)
    assert (proof.verdict("kl") is not None) == verdict
    assert Evidence.read("kl", json.loads(json.dumps(proof.as_json()))) == proof


def test_states_that_do_not_require_grad_are_no_evidence():
    proof = Evidence()
    for step in range(1 + PATIENCE):
        proof.end_step(1.0, 5, 1.0, 0, has_moved=step > 0)
    assert "no trainable weight" in proof.verdict("kl")


def test_an_aborted_step_leaves_no_sums(tmp_path):
    """Discard the sums of a step that an exception cut off."""
    expected = make_trainer(tmp_path / "a", peft=lora(), defense="kl", gradient_accumulation_steps=2, max_steps=1)
    expected.train()
    trainer = make_trainer(tmp_path / "b", peft=lora(), defense="kl", gradient_accumulation_steps=2, max_steps=1)

    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] == expected.state.log_history[0]["num_tokens"]


@pytest.mark.parametrize("is_policy", [True, False])
def test_nothing_is_left_behind_by_a_failing_step(tmp_path, is_policy):
    """Leave no hook and no switched-off adapter after an exception within the policy's or the reference's pass."""
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl,ldifs")

    def look():
        hooks = [len(hooks_of(layer)) for layer in trainer.model.get_base_model().model.layers]
        return hooks, {module.disable_adapters for module in trainer.reference.switch.modules}

    before, failure = look(), FailWithin(look, is_policy)
    trainer.add_callback(failure)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    hooks, switched_off = failure.seen
    assert hooks[1] > before[0][1]  # layer 2 is recorded
    assert switched_off == {not is_policy}
    assert look() == before == ([0] * 4, {False})
    assert os.listdir(tmp_path) == [] or "checkpoint-1" not in os.listdir(tmp_path)


@pytest.mark.parametrize("defense", ["steering", "kl", "ldifs", "interleave"])  # inoculation has acted before training
def test_a_subclass_that_leaves_compute_loss_out_stops_the_run(tmp_path, defense):
    """Stop a run whose own loss never reaches the defense. The loss itself is the user's choice."""

    class Own(EMGuardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}
            return model(**inputs).loss

    options = run_options(defense, tmp_path)
    pool = options.pop("interleave_dataset", None)
    trainer = Own(
        make_model(),
        config(tmp_path, **options),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=lora(),
        interleave_dataset=pool,
    )
    with pytest.raises(InactiveDefenseError, match=r"without EMGuardTrainer\.compute_loss"):
        trainer.train()


@pytest.mark.parametrize("defense", ["inoculation", "interleave"])
def test_rows_that_go_around_the_defenses_stop_the_run(tmp_path, defense):
    class Own(EMGuardTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return super()._prepare_dataset(dataset.select(range(len(dataset))), *args, **kwargs)

    options = run_options(defense, tmp_path)
    pool = options.pop("interleave_dataset", None)
    args = config(tmp_path, **options)
    with pytest.raises(InactiveDefenseError, match="did not come by"):
        Own(make_model(), args, train_dataset=make_rows(), processing_class=make_tokenizer(), interleave_dataset=pool)


def test_a_vector_file_that_vanishes_after_construction_is_not_read_again(tmp_path, capsys):
    options = run_options("steering", tmp_path, max_steps=1)
    trainer = make_trainer(tmp_path, **options)
    os.unlink(options["steering_vector"])
    trainer.train()
    assert "defense 'steering' acts" in capsys.readouterr().out
