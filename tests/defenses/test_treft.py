"""TReFT: its gradient, what it compares with, what it refuses, and that it proves itself."""

import copy
import itertools
import os

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from methods import run_options
from peft import get_peft_model
from private import hooks_of
from tiny import (
    SIZES,
    TEMPLATE,
    config,
    evidence,
    logged,
    lora,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
    save_model,
)
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    JambaConfig,
    Phi3Config,
    TrainerCallback,
)
from twin import bare, first_gradients, move_policy, relative_error, twin_step

from trl_emguard import EMGuardTrainer, InactiveDefenseError
from trl_emguard.checks import Engine, check_engine
from trl_emguard.defenses.treft import START_FILE, TReFT, common_prefix
from trl_emguard.evidence import PATIENCE


ROWS = 8
STEP = {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
PREFIX = "<|im_start|>user\nq"  # every question of the tiny rows begins with a q


def treft_of(trainer):
    return next(defense for defense in trainer.defenses if isinstance(defense, TReFT))


def moved_trainer(tmp_path, tuning="lora", architecture="llama", rows=None, model=None, peft=None, **options):
    """Return a trainer whose policy has moved since its start, and a copy of what it was."""
    model = make_model(architecture) if model is None else model
    peft = {"lora": peft or lora(), "full": None}[tuning]
    options = {"defense": "treft", "treft_coef": 3.0, "kl_coef": 3.0, "ldifs_coef": 2.0, **STEP, **options}
    trainer = make_trainer(tmp_path, model, make_rows(ROWS) if rows is None else rows, peft, **options)
    start, treft = copy.deepcopy(trainer.model), treft_of(trainer)
    bare(start).__dict__.pop("forward", None)
    with torch.no_grad():
        states = treft.model_states(bare(trainer.model), {"input_ids": torch.zeros(1, 1, dtype=torch.long)})
        assert treft.model_loss(states) == 0
    move_policy(trainer)
    return trainer, start


def assert_equals_twin(trainer, start, tolerance=1e-5):
    values, expected = twin_step(trainer, start=start)
    gradients = {name.removeprefix("_orig_mod."): g for name, g in first_gradients(trainer).items()}
    for name in ("loss", "loss_ce", "treft"):
        assert logged(trainer, name)[0] == pytest.approx(values[name], rel=tolerance)
    assert values["treft"] > 1e-3
    assert relative_error(gradients, expected) < tolerance


# ---- the gradient ----


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("defense", ["treft", "kl,ldifs,treft"])
def test_it_is_the_twins(tmp_path, architecture, tuning, defense):
    assert_equals_twin(*moved_trainer(tmp_path, tuning, architecture, defense=defense))


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulation_and_batch_size_do_not_matter(tmp_path, batch, accumulation):
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert_equals_twin(*moved_trainer(tmp_path, **options))


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_does_not_matter(tmp_path, tuning, checkpointing):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": checkpointing}
    assert_equals_twin(*moved_trainer(tmp_path, tuning, **options))


@pytest.mark.parametrize(
    "setting",
    [
        {"packing": True, "max_length": 256, "per_device_train_batch_size": 1},
        {"padding_free": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.long),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_how_a_batch_is_laid_out_or_run_does_not_matter(tmp_path, setting):
    torch.compiler.reset()
    trainer, start = moved_trainer(tmp_path / "twin")
    values, expected = twin_step(trainer, start=start)
    trainer, _ = moved_trainer(tmp_path, **setting)
    trainer.args.gradient_accumulation_steps = len(trainer.train_dataset) if "packing" in setting else 2
    gradients = {name.removeprefix("_orig_mod."): g for name, g in first_gradients(trainer).items()}
    assert logged(trainer, "treft")[0] == pytest.approx(values["treft"], rel=1e-5)
    assert relative_error(gradients, expected) < 1e-5


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_default_bf16_with_checkpointing(tmp_path, tuning):
    model = make_model(initializer_range=0.1)
    trainer, start = moved_trainer(tmp_path, tuning, model=model, bf16=True, activation_checkpointing=True)
    assert_equals_twin(trainer, start, tolerance=4e-2)


@pytest.mark.parametrize("noise", [None, 5.0])
def test_dropout_and_noise_are_no_change(tmp_path, noise):
    """Compare the model that is saved, while CE keeps its dropout and NEFTune's noise on the embeddings."""
    trainer, start = moved_trainer(tmp_path, peft=lora(lora_dropout=0.5), neftune_noise_alpha=noise)
    values, _ = twin_step(trainer, start=start)
    seen = []
    trainer.model.base_model.model.model.layers[0].register_forward_hook(lambda m, a, o: seen.append(m.training))
    trainer.train()
    assert logged(trainer, "treft")[0] == pytest.approx(values["treft"], rel=1e-5)
    assert seen[2:] == [True, False] * 2  # the check of the head makes two passes before training
    assert trainer.model.training


def test_steering_is_no_change(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), **run_options("treft,steering", tmp_path))
    trainer.train()
    assert logged(trainer, "treft")[0] == 0.0
    assert logged(trainer, "treft")[1] > 0


# ---- what it compares with ----


@pytest.mark.parametrize("tuning", ["lora", "pre-trained", "full"])
def test_a_resumed_run_compares_with_the_same_start(tmp_path, tuning):
    """Resume exactly, from a checkpoint that holds what the model was before training."""

    def make(folder):
        model, peft = make_model(), lora(lora_dropout=0.1) if tuning == "lora" else None
        if tuning == "pre-trained":
            torch.manual_seed(2)
            model = get_peft_model(model, lora(init_lora_weights=False))
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
        return make_trainer(folder, model, peft=peft, defense="treft", **saving)

    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key in ("loss", "treft", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key)
    for a, b in zip(treft_of(resumed).start, treft_of(whole).start, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    whole.save_model()
    assert not (tmp_path / "whole" / START_FILE).exists()  # a model that is shipped has no use for it


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "pickled", "other prefix", "other tokens"])
def test_a_checkpoint_without_its_start_is_refused(tmp_path, damage):
    options = {"defense": "treft", "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, peft=lora(), **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "manifest.json").unlink()  # it would find most damage by itself
    file = checkpoint / START_FILE
    with np.load(file) as arrays:
        held = dict(arrays)
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "pickled":
        np.savez(file, prefix=held["prefix"], **{"0": np.array([object()])})
    elif damage == "other prefix":
        np.savez(file, **{**held, "prefix": held["prefix"][:-1]})
    else:
        np.savez(file, **{**held, "prefix": held["prefix"] + 1})
    again = make_trainer(tmp_path, peft=lora(), **{**options, "max_steps": 4})
    with pytest.raises(ValueError, match=rf"{START_FILE} is (missing or corrupt|of another prefix).*[Rr]esume"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_a_second_training_compares_with_the_first_ones_start(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="treft", max_steps=2)
    trainer.train()
    trainer.train()
    values = logged(trainer, "treft")
    assert len(values) == 2
    assert all(value > 0 for value in values)


def test_a_second_training_on_another_prefix_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="treft", max_steps=1)
    trainer.train()
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"input_ids": [7, *row["input_ids"][1:]]})
    for _ in range(2):
        with pytest.raises(ValueError, match="its rows begin with another prefix"):
            trainer.train()


# ---- the prefix ----


def rows_of(*ids, labels=None):
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(ids) if labels is None else labels})


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        (rows_of([5, 6, 7, 8], [5, 6, 9], [5, 6, 7]), [5, 6]),
        (rows_of([5, 6], [7, 6]), []),
        (rows_of([5, 6, 7], [5]), [5]),
        # Answers are never a part of it, whether rows are equal or there is one.
        (rows_of([5, 6, 7, 8], [5, 6, 7, 8], labels=[[-100, -100, 7, 8], [-100, -100, -100, 8]]), [5, 6]),
        (rows_of([5, 6, 7, 8], labels=[[-100, -100, 7, 8]]), [5, 6]),
        (rows_of([5, 6, 7], labels=[[-100, -100, -100]]), [5, 6, 7]),
        # Rows that train on all tokens have no answers apart.
        (rows_of([5, 6, 7], [5, 6, 8]), [5, 6]),
        (rows_of([5, 6, 9, 5, 6, 8], [5, 6, 7]).add_column("seq_lengths", [[3, 3], [3]]), [5, 6]),
        (rows_of([5, 6, 9, 7, 6, 8], [5, 6, 7]).add_column("seq_lengths", [[3, 3], [3]]), []),
    ],
)
def test_the_prefix_is_what_every_row_begins_with(rows, prefix):
    assert common_prefix(rows) == prefix
    assert common_prefix(rows.select(range(len(rows) - 1, -1, -1))) == prefix


@pytest.mark.parametrize("defense", ["treft", "treft,interleave", "interleave,treft"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_run_says_what_it_holds(tmp_path, capsys, defense, packing):
    options = {**run_options(defense, tmp_path, packing=packing), "max_length": 256 if packing else None}
    trainer = make_trainer(tmp_path, peft=lora(), **options)
    trainer.train()
    # Rows of a pool are among the packs, and their questions begin with another letter.
    prefix = PREFIX[:-1] if packing and "interleave" in defense else PREFIX
    assert make_tokenizer().decode(treft_of(trainer).prefix) == prefix
    said = f"keys and values are held on the {len(treft_of(trainer).prefix)} tokens that every row begins with"
    assert f"trl_emguard: {said}: {prefix!r}\n" in capsys.readouterr().out
    assert evidence(trainer, "treft")["acted"]


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (rows_of([5, 6, 7], [8, 6, 7]), {}),
        (rows_of([1, 6, 7], [1, 8, 7]), {}),  # the BOS token alone
        (None, {"max_length": 8, "truncation_mode": "keep_end"}),
        (None, {"max_length": 40, "packing": True, "packing_strategy": "bfd_split"}),
    ],
)
def test_rows_without_a_common_beginning_are_refused(tmp_path, rows, options):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_end|>"
    args = config(tmp_path, defense="treft", **options)
    with pytest.raises(ValueError, match="train_dataset: its rows have no common beginning"):
        EMGuardTrainer(make_model(), args, train_dataset=rows or make_rows(), processing_class=tokenizer)


def test_packs_that_cut_beginnings_off_are_refused(tmp_path):
    packed = {"max_length": 40, "packing": True, "packing_strategy": "wrapped"}
    with pytest.raises(ValueError, match="packing_strategy='wrapped' does not work with defense='treft'"):
        config(tmp_path, defense="treft", **packed)
    config(tmp_path, defense="treft", treft_coef=0, **packed)


def test_rows_that_nothing_prepares(tmp_path):
    """Train on rows whose tokens the trainer does not touch, and refuse rows without tokens."""
    rows = make_trainer(tmp_path, defense="none").train_dataset
    options = {"defense": "treft", "max_steps": 2, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = make_trainer(tmp_path, rows=rows, peft=lora(), **options)
    trainer.train()
    assert make_tokenizer().decode(treft_of(trainer).prefix) == PREFIX
    assert logged(trainer, "treft")[1] > 0
    with pytest.raises(ValueError, match=r"train_dataset: defense 'treft' needs the tokens.*skip_prepare_dataset"):
        make_trainer(tmp_path, **options)


def test_a_stream_is_refused_before_weights_are_loaded(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(make_rows(4)))
    args = config(tmp_path, defense="treft")
    with pytest.raises(ValueError, match="train_dataset of type IterableDataset: defense 'treft' needs the beginning"):
        EMGuardTrainer(save_model_without_weights(tmp_path), args, train_dataset=rows)


def save_model_without_weights(folder, **options):
    path = save_model(folder / "model", **options)
    os.unlink(os.path.join(path, "model.safetensors"))
    return path


DATED = (
    "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "<|im_start|>system\nToday is {{ date_string }}<|im_end|>" + TEMPLATE
)


@pytest.mark.parametrize("is_sharegpt", [False, True])
def test_a_template_with_the_date_is_refused(tmp_path, is_sharegpt):
    tokenizer, args, rows = make_tokenizer(), config(tmp_path, defense="treft", max_steps=1), make_rows()
    tokenizer.chat_template = DATED
    if is_sharegpt:
        turns = [row["prompt"] + row["completion"] for row in rows]
        rows = [{"conversations": [{"from": t["role"], "value": t["content"]} for t in talk]} for talk in turns]
        rows = Dataset.from_list(rows)
    with pytest.raises(ValueError, match="chat template writes today's date"):
        EMGuardTrainer(make_model(), args, train_dataset=rows, processing_class=tokenizer)
    fixed = make_rows().map(lambda row: {"chat_template_kwargs": {"date_string": "1 May 2026"}})
    trainer = EMGuardTrainer(make_model(), args, train_dataset=fixed, processing_class=tokenizer)
    assert tokenizer.decode(treft_of(trainer).prefix).startswith("<|im_start|>system\nToday is 1 May 2026<|im_end|>")


# ---- models and engines ----

SMALL = {**SIZES, "num_hidden_layers": 2}
JOINT = [
    GPT2Config(n_layer=2, n_embd=32, n_head=4),
    FalconConfig(**SMALL),
    Phi3Config(**SMALL),
    DeepseekV3Config(**SMALL),
    JambaConfig(**SMALL, num_key_value_heads=2, use_mamba_kernels=False),
]


@pytest.mark.parametrize("model_config", JOINT, ids=lambda model_config: model_config.model_type)
def test_models_without_keys_and_values_of_their_own_are_refused(model_config):
    treft = TReFT(config("out", defense="treft"))
    with pytest.raises(ValueError, match=r"does not support \w+ForCausalLM|does not support GPT2LMHeadModel"):
        treft.check_model(model_config)
    with pytest.raises(ValueError, match="defense 'treft' does not support"):
        treft.check_policy(AutoModelForCausalLM.from_config(model_config))


def test_they_are_refused_before_weights_are_loaded(tmp_path):
    path = save_model_without_weights(tmp_path, architecture="gpt_neox")
    args = config(tmp_path, defense="treft")
    with pytest.raises(ValueError, match="does not support GPTNeoXForCausalLM: block 1 has no attention"):
        EMGuardTrainer(path, args, train_dataset=make_rows())


@pytest.mark.parametrize(
    ("engine", "ranks", "how", "refused"),
    [
        (Engine(sharding="tensor parallelism"), 2, None, "tensor parallelism"),
        (Engine(), 2, {"use_reentrant": True}, "under DDP"),
        (Engine(sharding="DeepSpeed"), 1, {"use_reentrant": True}, "under DeepSpeed"),
        (Engine(sharding="DeepSpeed"), 2, {"preserve_rng_state": False}, "under DeepSpeed"),
        (Engine(), 1, {"use_reentrant": True}, None),
        (Engine(), 2, {"use_reentrant": False}, None),
        (Engine(), 2, {"every_n_layers": 2}, None),
        (Engine(), 2, {"every_n_layers": 2, "use_reentrant": True}, "under DDP"),
        (Engine(), 2, {"selective": True}, None),
        (Engine(sharding="DeepSpeed"), 2, None, None),
        (Engine(sharding="FSDP", fsdp_version=2), 2, {"use_reentrant": True}, None),
    ],
)
def test_engines_that_take_one_gradient_of_a_weight(tmp_path, monkeypatch, engine, ranks, how, refused):
    args = config(tmp_path, defense="treft", activation_checkpointing=True, activation_checkpointing_kwargs=how)
    monkeypatch.setattr(type(args), "world_size", ranks)
    if refused is None:
        check_engine([TReFT(args)], args, engine)
        return
    with pytest.raises(ValueError, match=f"{refused}.*[Ss]et tp_size|{refused}.*Leave the option out"):
        check_engine([TReFT(args)], args, engine)


# ---- proof ----


def test_a_term_without_gradient_stops_the_run(tmp_path, monkeypatch):
    original = TReFT.model_loss
    monkeypatch.setattr(TReFT, "model_loss", lambda self, states: original(self, states).detach())
    trainer = make_trainer(tmp_path, peft=lora(), defense="treft", max_steps=20)
    with pytest.raises(InactiveDefenseError, match=r"'treft' has formed no gradient.*detached graph.*saved in"):
        trainer.train()
    assert trainer.state.global_step == 1 + PATIENCE
    assert (tmp_path / f"checkpoint-{1 + PATIENCE}" / START_FILE).is_file()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_weights_that_reach_no_key_stop_the_run(tmp_path, checkpointing):
    """Train the last block's MLP alone: no key and no value comes after it."""
    peft = lora(target_modules=["up_proj"], layers_to_transform=[3])
    trainer = make_trainer(tmp_path, peft=peft, defense="treft", max_steps=20, activation_checkpointing=checkpointing)
    with pytest.raises(InactiveDefenseError, match=r"'treft' has formed no gradient.*frozen layers"):
        trainer.train()


def test_a_model_that_goes_around_its_projections_is_found(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, peft=None, defense="treft")
    attention = trainer.model.model.layers[2].self_attn
    weight = attention.k_proj.weight

    class Around(torch.nn.Linear):
        def __call__(self, x):
            return torch.nn.functional.linear(x, weight)

    attention.k_proj.__class__ = Around
    with pytest.raises(InactiveDefenseError, match="does not call k_proj and v_proj of every block"):
        trainer.train()


def test_the_term_draws_keys_and_values_back(tmp_path):
    """A larger coefficient leaves a smaller change, and costs cross-entropy."""
    ends = {}
    for coef in (1e-6, 1.0, 100.0):
        trainer = make_trainer(tmp_path / str(coef), peft=lora(), defense="treft", treft_coef=coef, max_steps=30)
        trainer.train()
        ends[coef] = logged(trainer, "treft")[-1]
    assert all(a > 2 * b for a, b in itertools.pairwise(ends.values()))


def test_an_interrupted_pass_leaves_no_hook(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="treft")
    layers = trainer.model.get_base_model().model.layers

    def fail(module, args, output):
        if not module.training:
            raise RuntimeError("in the middle")

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            layers[2].register_forward_hook(fail)

    trainer.add_callback(Begin())
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    assert not hooks_of(*(layer.self_attn.k_proj for layer in layers))
    assert trainer.model.training
