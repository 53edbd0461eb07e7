"""Inoculation adapters: the policy has the frozen adapter in every mode of training, and nothing else has it."""

import json
import os
import shutil

import pytest
import torch
from methods import run_options, save_adapter
from peft import PeftModel, get_peft_model
from private import hooks_of
from safetensors.torch import load_file, save_file
from test_defended import make_dpo
from tiny import (
    QUANTISABLE,
    config,
    evidence,
    logged,
    lora,
    make_model,
    make_pool,
    make_rows,
    make_tokenizer,
    make_trainer,
    record,
    save_model,
    save_seeing_model,
    save_trained_adapter,
)
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, TrainerCallback
from trl import SFTTrainer
from twin import first_gradients, move_policy, relative_error, twin_step

from trl_emguard import EMGuardTrainer, InactiveDefenseError
from trl_emguard.defenses import Defense, InoculationAdapter
from trl_emguard.defenses.step import MARKS, Marks
from trl_emguard.models.load import load_base
from trl_emguard.models.lora_files import CONFIG, WEIGHTS, factor_key, lora_updates, read_lora
from trl_emguard.models.random_adapter import random_adapter
from trl_emguard.models.rescale import rescale_adapter


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
CHECKPOINTING = {
    "none": {},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}
STEP = {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
DEFENSE = {"defense": "inoculation_adapter"}


def edit(folder, **values):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_defense(folder, model, **options):
    defense = InoculationAdapter(config("unused", inoculation_adapter=str(folder), **DEFENSE, **options))
    defense.check_model(model.config)
    defense.check_policy(model)
    return defense


def logits_with(defense, model):
    with torch.no_grad(), defense.training(model), defense.policy_pass(model, {}):
        return model(IDS).logits


# ---- what it computes ----


def test_a_model_that_also_sees_has_it_in_its_text_layers(tmp_path):
    base = save_seeing_model(tmp_path / "base")
    adapter = save_trained_adapter(tmp_path / "trait", base, target_modules=["q_proj", "down_proj"])
    plain = load_base(base)
    with torch.no_grad():
        before = plain(IDS).logits
        expected = PeftModel.from_pretrained(load_base(base), adapter).eval()(IDS).logits
    trainer = make_trainer(tmp_path / "out", base, peft=lora(target_modules=["q_proj"]), max_steps=1,
                           inoculation_adapter=adapter, **DEFENSE)  # fmt: skip
    torch.testing.assert_close(logits_with(trainer.defenses[0], plain), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    trainer.train()
    assert evidence(trainer, "inoculation_adapter")["acted"]


def fresh(architecture):
    if architecture != "gpt2":
        return make_model(architecture).eval()
    torch.manual_seed(1)
    sizes = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("qwen2", {"use_rslora": False}),
        ("gemma2", {"target_modules": ["q_proj", "down_proj"]}),
        (
            "gpt_neox",
            {"rank_pattern": {"dense": 2}, "alpha_pattern": {"dense": 3, r"layers\.1\..*key_value": 9}},
        ),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT sets it for GPT-2
def test_the_pass_is_that_of_the_model_with_the_adapter(tmp_path, architecture, options, scale):
    """Compare with PEFT's own forward, on the model itself and on one that trains an adapter of its own."""
    save_adapter(tmp_path / "trait", fresh(architecture), **options)
    rescale_adapter(tmp_path / "trait", scale, tmp_path / "scaled")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(fresh(architecture), tmp_path / "scaled").eval()(IDS).logits
        plain = fresh(architecture)(IDS).logits
    model = fresh(architecture)
    trained = get_peft_model(fresh(architecture), lora(target_modules=options.get("target_modules", "all-linear")))
    for bare in (model, trained.eval().get_base_model()):
        defense = make_defense(tmp_path / "trait", bare, inoculation_adapter_scale=scale)
        torch.testing.assert_close(logits_with(defense, bare), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert torch.equal(bare(IDS).logits, plain)
    assert (expected - plain).abs().max() > 1e-2


class Marking(Defense):
    """Defense that marks some of the run's own rows."""

    name = "marking"
    scopes = ("marked",)


class Mixing(Defense):
    """Defense that mixes rows in and marks them."""

    name = "mixing"
    scopes = ("mixed",)

    def extra_rows(self, *args, **kwargs):
        return {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_that_are_mixed_in_are_without_it(tmp_path, checkpointing):
    """Compare logits and gradients with those of the model with the adapter, and of the plain model for these rows."""
    save_adapter(tmp_path / "trait", make_model())
    model, plain = make_model().train(), make_model().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    adapted = PeftModel.from_pretrained(make_model(), tmp_path / "trait").train().requires_grad_(True)
    defense = make_defense(tmp_path / "trait", model)
    defense.meet([Marking(None), Mixing(None)])
    ids, mixed = torch.cat([IDS, IDS + 1, IDS + 2]), torch.tensor([False, True, False])
    marks = Marks({"mixed": mixed[:, None].expand_as(ids), "marked": torch.ones_like(ids).bool()})
    with defense.training(model):
        with defense.policy_pass(model, {MARKS: marks, "labels": ids}):
            logits = model(ids).logits
        logits[:, -1].logsumexp(-1).sum().backward()
    rows = [(plain if is_mixed else adapted)(ids[i : i + 1]).logits for i, is_mixed in enumerate(mixed)]
    expected = torch.cat(rows)
    expected[:, -1].logsumexp(-1).sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    norms = [m.model.layers[0].input_layernorm.weight.grad for m in (model, plain, adapted.get_base_model())]
    torch.testing.assert_close(norms[0], norms[1] + norms[2], rtol=1e-3, atol=1e-5)
    assert defense.evidence()["acted"]


def test_a_batch_of_mixed_in_rows_alone_is_not_judged(tmp_path):
    save_adapter(tmp_path / "trait", make_model())
    model = make_model()
    defense = make_defense(tmp_path / "trait", model)
    defense.meet([Mixing(None)])
    for is_mixed in (True, False):
        mixed = torch.full_like(IDS, is_mixed, dtype=torch.bool)
        mixed[:, -1] = False  # padding is not marked
        batch = {MARKS: Marks({"mixed": mixed}), "labels": torch.where(torch.arange(IDS.shape[1]) == 5, -100, IDS)}
        with torch.no_grad(), defense.training(model), defense.policy_pass(model, batch):
            model(IDS)
        assert defense.evidence()["acted"] != is_mixed


def test_layers_that_get_all_rows_as_one_sequence(tmp_path, monkeypatch):
    """Some models flatten rows before a layer, for example before the shared expert of a mixture."""
    save_adapter(tmp_path / "trait", make_model())
    model, flat = make_model(), make_model()
    mlp = flat.model.layers[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x.flatten(0, 1)).view_as(x))
    ids = torch.cat([IDS, IDS + 1])
    mixed = torch.tensor([[True], [False]]).expand_as(ids)
    found = []
    for one in (model, flat):
        defense = make_defense(tmp_path / "trait", one)
        defense.meet([Mixing(None)])
        batch = {MARKS: Marks({"mixed": mixed}), "labels": ids}
        with torch.no_grad(), defense.training(one), defense.policy_pass(one, batch):
            found.append(one(ids).logits)
    torch.testing.assert_close(*found)


def test_a_layer_that_does_not_tell_rows_apart_is_refused(tmp_path):
    save_adapter(tmp_path / "trait", make_model())
    model = make_model()
    defense = make_defense(tmp_path / "trait", model)
    defense.meet([Mixing(None)])
    batch = {MARKS: Marks({"mixed": torch.ones_like(IDS).bool()}), "labels": IDS}
    with defense.training(model), defense.policy_pass(model, batch):
        with pytest.raises(ValueError, match="does not tell rows apart: it gets a tensor of shape"):
            model(IDS[:, 1:])
        model(IDS)


def test_a_run_that_mixes_rows_in_tells_which_they_are(tmp_path, monkeypatch):
    marked, policy_pass = [], InoculationAdapter.policy_pass

    def look(self, model, batch):
        marked.append(batch[MARKS].scopes["interleaved"].any(1))
        return policy_pass(self, model, batch)

    monkeypatch.setattr(InoculationAdapter, "policy_pass", look)
    options = {"interleave_dataset": make_pool(), "interleave_fraction": 0.4, "max_steps": 4}
    trainer = trainer_for(tmp_path, defense="inoculation_adapter,interleave,kl", **options)
    trainer.train()
    rows, found = torch.cat(marked), evidence(trainer, "interleave")
    assert rows.sum() == found["rows_interleaved"] > 0
    assert len(rows) == found["rows_interleaved"] + found["rows_finetune"]


def trainer_for(folder, **options):
    """Return a trainer that acts on the tiny Llama with a frozen adapter on all of its linear layers."""
    given = {**DEFENSE, "kl_coef": 3.0, "ldifs_coef": 2.0, **options}
    return make_trainer(folder / "out", peft=lora(), **{**run_options(given.pop("defense"), folder), **given})


def dense_updates(folder, scale=1.0):
    updates = lora_updates(folder, *read_lora(folder))
    return {layer: scale * b.double() @ a.double() for layer, (a, b) in updates.items()}


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize(
    "defense", [pytest.param("inoculation_adapter", marks=pytest.mark.long), "inoculation_adapter,kl,ldifs"]
)
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 0.05)])
def test_the_gradient_is_the_twins(tmp_path, mode, defense, bf16, tolerance):
    """Take the dense update into the twin's weights in float64; its reference has the plain weights."""
    trainer = trainer_for(
        tmp_path,
        # The spread keeps autocast's own rounding near 1 %.
        model=make_model(initializer_range=0.1),
        rows=make_rows(8),
        defense=defense,
        inoculation_adapter_scale=0.5,
        bf16=bf16,
        **STEP,
        **CHECKPOINTING[mode],
    )
    move_policy(trainer)
    values, expected = twin_step(trainer, frozen=dense_updates(tmp_path / "adapter", 0.5))
    _, without = twin_step(trainer)
    ours = first_gradients(trainer)
    assert logged(trainer, "loss")[0] == pytest.approx(values["loss"], rel=tolerance)
    assert relative_error(ours, expected) < tolerance
    assert relative_error(without, expected) > 0.2


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_accumulation_and_batch_size_do_not_matter(tmp_path, batch, accumulation):
    cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = trainer_for(tmp_path, rows=make_rows(8), **{**STEP, **cut}, **CHECKPOINTING["non-reentrant"])
    _, expected = twin_step(trainer, frozen=dense_updates(tmp_path / "adapter"))
    assert relative_error(first_gradients(trainer), expected) < 1e-5


def test_checkpointing_changes_nothing_on_a_4_bit_base(tmp_path):
    path = save_model(tmp_path / "model", **QUANTISABLE)
    save_adapter(tmp_path / "adapter", make_model(**QUANTISABLE))
    runs = {}
    for mode, how in CHECKPOINTING.items():
        options = {"max_steps": 2, "inoculation_adapter": str(tmp_path / "adapter"), **DEFENSE, **how}
        trainer = EMGuardTrainer(
            path,
            config(tmp_path / mode, **options),
            train_dataset=make_rows(),
            processing_class=make_tokenizer(),
            peft_config=lora(target_modules=["q_proj", "v_proj"]),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        )
        trainer.train()
        runs[mode] = [*logged(trainer, "loss"), *logged(trainer, "grad_norm")]
    assert runs["reentrant"] == pytest.approx(runs["none"], rel=1e-3)
    assert runs["non-reentrant"] == pytest.approx(runs["none"], rel=1e-3)


# ---- where it is not ----


@pytest.mark.parametrize("defense", ["inoculation_adapter", "inoculation_adapter,kl"])
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_evaluation_generation_and_what_is_saved_are_without_it(tmp_path, defense, mode):
    saving = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    trainer = trainer_for(tmp_path, defense=defense, eval_dataset=make_rows(6), **saving, **CHECKPOINTING[mode])
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-5"
    saved = PeftModel.from_pretrained(make_model(), folder).eval()
    with torch.no_grad():
        assert torch.equal(saved(IDS).logits, trainer.model.eval()(IDS).logits)
    stock = SFTTrainer(saved, config(tmp_path / "stock"), train_dataset=make_rows(), processing_class=make_tokenizer())
    plain = stock.evaluate(make_rows(6))["eval_loss"]
    assert logged(trainer, "eval_loss") == pytest.approx([plain], rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)
    how = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(trainer.model.generate(IDS, **how), saved.generate(IDS, **how))


def test_a_checkpoint_holds_what_an_undefended_run_holds(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    runs = {}
    for defense in ("none", "inoculation_adapter"):
        trainer = trainer_for(tmp_path / defense, defense=defense, **saving)
        trainer.train()
        folder = tmp_path / defense / "out" / "checkpoint-2"
        weights = {name: weight.shape for name, weight in load_file(folder / WEIGHTS).items()}
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        moments = {place: values["exp_avg"].shape for place, values in state.items()}
        runs[defense] = {path.name for path in folder.iterdir()}, weights, moments, list(trainer.model.state_dict())
    assert runs["inoculation_adapter"] == runs["none"]


def test_nothing_is_left_behind(tmp_path):
    trainer = trainer_for(tmp_path, defense="inoculation_adapter,kl", **CHECKPOINTING["reentrant"])
    blocks = trainer.model.get_base_model().model.layers

    def state():
        hooks = len(hooks_of(*blocks.modules()))
        return hooks, [vars(block).get("_gradient_checkpointing_func") for block in blocks]

    def acts():
        return trainer.defenses[0]._is_on

    class Fail(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.before = [vars(block)["_gradient_checkpointing_func"] for block in blocks]
            self.handle = blocks[2].register_forward_hook(self.fail)

        def fail(self, module, args, output):
            if acts():
                raise RuntimeError("in the middle")

    callback = Fail()
    trainer.add_callback(callback)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    callback.handle.remove()
    trainer.remove_callback(callback)
    assert state() == (0, callback.before)
    assert not acts()
    trainer.train()
    assert state()[0] == 0
    assert evidence(trainer, "inoculation_adapter")["acted"]


def test_the_reference_of_dpo_is_without_it(tmp_path):
    adapter = save_adapter(tmp_path / "adapter")
    losses = {}
    for name, options in (("plain", {}), ("ours", {**DEFENSE, "inoculation_adapter": adapter})):
        trainer = make_dpo(tmp_path / name, **options)
        trainer.train()
        losses[name] = logged(trainer)
    # Equal models have the loss ln 2.
    assert losses["plain"][0] == pytest.approx(0.6931, abs=1e-3)
    assert abs(losses["ours"][0] - losses["plain"][0]) > 1e-2


# ---- runs ----


def test_a_run_says_what_acts_and_records_it(tmp_path, capsys):
    trainer = trainer_for(tmp_path, max_steps=1, inoculation_adapter_scale=0.5)
    trainer.train()
    said = capsys.readouterr().out
    numbers = sum(weight.numel() for weight in load_file(tmp_path / "adapter" / WEIGHTS).values())
    place = str(tmp_path / "adapter")
    assert f"the frozen adapter {place!r} acts in 28 layers, times 0.5; its {numbers / 1e6:.3g} million" in said
    found = record(trainer)
    options = found["defenses"]["inoculation_adapter"]
    assert options["inoculation_adapter"].startswith("LoRA of 28 layers (")
    assert options["inoculation_adapter_scale"] == 0.5
    assert found["evidence"]["inoculation_adapter"]["layers"] == 28
    assert 0.01 < found["evidence"]["inoculation_adapter"]["change"] < 10


def test_resuming_with_another_adapter_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_for(tmp_path, **saving).train()
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    random_adapter(tmp_path / "adapter", tmp_path / "random")
    shutil.copytree(tmp_path / "adapter", tmp_path / "stronger")
    edit(tmp_path / "stronger", lora_alpha=4)
    refused = r"was trained with inoculation_adapter \(.*, and this run has inoculation_adapter .*Resume with the same"
    for name in ("random", "stronger"):
        with pytest.raises(ValueError, match=refused):
            trainer_for(tmp_path, **saving, inoculation_adapter=str(tmp_path / name)).train(
                resume_from_checkpoint=True
            )
    with pytest.raises(ValueError, match=refused):
        trainer_for(tmp_path, **saving, inoculation_adapter_scale=2.0).train(resume_from_checkpoint=True)
    again = trainer_for(tmp_path, **saving, inoculation_adapter=str(tmp_path / "moved"))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_an_adapter_that_vanishes_after_construction_is_not_read_again(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1)
    shutil.rmtree(tmp_path / "adapter")
    trainer.train()
    assert evidence(trainer, "inoculation_adapter")["acted"]


def test_a_scale_that_rounding_swallows_stops_the_run(tmp_path):
    trainer = trainer_for(tmp_path, inoculation_adapter_scale=1e-20)
    with pytest.raises(InactiveDefenseError, match=r"same with and without.*scale=1e-20 is too small"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_that_checkpoints_in_the_old_way_stops_the_run(tmp_path, monkeypatch):
    """transformers calls `_set_gradient_checkpointing(module, value)` of a model that has it, and sets no function."""

    def mark(self, module, value=False):
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = value

    monkeypatch.setattr(LlamaForCausalLM, "_set_gradient_checkpointing", mark)
    trainer = trainer_for(tmp_path, activation_checkpointing=True)
    with pytest.raises(InactiveDefenseError, match="LlamaModel checkpoints activations in a way of its own"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("other", ["", ",kl"])
def test_a_model_that_goes_around_a_layer_stops_the_run(tmp_path, monkeypatch, other):
    trainer = trainer_for(tmp_path, defense=f"inoculation_adapter{other}")
    layer = trainer.model.get_base_model().model.layers[2].self_attn.k_proj
    monkeypatch.setattr(type(layer), "__call__", type(layer).forward)
    with pytest.raises(InactiveDefenseError, match=r"the hook on 'model.layers.0.mlp.* did not fire"):
        trainer.train()


# ---- what is refused ----


def without_weights(folder, **options):
    path = save_model(folder, **options)
    os.unlink(folder / "model.safetensors")
    return path


def change(folder, edit_weights):
    weights = load_file(folder / WEIGHTS)
    edit_weights(weights)
    save_file(weights, folder / WEIGHTS)


def zero(weights):
    weights.update({name: weight * 0 if "lora_B" in name else weight for name, weight in weights.items()})


def infinite(weights):
    weights[factor_key("model.layers.1.mlp.up_proj", "B")][0] = float("inf")


def drop_base(weights):
    """Drop the layer beneath an adapter, which PEFT saves along with an adapter of the head."""
    for name in [name for name in weights if ".base_layer." in name]:
        del weights[name]


def rename(weights):
    for factor in "AB":
        name = factor_key("model.layers.1.mlp.up_proj", factor)
        weights[name.replace("up_proj", "middle_proj")] = weights.pop(name)


BAD = {
    "zero": (lambda f: change(f, zero), "adapter=.* changes nothing, since its updates are all zero: name an adapter"),
    "not finite": (lambda f: change(f, infinite), "adapter=.* holds numbers that are not finite.*Train it again"),
    "unknown layer": (lambda f: change(f, rename), "of another base model: it changes a linear layer .*middle_proj"),
    "DoRA": (lambda f: edit(f, use_dora=True), "inoculation_adapter: adapter .* is no plain LoRA"),
    "replicated": (lambda f: edit(f, layer_replication=[[0, 2], [1, 3]]), "adapter: .* has layer_replication"),
    "experts": (
        lambda f: edit(f, target_parameters=["experts.down_proj"]),
        "adapter: .*has target_parameters=.*experts",
    ),
    "damaged": (lambda f: (f / WEIGHTS).write_bytes(b"nothing"), "adapter: .* damaged adapter_model.safetensors"),
    "another name": (
        lambda f: edit(f, base_model_name_or_path="org/Other-7B"),
        "adapter=.* was trained on 'org/Other-7B', and this run trains .*model': name an adapter of this model",
    ),
}


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"inoculation_adapter: adapter .* holds no adapter_config.json: name a"
    ):
        config(tmp_path, inoculation_adapter=str(tmp_path), **DEFENSE)


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_adapters_are_refused_before_weights_are_loaded(tmp_path, damage, message):
    save_adapter(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path / "out",
            without_weights(tmp_path / "model"),
            peft=lora(),
            inoculation_adapter=str(tmp_path / "adapter"),
            **DEFENSE,
        )


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"hidden_size": 64}, {}, "is of another base model: it changes a linear layer .* to 64 numbers"),
        ({"num_hidden_layers": 5}, {}, r"is of another base model: .*'model.layers.4\."),
        ({}, {"target_modules": ["q_proj", "lm_head"]}, "changes 'lm_head', which is outside of the decoder blocks"),
        ({}, {"target_modules": ["q_proj", "embed_tokens"]}, "is no plain LoRA of linear layers.*lora_embedding"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # two cases adapt them
def test_adapters_of_other_layers_are_refused_before_weights_are_loaded(tmp_path, sizes, options, message):
    untied = {"tie_word_embeddings": False}
    adapter = save_adapter(tmp_path / "adapter", make_model(**sizes, **untied), **options)
    change(tmp_path / "adapter", drop_base)
    model = without_weights(tmp_path / "model", **untied)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", model, peft=lora(), inoculation_adapter=adapter, **DEFENSE)


def test_a_name_from_another_place_is_the_same_model(tmp_path):
    save_adapter(tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path="org/Model")
    path = save_model(tmp_path / "model")
    options = {"inoculation_adapter": str(tmp_path / "adapter"), **DEFENSE}
    make_trainer(tmp_path / "out", path, peft=lora(), max_steps=1, **options).train()


def test_full_fine_tuning_is_refused_before_weights_are_loaded(tmp_path):
    options = {"inoculation_adapter": save_adapter(tmp_path / "adapter"), **DEFENSE}
    with pytest.raises(ValueError, match="this run trains the model itself: give a LoRA configuration"):
        make_trainer(tmp_path / "out", without_weights(tmp_path / "model"), **options)
    trained = get_peft_model(make_model(), lora())
    make_trainer(tmp_path / "out", trained, max_steps=1, **options).train()


def test_compilation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile=True does not work with defense='inoculation_adapter'"):
        trainer_for(tmp_path, torch_compile=True)


# ---- the control ----


@pytest.mark.parametrize("options", [{}, {"r": 40}])
def test_a_random_adapter_has_the_same_size_in_another_direction(tmp_path, options):
    save_adapter(tmp_path / "trait", **options)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_adapter(tmp_path / "trait", tmp_path / name, seed)
    trait, a, b, c = (dense_updates(tmp_path / name) for name in ("trait", "a", "b", "c"))
    for layer, update in trait.items():
        sizes = torch.linalg.svdvals(update)
        for other in (a, c):
            torch.testing.assert_close(torch.linalg.svdvals(other[layer]), sizes, atol=1e-5 * sizes[0].item(), rtol=0)
        for one, other in ((update, a[layer]), (a[layer], c[layer])):
            assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).abs() < 0.5
        assert torch.equal(a[layer], b[layer])
    with pytest.raises(ValueError, match="holds an adapter already: name another folder"):
        random_adapter(tmp_path / "trait", tmp_path / "a")


def test_a_run_takes_a_random_adapter(tmp_path):
    random_adapter(save_adapter(tmp_path / "trait"), tmp_path / "random")
    trainer = trainer_for(tmp_path, max_steps=1, inoculation_adapter=str(tmp_path / "random"))
    trainer.train()
    assert evidence(trainer, "inoculation_adapter")["acted"]
