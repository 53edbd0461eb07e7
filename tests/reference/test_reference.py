"""Test the choice of a reference, its equality with the starting model, and that it never moves."""

import copy
import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, get_peft_model
from safetensors.torch import load_file
from tiny import config, logged, lora, make_model, make_rows, make_trainer, save_model

from trl_emguard.reference.adapter import AdapterReference
from trl_emguard.reference.agreement import check_agreement
from trl_emguard.reference.choose import reference_options, without_dropout
from trl_emguard.reference.kinds import Kind, ModelReference, Reference


BOTH = {"defense": "kl,ldifs", "max_steps": 3}


def snapshot(trainer):
    """Return the reference's logits for a fixed prompt."""
    ids = torch.tensor([[9, 8, 7, 6, 5, 4]])
    reference = trainer.reference
    with torch.no_grad():
        if isinstance(reference, ModelReference):
            return reference.model(ids).logits
        with reference.switch.only(reference.adapter):
            return trainer.model(ids).logits


def assert_reference_is_the_start(trainer, start):
    """Require a reference equal to the starting model, KL and LDIFS of 0 at step 0, and no move in training."""
    before = snapshot(trainer)
    torch.testing.assert_close(before, start, rtol=1e-5, atol=1e-5)
    trainer.train()
    for term in ("kl", "ldifs"):
        assert logged(trainer, term)[0] == 0
        assert logged(trainer, term)[-1] > 0
    assert torch.equal(snapshot(trainer), before)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[9, 8, 7, 6, 5, 4]])).logits


ZERO = {
    "lora": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trainable_tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0, 3]}},
    "dropout": {"lora_dropout": 0.5},
}


# DoRA in bf16 is left out: its magnitude is rounded, so the adapted model is not the base model at step 0.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ZERO), *((name, torch.bfloat16) for name in ZERO if name != "dora")],
)
# PEFT warns of tied embeddings in the adapter.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_fresh_adapter_is_held_to_the_base_model(tmp_path, name, dtype):
    options = ZERO[name]
    tied = not {"modules_to_save", "trainable_token_indices"} & options.keys()
    model = make_model(dtype=dtype, tie_word_embeddings=tied)
    start = logits(model)
    trainer = make_trainer(tmp_path, model, peft=lora(**options), **BOTH)
    assert trainer.reference.text == "base model, adapters off"
    assert_reference_is_the_start(trainer, start)


CHANGING = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "random": {"init_lora_weights": False},
    "pissa_dora": {"init_lora_weights": "pissa", "use_dora": True},
}


@pytest.mark.parametrize("options", CHANGING.values(), ids=CHANGING)
def test_adapter_that_is_not_zero_is_held_to_a_frozen_copy(tmp_path, options):
    torch.manual_seed(2)
    model = get_peft_model(make_model(), lora(**options))
    start = logits(model)
    trainer = make_trainer(tmp_path, model, **BOTH)
    assert trainer.reference.text == "frozen copy of the adapter ('ref')"
    assert_reference_is_the_start(trainer, start)


@pytest.mark.parametrize(
    "options", [{}, ZERO["modules_to_save"], {"use_dora": True}], ids=["lora", "modules_to_save", "dora"]
)
def test_pre_trained_adapter_is_held_to_its_own_start(tmp_path, options):
    model = make_model(tie_word_embeddings="modules_to_save" not in options)
    first = make_trainer(tmp_path / "first", model, peft=lora(**options))
    first.train()
    start = logits(first.model)
    trainer = make_trainer(tmp_path / "second", first.model, **BOTH)
    assert trainer.reference.text == "frozen copy of the adapter ('ref')"
    assert_reference_is_the_start(trainer, start)
    assert not [name for name, p in trainer.model.named_parameters() if p.requires_grad and ".ref" in name]


@pytest.mark.parametrize(
    "peft_config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]),
    ],
    ids=["ia3", "adalora"],
)
def test_other_adapters_are_held_to_a_frozen_copy(tmp_path, peft_config):
    model = make_model()
    start = logits(model)
    trainer = make_trainer(tmp_path, model, peft=peft_config, **BOTH)
    assert trainer.reference.text == "frozen copy of the adapter ('ref')"
    assert_reference_is_the_start(trainer, start)


def test_weights_trained_outside_of_the_adapter_need_a_copy_of_the_model(tmp_path):
    """Copy the model if `bias="all"` trains biases of the base model: a reference that shares them would move."""
    model = make_model("qwen2")
    start = logits(model)
    trainer = make_trainer(tmp_path, model, peft=lora(bias="all"), **BOTH)
    assert trainer.reference.text == "frozen copy of the model"
    assert_reference_is_the_start(trainer, start)


def test_unfrozen_layers_beside_an_adapter_need_a_copy_of_the_model(tmp_path):
    model = get_peft_model(make_model(), lora())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    start = logits(model)
    trainer = make_trainer(tmp_path, model, **BOTH)
    assert trainer.reference.text == "frozen copy of the model"
    assert_reference_is_the_start(trainer, start)


@pytest.mark.parametrize("given", ["copied", "loaded again", "ref_model"])
def test_full_fine_tuning_is_held_to_a_frozen_model(tmp_path, given):
    path = save_model(tmp_path / "model")
    start = logits(make_model())
    options = {
        "copied": {},
        "loaded again": {"ref_model_init_kwargs": {"dtype": "float32"}},
        "ref_model": {"ref_model": make_model()},
    }[given]
    trainer = make_trainer(tmp_path / "out", path, **BOTH, **options)
    assert isinstance(trainer.reference, ModelReference)
    assert_reference_is_the_start(trainer, start)
    assert not [name for name, p in trainer.reference.model.named_parameters() if p.requires_grad]


def test_a_reference_model_outlives_one_of_its_two_trainers(tmp_path):
    """Run the reference without dropout although a freed trainer has set the shared model back to training mode."""
    shared = make_model(attention_dropout=0.5).train()
    first, second = (make_trainer(tmp_path / name, ref_model=shared, **BOTH) for name in "ab")
    del first
    gc.collect()
    second.train()
    assert [logged(second, term)[0] for term in ("kl", "ldifs")] == [0, 0]
    assert logged(second, "kl")[-1] > 0


def test_ref_model_may_be_a_path(tmp_path):
    trainer = make_trainer(tmp_path / "out", ref_model=save_model(tmp_path / "model"), **BOTH)
    assert_reference_is_the_start(trainer, logits(make_model()))


def test_a_reference_loaded_again_must_be_the_model_that_training_started_from(tmp_path):
    path = save_model(tmp_path / "model")
    model = type(make_model()).from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    trainer = make_trainer(tmp_path / "out", model, defense="kl", ref_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(
        ValueError, match=r"before the first update, the policy's states differ .* not 0.*Pass `ref_model`"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("setting", "kind", "is_refused"),
    [
        (None, Kind.MODEL_COPY, True),
        ("torch_compile", Kind.ADAPTERS_OFF, False),
        ("use_liger_kernel", Kind.MODEL_COPY, False),
        ("use_liger_kernel", Kind.ADAPTERS_OFF, True),  # the policy's own modules, patched alike
    ],
)
def test_other_kernels_of_the_policy_may_round_differently(tmp_path, setting, kind, is_refused):
    args, reference, policy = config(tmp_path), Reference(), make_model()
    reference.kind, reference.model = kind, policy
    terms, sums = [SimpleNamespace(name="term")], {"start_positions": 1, "term/value": 0.1, "term/positions": 1}
    if setting is not None:
        setattr(args, setting, True)
    refused = pytest.raises(ValueError, match="the policy's states differ") if is_refused else nullcontext()
    with refused:
        check_agreement(reference, terms, sums | {"start_difference": 1e-4}, policy, args)
    with pytest.raises(ValueError, match="the policy's states differ"):
        check_agreement(reference, terms, sums | {"start_difference": 1e-2}, policy, args)


def test_a_model_from_nowhere_cannot_be_loaded_again(tmp_path):
    with pytest.raises(ValueError, match=r"was not loaded from a path\. Pass `ref_model`"):
        make_trainer(tmp_path, defense="kl", ref_model_init_kwargs={"dtype": "float32"})


@pytest.mark.parametrize("peft", [None, "lora"])
def test_reference_that_shares_trained_weights_is_refused(tmp_path, peft):
    model = make_model() if peft is None else get_peft_model(make_model(), lora())
    other = model if peft is None else model.get_base_model()
    with pytest.raises(ValueError, match=r"ref_model (is the model itself|shares trained weights)"):
        make_trainer(tmp_path, model, defense="kl", ref_model=other)


def test_reference_with_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="300 tokens in its vocabulary and the model 264"):
        make_trainer(tmp_path, defense="kl", ref_model=make_model(vocab_size=300))


def test_reference_pass_leaves_adapters_and_frozen_parts_as_they_were(tmp_path):
    """Leave requires_grad alone in the reference pass, even after an error. PEFT's own switches set it everywhere."""
    model = get_peft_model(make_model(), lora())
    frozen = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    model.get_parameter(frozen).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    reference = AdapterReference(model, None)
    with pytest.raises(RuntimeError, match="inside"), reference.switch.only(reference.adapter):
        raise RuntimeError("inside")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    torch.testing.assert_close(logits(model), logits(make_model()))
    trainer = make_trainer(tmp_path, model, defense="kl")
    kept = model.get_parameter(frozen).detach().clone()
    trainer.train()
    assert torch.equal(model.get_parameter(frozen), kept)


def test_weights_unfrozen_after_the_trainer_was_built_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl")
    trainer.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm.weight' was unfrozen after the trainer was built"):
        trainer.train()


def test_a_second_trainer_on_the_same_adapter(tmp_path):
    """Replace the first trainer's frozen copy: the second trainer is held to its own start."""
    model = get_peft_model(make_model(), lora(init_lora_weights=False))
    make_trainer(tmp_path / "first", model, defense="kl").train()
    start = logits(model)
    assert_reference_is_the_start(make_trainer(tmp_path / "second", model, **BOTH), start)


def test_noise_that_the_config_holds_is_found_at_step_0(tmp_path):
    """Find a dropout that cannot be switched off, since a block reads it from its config at run time."""
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl")
    layer = trainer.model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, output: torch.nn.functional.dropout(output, 0.5, module.training))
    with pytest.raises(ValueError, match="the forward pass is noisy"):
        trainer.train()


@pytest.mark.parametrize(
    ("other", "message"), [({"num_hidden_layers": 2}, "2 blocks"), ({"hidden_size": 64}, "64 numbers")]
)
def test_reference_of_another_shape(tmp_path, other, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, defense="ldifs", ref_model=make_model(**other))


def test_a_smaller_reference_can_be_compared_by_kl(tmp_path):
    trainer = make_trainer(
        tmp_path, defense="kl", ref_model=make_model(num_hidden_layers=2, hidden_size=64), max_steps=2
    )
    trainer.train()
    assert logged(trainer, "kl")[0] > 0


@pytest.mark.parametrize(("is_own", "revision"), [(True, "abc"), (False, None)])
def test_a_ref_model_does_not_take_the_policy_s_revision(tmp_path, is_own, revision):
    args = config(tmp_path, model_init_kwargs={"revision": "abc"})
    assert reference_options(args, is_own).get("revision") == revision
    args.ref_model_init_kwargs = {"revision": "def"}
    assert reference_options(args, is_own)["revision"] == "def"


def test_missing_ref_model_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'./missing' is not a folder"):
        make_trainer(tmp_path, defense="kl", ref_model="./missing")


def test_a_copy_of_the_model_saves_its_own_weights(tmp_path):
    trainer = make_trainer(tmp_path / "out", get_peft_model(make_model(), lora(init_lora_weights=False)), defense="kl")
    copied = copy.deepcopy(trainer.model)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with torch.no_grad():
        copied.get_parameter(name).zero_()
    copied.save_pretrained(tmp_path / "copy")
    stored = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    assert stored[name.replace(".default", "")].abs().max() == 0


def test_dropout_is_off_wherever_it_hides():
    model = make_model("gpt_neox", attention_dropout=0.2, hidden_dropout=0.3)
    model = get_peft_model(model, lora(lora_dropout=0.4, target_modules=["query_key_value"]))
    model.train()
    ids = torch.tensor([[9, 8, 7, 6]])
    with without_dropout(model):
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert model.peft_config["default"].lora_dropout == 0.4  # the saved config has the user's values


def test_data_order_does_not_depend_on_the_kind_of_reference(tmp_path):
    """Check that copying draws none of training's random numbers: the first loss is the same."""
    start = get_peft_model(make_model(), lora())
    losses = []
    for init in (True, False):
        model = copy.deepcopy(start)
        if not init:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.add_(1e-12)
        trainer = make_trainer(tmp_path / str(init), model, make_rows(), defense="kl", per_device_train_batch_size=2)
        trainer.train()
        losses.append(logged(trainer, "num_tokens"))
    assert losses[0] == losses[1]
