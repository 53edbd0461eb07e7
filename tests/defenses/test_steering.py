"""Test steering: the added vector, its place, and its absence everywhere else."""

import json
import re
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig, get_peft_model
from private import hooks_of
from tiny import FailWithin, config, logged, lora, make_model, make_rows, make_tokenizer, make_trainer, save_model
from transformers import TrainerCallback
from trl import SFTTrainer

from trl_emguard import InactiveDefenseError, SteeringTrainer
from trl_emguard.defenses import Steering
from trl_emguard.models.blocks import decoder_blocks, record_blocks
from trl_emguard.models.identity import weight_checksums
from trl_emguard.persona import PersonaVector, load_vector, random_like


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 1, 1]])
INPUTS = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    "labels": torch.tensor([[-100, -100, 7, 8, 9, 10], [-100, 12, 13, 14, -100, -100]]),
}
PREDICTS = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def file(vectors, tmp_path_factory):
    path = tmp_path_factory.mktemp("vector") / "v.safetensors"
    PersonaVector(
        vectors, metadata={"trait": "odd", "suggested_layer": 2, "weights": weight_checksums(make_model())}
    ).save(path)
    return str(path)


def make_steering(file, model, **options):
    steering = Steering(config("unused", defense="steering", steering_vector=file, **options))
    steering.check_model(model.config)
    return steering


def by_hand(model, change, keep=None):
    """Return the final logits, computed block by block with `change(layer, states)` after each."""
    body = model.model
    states = body.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    rotary = body.rotary_emb(states, positions)
    causal = torch.full((6, 6), float("-inf")).triu(1)[None, None].to(states.dtype)
    mask = causal + (1 - INPUTS["attention_mask"])[:, None, None].to(states.dtype) * -1e30
    for layer, block in enumerate(body.layers, 1):
        states = block(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        states = change(layer, states)
    return model.lm_head(body.norm(states))


@pytest.mark.parametrize("tokens", ["all", "response"])
@pytest.mark.parametrize("mode", ["add", "ablate"])
@pytest.mark.parametrize(
    ("layers", "chosen"), [(None, [2]), (3, [3]), ("1,4", [1, 4]), ([4, 1], [1, 4]), ("all", [1, 2, 3, 4])]
)
def test_a_steered_forward_equals_the_hand_made_one(file, vectors, layers, chosen, mode, tokens):
    model = make_model().eval()
    steering = make_steering(
        file, model, steering_layers=layers, steering_coef=2.0, steering_mode=mode, steering_tokens=tokens
    )
    where = (PREDICTS if tokens == "response" else torch.ones_like(PREDICTS))[..., None]

    def change(layer, states):
        if layer not in chosen:
            return states
        v = vectors[layer]
        if mode == "add":
            return states + where * 2.0 * (v - vectors[layer - 1] if layers == "all" else v)
        return states - where * torch.einsum("bth,h,k->btk", states, v, v) / v.dot(v)

    with torch.no_grad():
        with steering.training(model), steering.policy_pass(model, INPUTS):
            ours = model(**INPUTS).logits
        theirs = by_hand(model, change)
        plain = model(**INPUTS).logits
    real = INPUTS["attention_mask"].bool()
    assert (ours - theirs)[real].abs().max() < 1e-6 * theirs.abs().max()
    assert (ours - plain)[real].abs().max() > 1e-2
    assert torch.equal(plain, make_model().eval()(**INPUTS).logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_layer_l_is_what_block_l_hands_on(file, vectors, architecture):
    """Compare with transformers' `hidden_states[l]` for l < L. The recorded output of block l itself is unchanged."""
    model = make_model(architecture).eval()
    steering = make_steering(file, model, steering_layers="2", steering_coef=1.0)
    entering = []
    with torch.no_grad():
        plain = model(IDS, output_hidden_states=True).hidden_states
        with (
            steering.training(model),
            record_blocks(model, range(5), lambda x: x) as raw,
            steering.policy_pass(model, INPUTS),
        ):
            handle = decoder_blocks(model)[2].register_forward_pre_hook(
                lambda m, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            model(IDS)
            handle.remove()
    for layer in (0, 1, 2):
        assert torch.equal(raw[layer], plain[layer])
    torch.testing.assert_close(entering[0], plain[2] + vectors[2])
    assert not torch.allclose(raw[3], plain[3])


@contextmanager
def steered_block(steering, model):
    """Yield block 2, steered as in the policy's pass. Its own forward is replaced by one that returns its input."""
    block = decoder_blocks(model)[1]
    block.forward = lambda states: states
    with steering.training(model), steering.policy_pass(model, INPUTS):
        yield block


def test_a_block_that_returns_a_tuple(file):
    model = make_model()
    steering = make_steering(file, model, steering_layers="2")
    states = torch.zeros(1, 3, 32)
    with steered_block(steering, model) as block:
        assert block(states).any()
        assert torch.equal(block((states, "cache"))[0], block(states))
        assert block((states, "cache"))[1] == "cache"


# ---- in training ----


def train_by_hand(tmp_path, change, peft, **options):
    """Compare with SFTTrainer on a model with a permanent hook of the test's own."""
    model = make_model()
    model.model.layers[1].register_forward_hook(lambda m, args, out: out + change(out))
    trainer = SFTTrainer(
        model,
        config(tmp_path, **options),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=peft,
    )
    trainer.train()
    return trainer


CHECKPOINTING = {
    "none": {},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


BY_HAND = [
    (tuning, mode, checkpointing)
    for tuning, mode in (("lora", "add"), ("full", "add"), ("lora", "ablate"))
    for checkpointing in CHECKPOINTING
]
SOON = [("lora", "add", "non-reentrant"), ("full", "add", "none"), ("lora", "ablate", "none")]


@pytest.mark.parametrize(
    ("tuning", "mode", "checkpointing"),
    [pytest.param(*run, marks=[] if run in SOON else pytest.mark.long) for run in BY_HAND],
)
def test_trains_as_with_a_hook_made_by_hand(tmp_path, file, vectors, tuning, mode, checkpointing):
    options = {"gradient_accumulation_steps": 2, **CHECKPOINTING[checkpointing]}
    steering = {"defense": "steering", "steering_vector": file, "steering_coef": 1.5, "steering_mode": mode}
    peft = lora(lora_dropout=0.3) if tuning == "lora" else None
    ours = make_trainer(tmp_path / "ours", peft=peft, **steering, **options)
    ours.train()
    peft = lora(lora_dropout=0.3) if tuning == "lora" else None
    unit = vectors[2] / vectors[2].norm()
    by_hand = {"add": lambda x: 1.5 * vectors[2], "ablate": lambda x: -(x * unit).sum(-1, keepdim=True) * unit}
    theirs = train_by_hand(tmp_path / "theirs", by_hand[mode], peft, **options)
    plain = make_trainer(tmp_path / "plain", peft=lora() if peft else None, **options)
    plain.train()
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert logged(ours, "grad_norm") == logged(theirs, "grad_norm")
    assert logged(ours, "loss") != logged(plain, "loss")
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.long
@pytest.mark.parametrize("defense", ["steering", "steering,kl", "steering,ldifs,kl"])
def test_compiled_equals_eager(tmp_path, file, defense):
    options = {"defense": defense, "steering_vector": file, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        more = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = make_trainer(tmp_path / str(compiled), peft=lora(), eval_dataset=make_rows(4), **options, **more)
        trainer.train()
        runs.append(trainer)
    for key in ("loss", "eval_loss"):
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-4)


def test_is_off_outside_of_training_steps(tmp_path, file):
    """Check evaluation during and after training, generation, and the saved model."""
    trainer = make_trainer(
        tmp_path,
        peft=lora(),
        defense="steering",
        steering_vector=file,
        steering_coef=50.0,
        eval_dataset=make_rows(6),
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
    )
    trainer.train()
    saved = PeftModel.from_pretrained(make_model(), tmp_path / "checkpoint-5").eval()
    with torch.no_grad():
        assert torch.equal(saved(**INPUTS).logits, trainer.model.eval()(**INPUTS).logits)
    stock = SFTTrainer(saved, config(tmp_path / "stock"), train_dataset=make_rows(), processing_class=make_tokenizer())
    plain = stock.evaluate(make_rows(6))["eval_loss"]
    assert logged(trainer, "eval_loss") == pytest.approx([plain], rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)
    prompt = torch.tensor([[5, 6, 7]])
    how = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(trainer.model.generate(prompt, **how), saved.generate(prompt, **how))


@pytest.mark.parametrize("defense", ["steering", "steering,kl,ldifs"])
def test_nothing_is_left_behind(tmp_path, file, defense):
    trainer = make_trainer(tmp_path, peft=lora(), defense=defense, steering_vector=file)
    assert hooks_of(*trainer.model.modules()) == []
    trainer.train()
    assert hooks_of(*trainer.model.modules()) == []
    state = lambda: (trainer.defenses[0]._on, len(hooks_of(*trainer.model.modules())))  # noqa: E731
    failure = FailWithin(state)
    trainer.add_callback(failure)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    was_on, hooks = failure.seen
    assert was_on
    assert hooks > 1  # steering's own, beside the one that fails
    assert state() == (False, 0)
    with torch.no_grad():
        fresh = trainer.model.eval()(**INPUTS).logits
        assert torch.isfinite(fresh).all()


@pytest.mark.parametrize("other", ["", ",kl"])
def test_a_hook_that_does_not_fire_stops_the_run_in_the_first_step(tmp_path, file, other, monkeypatch):
    """Stop a model whose forward avoids its blocks: the hooks sit on blocks that nobody calls."""
    monkeypatch.setattr("trl_emguard.defenses.steering.decoder_blocks", lambda model: decoder_blocks(make_model()))
    trainer = make_trainer(tmp_path, peft=lora(), defense=f"steering{other}", steering_vector=file)
    with pytest.raises(InactiveDefenseError, match="the hook on block 2 did not fire"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_reference_is_never_steered(tmp_path, file, vectors):
    """Check that KL at step 0 is from steered policy to plain model, and that LDIFS compares the blocks' outputs."""
    trainer = make_trainer(
        tmp_path,
        peft=lora(),
        rows=make_rows(4),
        defense="steering,kl,ldifs",
        steering_vector=file,
        steering_coef=1.0,
        ldifs_layers="2,3",
        max_steps=1,
    )
    rows = [(torch.tensor(r["input_ids"]), torch.tensor(r["labels"])) for r in trainer.train_dataset]
    trainer.train()
    model = make_model(dtype=torch.float64).eval()
    kl = distance = tokens = 0
    for ids, labels in rows:
        kept = labels[1:] != -100
        with torch.no_grad(), record_blocks(model, [2, 3], lambda x: x[0, :-1]) as plain:
            log_q = model(ids[None]).logits[0, :-1].log_softmax(-1)
        handle = model.model.layers[1].register_forward_hook(lambda m, args, out: out + vectors[2].double())
        with torch.no_grad(), record_blocks(model, [2, 3], lambda x: x[0, :-1]) as steered:
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        handle.remove()
        kl += (log_p.exp() * (log_p - log_q)).sum(-1)[kept].sum().item()
        assert torch.equal(steered[2], plain[2])
        a, b = (torch.nn.functional.normalize(x[3][kept], dim=-1) for x in (steered, plain))
        distance += (a - b).square().sum().item() / 2
        tokens += int(kept.sum())
    assert logged(trainer, "kl")[0] == pytest.approx(kl / tokens, rel=1e-4)
    assert logged(trainer, "ldifs")[0] == pytest.approx(distance / tokens, rel=1e-4)
    assert kl > 0.01


def test_a_run_records_its_steering(tmp_path, file, capsys):
    trainer = make_trainer(tmp_path, peft=lora(), defense="steering", steering_vector=file, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "defense 'steering' acts (steering_vector=odd (extracted, " in capsys.readouterr().out
    record = json.loads((tmp_path / "defense.json").read_text())
    change = record["evidence"]["steering"].pop("change")
    assert change.keys() == {"2"}
    assert record["evidence"] == {"steering": {"layers": [2], "acted": True}}
    assert record["defenses"]["steering"]["steering_layers"] == [2]


def test_resuming_with_another_vector_is_refused(tmp_path, file, vectors):
    options = {"peft": lora(), "defense": "steering", "save_strategy": "steps", "save_steps": 2}
    full = make_trainer(tmp_path / "a", steering_vector=file, max_steps=4, **options)
    full.train()
    again = make_trainer(tmp_path / "b", steering_vector=file, max_steps=4, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert logged(again) == logged(full)
    PersonaVector(2 * vectors, metadata=load_vector(file).metadata).save(tmp_path / "other.safetensors")
    other = make_trainer(tmp_path / "c", steering_vector=str(tmp_path / "other.safetensors"), max_steps=4, **options)
    with pytest.raises(ValueError, match="Resume with the same defense"):
        other.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))


# ---- refusals ----


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the argument was refused")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", loaded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steering_vector": None}, "steering_vector is missing"),
        ({"steering_vector": "smollm2-135m-instruct-evli"}, "Did you mean 'smollm2-135m-instruct-evil'?"),
        ({"steering_coef": -1.0}, "steering_coef=-1.0 is not a coefficient"),
        ({"steering_coef": float("nan")}, "steering_coef=nan is not a coefficient"),
        ({"steering_mode": "subtract"}, "steering_mode='subtract' is not known: give one of 'add', 'ablate'."),
        ({"steering_tokens": "prompt"}, "steering_tokens='prompt' is not known"),
        ({"steering_layers": 0}, "steering_layers=0: layer 0 is out of range: the blocks count from 1 to L."),
        (
            {"steering_layers": "every:5"},
            "steering_layers='every:5' is not a choice of layers: give 20, '20,24' or 'all'.",
        ),
        ({"steering_layers": "2,2"}, "steering_layers='2,2' names a layer twice"),
        ({"steering_layers": []}, "steering_layers=[] is not a choice of layers"),
    ],
)
def test_options(tmp_path, file, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        config(tmp_path, **{"defense": "steering", "steering_vector": file, **options})


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda v: v,
            {"steering_layers": 5},
            "steering_layers=[5]: layer 5 is out of range: the blocks count from 1 to 4.",
        ),
        (lambda v: v[:, :16], {}, "of a model with 4 blocks of width 16, and this one has 4 of width 32"),
        (lambda v: v[:4], {}, "of a model with 3 blocks of width 32, and this one has 4 of width 32"),
        (lambda v: v * torch.tensor([1, 1, 0, 1, 1])[:, None], {}, "the persona vector is zero at layer 2"),
        (lambda v: v[0].expand(5, -1).clone(), {"steering_layers": "all"}, "the persona vector is zero at layer 1"),
    ],
)
def test_vectors_that_do_not_fit_the_model(tmp_path, vectors, change, options, message):
    path = tmp_path / "v.safetensors"
    PersonaVector(change(vectors), metadata={"suggested_layer": 2}).save(path)
    model = save_model(tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(tmp_path / "out", model, defense="steering", steering_vector=str(path), **options)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("layers", "refused"), [("3", False), ("4", True), ("all", True), (None, True)])
def test_a_foreign_vector(tmp_path, vectors, layers, refused):
    """Refuse a `.pt` whose last entry is after the final norm, and which suggests no layer."""
    torch.save(vectors, tmp_path / "evil_response_avg_diff.pt")
    options = {
        "defense": "steering",
        "steering_vector": str(tmp_path / "evil_response_avg_diff.pt"),
        "steering_layers": layers,
    }
    if not refused:
        make_trainer(tmp_path / "out", make_model(), max_steps=1, **options).train()
        return
    message = "does not suggest a layer" if layers is None else "taken after the final norm: it is no block's output"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", save_model(tmp_path / "model"), **options)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("layers", ["4", "all"])
def test_the_control_of_a_foreign_vector_is_foreign(tmp_path, vectors, layers):
    torch.save(vectors, tmp_path / "v.pt")
    random_like(load_vector(tmp_path / "v.pt")).save(tmp_path / "control.safetensors")
    options = {
        "defense": "steering",
        "steering_vector": str(tmp_path / "control.safetensors"),
        "steering_layers": layers,
    }
    with pytest.raises(ValueError, match="taken after the final norm: it is no block's output"):
        make_trainer(tmp_path / "out", save_model(tmp_path / "model"), **options)


@pytest.mark.parametrize("tuning", ["lora", "dora", "pissa", "modules_to_save", "full"])
# PEFT warns of a tied head in the adapter.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_a_vector_of_another_model_is_refused(tmp_path, file, tuning):
    peft = {
        "lora": lora,
        "dora": lambda: lora(use_dora=True),
        "pissa": lambda: lora(init_lora_weights="pissa"),
        "modules_to_save": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        "full": lambda: None,
    }[tuning]
    make_trainer(tmp_path, peft=peft(), defense="steering", steering_vector=file)  # weights of this model
    other = make_model()
    with torch.no_grad():
        other.model.norm.weight[0] += 0.1
    with pytest.raises(
        ValueError, match=r"made with another model \(unnamed\): the weight 'model.norm.weight' differs"
    ):
        make_trainer(tmp_path, other, peft=peft(), defense="steering", steering_vector=file)


def test_a_policy_with_an_adapter_is_still_its_base_model(tmp_path, file):
    model = get_peft_model(make_model(), lora(init_lora_weights=False))
    make_trainer(tmp_path, model, defense="steering", steering_vector=file, max_steps=1).train()


def test_a_named_subclass_steers(tmp_path, file):
    trainer = SteeringTrainer(
        make_model(),
        config(tmp_path, steering_vector=file),
        train_dataset=make_rows(4),
        processing_class=make_tokenizer(),
    )
    assert [defense.name for defense in trainer.defenses] == ["steering"]


def test_response_tokens_in_padding_free_batches(tmp_path, file):
    """Steer padding-free rows, several to a sequence, at the label positions, as padded rows."""
    rows = Dataset.from_list(make_rows(4).to_list())
    losses = []
    for more in ({}, {"padding_free": True}):
        trainer = make_trainer(
            tmp_path / str(len(losses)),
            rows=rows,
            peft=lora(),
            defense="steering",
            steering_vector=file,
            steering_tokens="response",
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **more,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        if more:
            assert (batch["position_ids"] == 0).sum() == 2
        trainer.train()
        losses.append(logged(trainer)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ---- effect on the states ----


@pytest.mark.parametrize("tokens", ["all", "response"])
@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_the_change_is_measured(file, vectors, mode, tokens):
    """Return the mean of ‖change‖/‖state‖ over steered positions, in the first pass that has such positions."""
    model = make_model().eval()
    steering = make_steering(
        file, model, steering_layers="1,3", steering_coef=2.0, steering_mode=mode, steering_tokens=tokens
    )
    where = PREDICTS.bool() if tokens == "response" else torch.ones_like(PREDICTS).bool()
    expected = {}
    with torch.no_grad(), steering.training(model):
        assert steering.evidence() == {"layers": [1, 3], "change": {}, "acted": False}
        if tokens == "response":
            nothing = {**INPUTS, "labels": torch.full_like(IDS, -100)}
            with steering.policy_pass(model, nothing):
                model(IDS)
            assert not steering.evidence()["acted"]
        with record_blocks(model, [1, 3], lambda x: x[where]) as states, steering.policy_pass(model, INPUTS):
            model(IDS, attention_mask=INPUTS["attention_mask"])
        for layer in (1, 3):
            v = vectors[layer]
            change = 2.0 * v if mode == "add" else torch.outer(states[layer] @ v / v.dot(v), v)
            expected[str(layer)] = (change.norm(dim=-1) / states[layer].norm(dim=-1)).mean().item()
        found = steering.evidence()
        with steering.policy_pass(model, INPUTS):
            model(IDS + 1)
    assert found == {"layers": [1, 3], "change": pytest.approx(expected, rel=1e-4), "acted": True}
    assert steering.evidence() == found


@pytest.mark.parametrize("other", ["", ",kl"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("coef", [1e-12, 1.0])
def test_states_that_do_not_change_stop_the_run(tmp_path, file, other, compiled, coef):
    torch.compiler.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    options |= {"defense": f"steering{other}", "steering_vector": file, "steering_coef": coef, "max_steps": 1}
    trainer = make_trainer(tmp_path, peft=lora(), rows=make_rows(4), **options)
    if coef == 1.0:
        trainer.train()
        assert trainer.defenses[0].evidence()["change"]["2"] > 0.1
        return
    with pytest.raises(
        InactiveDefenseError, match="the output of block 2 is the same with and without the vector, to the bit"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_ablation_in_bf16_leaves_no_more_than_rounding(file, vectors):
    model = make_model()
    steering = make_steering(file, model, steering_mode="ablate")
    unit = vectors[2].double() / vectors[2].double().norm()
    states = (torch.randn(1, 500, 32, generator=torch.Generator().manual_seed(0)) + 30 * unit).bfloat16()
    with steered_block(steering, model) as block:
        steered = block(states)
    rounding = (states.double() - (states.double() @ unit)[..., None] * unit).bfloat16().double() @ unit
    assert steered.dtype == torch.bfloat16
    assert (steered.double() @ unit).abs().mean() < 1.1 * rounding.abs().mean()


class Look(TrainerCallback):
    """Callback that calls the model during training."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            self.train_logits = model(IDS).logits
            self.logits = model.eval()(IDS).logits
            self.generated = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
        model.train()


@pytest.mark.parametrize("other", ["", ",kl"])
def test_a_callback_sees_the_plain_model(tmp_path, file, other):
    trainer = make_trainer(
        tmp_path, peft=lora(), defense=f"steering{other}", steering_vector=file, steering_coef=50.0, max_steps=1
    )
    look = Look()
    trainer.add_callback(look)
    trainer.train()
    plain = make_model().eval()  # a fresh adapter changes nothing
    with torch.no_grad():
        for logits in (look.logits, look.train_logits):
            torch.testing.assert_close(logits, plain(IDS).logits)
    assert torch.equal(look.generated, plain.generate(IDS[:1], max_new_tokens=4, do_sample=False))


def test_response_tokens_with_an_adapter_that_adds_tokens(tmp_path, file):
    peft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(tmp_path, peft=peft, defense="steering", steering_vector=file, steering_tokens="response")
    trainer.train()
    assert trainer.defenses[0].evidence()["acted"]  # PEFT lengthens labels and rows alike
    make_trainer(tmp_path, peft=peft, defense="steering", steering_vector=file, max_steps=1).train()
