"""Test that a reference that moves after the first step stops the run, and that a trainer undoes its changes."""

import gc
from contextlib import contextmanager

import pytest
import torch
from methods import COMPARING
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from tiny import evidence, logged, lora, make_model, make_rows, make_trainer
from transformers import TrainerCallback

from trl_emguard import EMGuardTrainer, InactiveDefenseError
from trl_emguard.guard.forward import States
from trl_emguard.reference.adapter import adapter_is_zero
from trl_emguard.reference.watch import ReferenceWatch


FAST = {"defense": "kl", "kl_coef": 1e-6, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "max_steps": 8}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_closure_around_a_forward_moves_the_copy(tmp_path, is_compiled):
    """Find a frozen copy that runs the policy's layers, since a deep copy shares the closure."""
    policy = make_model()
    for layer in policy.model.layers:
        if is_compiled:
            layer.forward = torch.compile(layer.forward, backend="eager")
        else:
            layer.forward = lambda *args, inner=layer.forward, **kwargs: inner(*args, **kwargs)
    trainer = make_trainer(tmp_path, policy, **FAST)
    with pytest.raises(InactiveDefenseError, match="the reference has moved: after the first update"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_adapter_that_is_added_late_moves_the_reference(tmp_path):
    policy = get_peft_model(make_model(), lora(target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, policy, **FAST)
    policy.add_adapter("late", lora(target_modules=["gate_proj"]))
    policy.base_model.set_adapter(["default", "late"])
    with pytest.raises(InactiveDefenseError, match="the reference has moved"):
        trainer.train()


@pytest.mark.parametrize("saves", [True, False])
def test_a_merge_into_the_base_is_found_at_a_save_or_at_the_end(tmp_path, saves):
    class Merge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.merge_adapter()
                model.unmerge_adapter()
                with torch.no_grad():
                    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.mul_(1.01)

    options = {"save_strategy": "steps", "save_steps": 4} if saves else {}
    trainer = make_trainer(tmp_path, peft=lora(), **{**FAST, **options})
    trainer.add_callback(Merge())
    when = "at step 4" if saves else "at the end of training"
    with pytest.raises(InactiveDefenseError, match=f"the reference has moved: {when}"):
        trainer.train()
    assert "This model was not defended" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "cached"), [("norm", False), ("embed_tokens", False), ("lm_head", False), ("lm_head", True)]
)
def test_weights_that_a_callback_unfreezes_move_the_reference(tmp_path, name, cached):
    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
            if state.global_step == 3:
                new = [p for n, p in model.named_parameters() if name in n and "lora" not in n]
                for parameter in new:
                    parameter.requires_grad_(True)
                optimizer.optimizer.add_param_group({"params": new, "lr": 3e-2, "initial_lr": 3e-2})
                lr_scheduler.base_lrs.append(3e-2)
                lr_scheduler.lr_lambdas.append(lambda step: 1.0)

    policy = make_model(tie_word_embeddings=False)
    trainer = make_trainer(tmp_path, policy, peft=lora(), cache_reference=cached, **FAST)
    trainer.add_callback(Unfreeze())
    with pytest.raises(InactiveDefenseError, match="the reference has moved"):
        trainer.train()


@pytest.mark.parametrize("defense", COMPARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_that_stays_is_left_alone(tmp_path, defense, dtype):
    trainer = make_trainer(tmp_path, make_model(dtype=dtype), defense=defense, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_reference_is_watched_in_training_mode(tmp_path):
    """Evaluate before each save and at the end: in eval mode, kernels of some models give other numbers."""
    policy = make_model()
    policy.model.layers[0].register_forward_hook(lambda m, a, out: out if m.training else 1.01 * out)
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = make_trainer(tmp_path, policy, peft=lora(), defense="kl", eval_dataset=make_rows(4), **steps)
    trainer.train()
    assert trainer.state.global_step == 4
    assert not trainer.model.training


def test_another_graph_of_a_compiled_reference_is_no_move():
    """Compile for other shapes between record and check, with a backend whose graphs differ by more than rounding."""
    graphs = []

    def shifting(graph, inputs):
        graphs.append(graph)
        shift = len(graphs)
        return lambda *args: [out + shift for out in graph(*args)]

    @torch.compile(backend=shifting)
    def double(states):
        return 2 * states

    @contextmanager
    def run(batch, positions):
        states = double(batch["input_ids"].float()[..., None])
        yield States(states[:, :-1][positions], {}, (None, None))

    watch = ReferenceWatch(make_model(), has_divergence=False)
    ids = torch.arange(4.0, 16.0).view(2, 6)
    with torch.no_grad():
        double(ids[..., None])
        watch.record({"input_ids": ids, "labels": ids.long()}, run)
        double(torch.ones(3, 7, 1))
    assert len(graphs) == 2
    assert watch.check(run, "later") is None


@pytest.mark.parametrize("tuning", ["lora", "rslora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_training_mode_is_refused_however_small(tmp_path, tuning, dtype):
    """Allow no difference in the first step where policy and reference compute alike, and none in bf16."""
    noisy = make_model(dtype=dtype)
    noisy.model.layers[0].register_forward_hook(
        lambda m, a, out: out + 0.01 * torch.randn_like(out) if m.training else out
    )
    peft = None if tuning == "full" else lora(use_rslora=tuning == "rslora")
    with pytest.raises(ValueError, match="states differ from those of the reference"):
        make_trainer(tmp_path, noisy, peft=peft, defense="kl").train()


# ---- the gradient must flow back ----


def plain_loss(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize("defense", ["kl", "steering"])
def test_a_loss_for_the_log_alone_is_no_evidence(tmp_path, defense, vector):
    class Own(EMGuardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            super().compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return plain_loss(model, inputs)

    options = {"steering_vector": vector, "steering_layers": "2"} if defense == "steering" else {}
    trainer = make_trainer(tmp_path, peft=lora(), defense=defense, **options)
    trainer.__class__ = Own
    with pytest.raises(InactiveDefenseError, match="no gradient flowed back into its loss"):
        trainer.train()


def test_two_losses_on_one_batch_are_right(tmp_path):
    """Allow two losses on one batch, as R-Drop and SAM take."""

    class Twice(EMGuardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses = [
                super(Twice, self).compute_loss(model, dict(inputs), False, num_items_in_batch) for _ in range(2)
            ]
            return sum(losses) / 2

    trainer = make_trainer(tmp_path, peft=lora(), defense="kl")
    trainer.__class__ = Twice
    trainer.train()
    assert evidence(trainer, "kl")["acted"]


def test_outputs_say_why_they_have_no_logits(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl", max_steps=1)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    with pytest.raises(AttributeError, match="never forms whole logits"):
        _ = outputs.logits


def test_a_frozen_adapter_stops_the_run(tmp_path):
    """Find an adapter that PEFT froze for inference. With checkpointing the loss requires grad all the same."""
    get_peft_model(make_model(), lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    trainer = make_trainer(tmp_path, policy, defense="steering", max_steps=6, activation_checkpointing=True, **{
        "steering_vector": make_vector(tmp_path), "steering_layers": "2",
    })  # fmt: skip
    with pytest.raises(InactiveDefenseError, match="the gradient norm was 0 in 3 steps in a row"):
        trainer.train()


def test_a_head_that_trains_alone_is_reached(tmp_path):
    policy = make_model(tie_word_embeddings=False)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    trainer = make_trainer(tmp_path, policy, defense="kl", max_steps=6)
    trainer.train()
    assert evidence(trainer, "kl")["acted"]


# ---- undone changes ----


@pytest.mark.parametrize("defense", COMPARING)
def test_dropout_is_off_in_training_alone(tmp_path, defense):
    policy = get_peft_model(make_model(), lora(lora_dropout=0.3))
    dropouts = [m for m in policy.modules() if isinstance(m, torch.nn.Dropout)]
    trainer, seen = make_trainer(tmp_path, policy, defense=defense, max_steps=2), []
    policy.register_forward_pre_hook(lambda *args: seen.append({m.p for m in dropouts}))
    assert {m.p for m in dropouts} == {0.3}
    trainer.train()
    assert len(seen) >= 2
    assert all(probabilities == {0.0} for probabilities in seen)
    assert {m.p for m in dropouts} == {0.3}


def test_two_trainers_on_one_adapter_have_a_copy_each(tmp_path):
    policy = get_peft_model(make_model(), lora(init_lora_weights=False))
    first = make_trainer(tmp_path / "a", policy, defense="kl", max_steps=2)
    second = make_trainer(tmp_path / "b", policy, defense="kl", max_steps=2)
    assert first.reference.adapter != second.reference.adapter
    first.train()
    assert logged(first, "kl")[0] == 0
    del first
    gc.collect()
    assert second.reference.adapter in policy.peft_config
    assert set(policy.peft_config) == {"default", second.reference.adapter}
    second.save_model(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("ref*"))


def test_a_trainer_that_is_gone_leaves_the_model_as_it_was(tmp_path):
    policy = get_peft_model(make_model(), lora(init_lora_weights=False))
    other = make_model()
    for parameter in other.parameters():
        parameter.requires_grad_(True)
    make_trainer(tmp_path, policy, defense="kl", max_steps=1)
    make_trainer(tmp_path, make_model(), defense="kl", ref_model=other, max_steps=1)
    gc.collect()
    assert set(policy.peft_config) == {"default"}
    assert "save_pretrained" not in vars(policy)
    assert all(parameter.requires_grad for parameter in other.parameters())


# PEFT warns that the head, tied to the trained tokens, stays as it is.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_trained_tokens_are_no_fresh_adapter():
    policy = get_peft_model(make_model(), TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 4]))
    assert adapter_is_zero(policy)
    with torch.no_grad():
        next(p for p in policy.parameters() if p.requires_grad).add_(1.0)
    assert not adapter_is_zero(policy)


# ---- checkpoints of another run ----


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def test_true_takes_no_other_runs_checkpoint(tmp_path):
    options = {"peft": lora(), "defense": "kl", "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, rows=make_rows(16), **options).train()
    stopped = make_trainer(tmp_path, rows=make_rows(20), **options)
    stopped.add_callback(Stop())
    stopped.train()
    again = make_trainer(tmp_path, rows=make_rows(20), **{**options, "learning_rate": 2e-2, "logging_steps": 2})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    with pytest.raises(ValueError, match=r"checkpoint-8 is of another run \(it has rows.*today's date"):
        make_trainer(tmp_path / "new", rows=make_rows(24), **options).train(str(tmp_path / "checkpoint-8"))


def test_a_named_checkpoint_of_another_run_is_refused(tmp_path):
    """Refuse a folder that the user names, too. How long and how fast a run trains does not make it another."""
    options = {"defense": "kl", "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **options).train()
    folder = str(tmp_path / "checkpoint-2")
    other = make_model()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    for given in ({"rows": make_rows(17).select(range(1, 17))}, {"seed": 7}, {"model": other}):
        with pytest.raises(ValueError, match=r"checkpoint-2 (is of another run|was held to another reference)"):
            make_trainer(tmp_path / "new", **{**options, **given}).train(folder)
    may_change = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "logging_steps": 2}
    resumed = make_trainer(tmp_path / "new", **{**options, **may_change, "save_strategy": "no"})
    resumed.train(folder)
    assert resumed.state.global_step == 4
    resumed.train()
    assert resumed.state.global_step == 4
    assert logged(resumed, "kl")


@pytest.fixture
def vector(tmp_path):
    return make_vector(tmp_path)


def make_vector(folder):
    torch.save(torch.randn(5, 32, generator=torch.Generator().manual_seed(3)), folder / "vector.pt")
    return str(folder / "vector.pt")
