"""Test EMGuardTrainer as a drop-in: equality with SFTTrainer, and arguments that a user may pass."""

import gc
import inspect
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset
from methods import EVERYTHING, KINDS, merged, run_options
from peft import AdaLoraConfig, get_peft_model
from tiny import (
    config,
    evidence,
    logged,
    lora,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
    record,
    save_model,
)
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from trl_emguard import EMGuardConfig, EMGuardTrainer, KLTrainer, LDIFSTrainer, ReferenceDefense, register
from trl_emguard.defenses import DEFENSES, Defense


# No option switches inoculation off.
OFF = [name for name in (*KINDS, "kl,ldifs") if name == "none" or merged(name, "off")]


@dataclass
class CpuConfig(EMGuardConfig):
    """Config with the defaults that runs without an accelerator, which the stock defaults refuse."""

    use_cpu: bool = True


def plain_config(output_dir, **options):
    guard = config(output_dir, **options)
    names = [f for f in SFTConfig.__dataclass_fields__ if SFTConfig.__dataclass_fields__[f].init]
    return SFTConfig(**{name: getattr(guard, name) for name in names})


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("checkpointing", "tuning", "off"),
    [
        pytest.param(*run, marks=[] if run[:2] in ((True, "lora"), (False, "full")) else pytest.mark.long)
        for run in product((True, False), ("lora", "full"), OFF)
    ],
)
def test_off_is_sft_bit_for_bit(tmp_path, off, tuning, checkpointing):
    """Compare losses and weights after five steps, with LoRA dropout on, so that the random state is compared as
    well."""
    options = {"activation_checkpointing": checkpointing, "gradient_accumulation_steps": 2, "bf16": True}
    peft = lora(lora_dropout=0.3) if tuning == "lora" else None
    ours = make_trainer(tmp_path / "ours", peft=peft, **options, defense=off, **merged(off, "off"))
    ours.train()
    random_state = torch.get_rng_state()
    stock = SFTTrainer(
        make_model(),
        plain_config(tmp_path / "stock", **options),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=lora(lora_dropout=0.3) if tuning == "lora" else None,
    )
    stock.train()
    assert len(logged(stock)) == 5
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, key) == logged(stock, key)
    assert all(torch.equal(a, b) for a, b in zip(weights(ours).values(), weights(stock).values(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert record(ours)["reference"] is None


def test_a_tiny_coefficient_trains_as_sft_does(tmp_path):
    """Compare the package's head and sums with stock CE, under a vanishing coefficient: equal to rounding."""
    runs = {}
    for defense in ("none", "kl,ldifs"):
        trainer = make_trainer(
            tmp_path / defense,
            peft=lora(),
            defense=defense,
            kl_coef=1e-12,
            ldifs_coef=1e-12,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        runs[defense] = trainer
    for key in ("loss", "grad_norm", "num_tokens"):
        assert logged(runs["kl,ldifs"], key) == pytest.approx(logged(runs["none"], key), rel=1e-4)
    assert logged(runs["kl,ldifs"], "loss_ce") == pytest.approx(logged(runs["none"]), rel=1e-4)


def test_positional_signature_and_defaults_are_sft_trainers():
    ours, stock = (list(inspect.signature(c.__init__).parameters.values()) for c in (EMGuardTrainer, SFTTrainer))
    assert [(p.name, p.kind, p.default) for p in ours[: len(stock)]] == [(p.name, p.kind, p.default) for p in stock]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(stock) :])


# SFTConfig's own default sets the option by its old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_config_defaults_are_sft_configs(tmp_path):
    ours, stock = (cls(str(tmp_path), use_cpu=True) for cls in (EMGuardConfig, SFTConfig))
    for name, f in SFTConfig.__dataclass_fields__.items():
        if f.init and name not in ("logging_dir", "run_name"):
            assert str(getattr(ours, name)) == str(getattr(stock, name)), name
    assert ours.defense == "none"


@pytest.mark.parametrize("kind", ["none", "training_arguments", "sft_config"])
def test_args_of_every_kind(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_emguard.trainer.EMGuardConfig", CpuConfig)
    base = {"output_dir": "out", "max_steps": 1, "use_cpu": True, "report_to": [], "learning_rate": 3e-3}
    args = {
        "none": None,
        "training_arguments": TrainingArguments(**base),
        "sft_config": SFTConfig(
            **base,
            model_init_kwargs={"dtype": torch.bfloat16},
            max_length=99,
            eos_token="<|im_end|>",
            activation_checkpointing=True,
        ),
    }[kind]
    trainer = EMGuardTrainer(make_model(), args, train_dataset=make_rows(4), processing_class=make_tokenizer())
    assert isinstance(trainer.args, EMGuardConfig)
    assert trainer.args.defense == "none"
    if kind == "none":
        assert trainer.args.output_dir.endswith("-SFT")
    else:
        assert trainer.args.learning_rate == 3e-3
    if kind == "sft_config":
        assert trainer.args.max_length == 99
        assert trainer.args.model_init_kwargs == {"dtype": torch.bfloat16}


@pytest.mark.parametrize("kind", ["path", "model", "peft_model"])
def test_models_of_every_kind(tmp_path, kind):
    model = {
        "path": lambda: save_model(tmp_path / "model"),
        "model": make_model,
        "peft_model": lambda: get_peft_model(make_model(), lora()),
    }[kind]()
    trainer = make_trainer(
        tmp_path / "out", model, defense="kl", max_steps=2, peft=None if kind == "peft_model" else lora()
    )
    trainer.train()
    assert logged(trainer, "kl")[0] == 0
    assert logged(trainer, "kl")[1] > 0


FORMATS = {
    "text": [{"text": "abc " * (i + 1)} for i in range(8)],
    "messages": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * (i + 1)}]}
        for i in range(8)
    ],
    "prompt_completion": [{"prompt": "q", "completion": "a" * (i + 1)} for i in range(8)],
    "conversational": make_rows(8).to_list(),
    "tokenised": [{"input_ids": [5, 6, 7, 8][: i % 3 + 2]} for i in range(8)],
    "tokenised_with_text": [{"input_ids": [5, 6, 7], "prompt": [{"role": "user", "content": "q"}]} for _ in range(8)],
}


@pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
def test_every_dataset_format(tmp_path, rows):
    trainer = make_trainer(tmp_path, rows=Dataset.from_list(rows), peft=lora(), defense="kl,ldifs", max_steps=2)
    trainer.train()
    assert logged(trainer, "kl")[1] > 0
    assert logged(trainer, "ldifs")[1] > 0


def test_streaming_data(tmp_path):
    rows = make_rows(16).to_iterable_dataset()
    trainer = make_trainer(tmp_path, rows=rows, peft=lora(), defense="kl", max_steps=2)
    trainer.train()
    assert logged(trainer, "kl")[1] > 0


def test_packed_documents_have_no_position_across_their_boundary(tmp_path):
    """Count the positions of `kl_tokens="all"` in a padding-free batch: T − 1 in each document."""
    options = {"packing": True, "max_length": 64, "kl_tokens": "all", "defense": "kl", "max_steps": 1}
    trainer = make_trainer(tmp_path, rows=make_rows(8), peft=lora(), per_device_train_batch_size=8, **options)
    documents = [length for row in trainer.train_dataset for length in row["seq_lengths"]]
    trainer.train()
    assert evidence(trainer, "kl")["positions"] == sum(length - 1 for length in documents)


def test_eval_loss_is_plain_ce(tmp_path):
    """Compare the defended trainer's eval loss with SFTTrainer's on the same trained weights."""
    trainer = make_trainer(tmp_path / "a", peft=lora(), defense="kl,ldifs", kl_coef=50.0, ldifs_coef=50.0)
    trainer.train()
    stock = SFTTrainer(
        trainer.model, plain_config(tmp_path / "b"), train_dataset=make_rows(), processing_class=make_tokenizer()
    )
    rows = make_rows(6)
    ours, theirs = trainer.evaluate(rows), stock.evaluate(rows)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    assert not {"eval_kl", "eval_ldifs"} & ours.keys()


def test_an_evaluation_before_training_has_its_precision(tmp_path):
    """Train a whole model: its reference, a model of its own, must not pass for the policy's preparation."""
    seen = []
    trainer = make_trainer(tmp_path, defense="kl", bf16=True)
    trainer.model.base_model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.evaluate(make_rows(4))
    assert seen == [True]


@pytest.mark.parametrize("full_eval", ["bf16_full_eval", "fp16_full_eval"])
def test_a_model_is_on_its_device_before_any_pass(tmp_path, monkeypatch, full_eval):
    """Move the model before the checks ahead of training: with these options Trainer moves it only after them."""
    done = []
    move = Trainer._move_model_to_device
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda *args: done.append("move") or move(*args))
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl", max_steps=1, **{full_eval: True})
    trainer.model.register_forward_pre_hook(lambda *_: done.append("pass"))
    trainer.model.get_base_model().base_model.register_forward_pre_hook(lambda *_: done.append("pass"))
    assert not done
    trainer.train()
    assert done[0] == "move"


def test_loss_logged_is_the_total(tmp_path):
    trainer = make_trainer(
        tmp_path, peft=lora(), defense="kl,ldifs", kl_coef=2.0, ldifs_coef=3.0, gradient_accumulation_steps=2
    )
    trainer.train()
    parts = zip(*(logged(trainer, key) for key in ("loss", "loss_ce", "kl", "ldifs")), strict=True)
    for total, ce, kl, ldifs in parts:
        assert total == pytest.approx(ce + 2 * kl + 3 * ldifs, rel=1e-5)


def test_moe_auxiliary_loss_is_kept(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def model():
        torch.manual_seed(1)
        sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        return MixtralForCausalLM(
            MixtralConfig(
                **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5
            )
        )

    runs = []
    for defense in ("none", "kl"):
        trainer = make_trainer(
            tmp_path / defense, model(), defense=defense, kl_coef=1e-12, gradient_accumulation_steps=2
        )
        trainer.train()
        runs.append(trainer)
    assert runs[0].aux_loss_enabled
    for key in ("loss", "aux_loss", "grad_norm"):
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-4)


@pytest.mark.parametrize(("trainer_class", "name"), [(KLTrainer, "kl"), (LDIFSTrainer, "ldifs")])
@pytest.mark.parametrize("given", ["none", "same", "args=None"])
def test_named_subclasses(tmp_path, trainer_class, name, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trl_emguard.trainer.EMGuardConfig", CpuConfig)
    args = None if given == "args=None" else config(tmp_path, defense="none" if given == "none" else name)
    if args is None:
        with pytest.raises(ValueError, match="every:5") if name == "ldifs" else nullcontext():
            trainer_class(make_model(), args, train_dataset=make_rows(4), processing_class=make_tokenizer())
        return
    before = args.defense
    trainer = trainer_class(
        make_model(), args, train_dataset=make_rows(), processing_class=make_tokenizer(), peft_config=lora()
    )
    assert [defense.name for defense in trainer.defenses] == [name]
    assert args.defense == before


def test_named_subclass_refuses_another_defense(tmp_path):
    with pytest.raises(ValueError, match=r"KLTrainer trains with defense='kl'.*'ldifs'.*EMGuardTrainer"):
        KLTrainer(make_model(), config(tmp_path, defense="ldifs"), train_dataset=make_rows(4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"defense": "none"}, ["no defense acts (defense='none')"]),
        ({"defense": "kl", "kl_coef": 0.0}, ["defense 'kl' is off (kl_coef=0.0", "no defense acts (defense='kl')"]),
        ({"defense": "kl,ldifs"}, ["'kl' acts (kl_coef=0.1", "'ldifs' acts", "reference: base model, adapters off"]),
        ({"defense": "kl,ldifs", "ldifs_coef": 0.0}, ["'kl' acts", "'ldifs' is off"]),
    ],
)
def test_a_run_says_which_defense_acts(tmp_path, capsys, options, said):
    make_trainer(tmp_path, peft=lora(), max_steps=1, **options).train()
    out = capsys.readouterr().out
    assert all(words in out for words in said)


def test_generation_and_plain_forward_are_untouched(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl,ldifs")
    prompt = torch.tensor([[5, 6, 7]])
    before = make_model()(prompt).logits
    assert torch.equal(trainer.model.eval()(prompt).logits, before)
    assert trainer.model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.fixture
def own_defense():
    shipped = set(DEFENSES)
    yield
    for name in [name for name in DEFENSES if name not in shipped]:
        del DEFENSES[name]


@pytest.mark.usefixtures("own_defense")
def test_a_user_can_write_a_term(tmp_path):
    @register
    class Shrink(ReferenceDefense):
        name = "shrink"
        coef = 0.5

        def layers(self, num_layers):
            return (1, num_layers)

        def token_loss(self, policy, reference):
            return (policy[1] - reference[1]).square().mean(-1) + 0 * policy[0].sum(-1)

        def options(self):
            return {"shrink_coef": self.coef}

    trainer = make_trainer(tmp_path, peft=lora(), defense="kl,shrink")
    trainer.train()
    assert logged(trainer, "shrink")[0] == 0
    for total, ce, kl, shrink in zip(*(logged(trainer, k) for k in ("loss", "loss_ce", "kl", "shrink")), strict=True):
        assert total == pytest.approx(ce + 0.1 * kl + 0.5 * shrink, rel=1e-5)
    assert evidence(trainer, "shrink")["acted"]


@pytest.mark.usefixtures("own_defense")
@pytest.mark.parametrize("other", ["", ",kl"])
def test_a_user_can_change_data_and_surround_the_policy_pass(tmp_path, other):
    passes = []

    class Surround:
        def __init__(self, model):
            self.handle = model.base_model.layers[0].register_forward_hook(
                lambda m, a, out: passes.append(torch.is_grad_enabled())
            )

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.handle.remove()

    @register
    class Doubled(Defense):
        name = "doubled"

        def prepare_rows(self, rows):
            return rows.select(list(range(4)))

        def policy_pass(self, model, inputs):
            return Surround(model)

    trainer = make_trainer(tmp_path, peft=lora(), defense=f"doubled{other}", max_steps=2)
    assert len(trainer.train_dataset) == 4
    trainer.train()
    # The hook runs once a micro-batch, with gradient, and never in the reference's pass.
    assert passes == [True, True]
    trainer.evaluate(make_rows(2))
    assert len(passes) == 2
    assert math.isfinite(logged(trainer)[-1])


@pytest.mark.usefixtures("own_defense")
@pytest.mark.parametrize(
    ("layers", "message"), [((0,), "layer 0 is out of range"), ((7,), "layer 7 is out"), ((), "nothing to compare")]
)
def test_a_term_over_no_block_is_refused(tmp_path, layers, message):
    @register
    class Off(ReferenceDefense):
        name = "off"

        def layers(self, num_layers):
            return layers

    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, peft=lora(), defense="off")


def test_all_tokens_of_a_batch_that_does_not_say_which_are_real(tmp_path):
    def collate(rows):
        ids = [row["input_ids"][:8] for row in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}

    trainer = EMGuardTrainer(
        make_model(),
        config(tmp_path, defense="kl", kl_tokens="all"),
        collate,
        make_rows(),
        processing_class=make_tokenizer(),
    )
    with pytest.raises(ValueError, match="neither 'attention_mask' nor 'position_ids'"):
        trainer.train()


def test_subclasses_get_outputs_in_training(tmp_path):
    class Mine(EMGuardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            assert outputs.total == loss
            return (loss, outputs) if return_outputs else loss

    args = config(tmp_path, defense="kl", max_steps=1)
    Mine(make_model(), args, train_dataset=make_rows(), processing_class=make_tokenizer()).train()


def test_options_set_after_construction_are_checked(tmp_path):
    args = config(tmp_path, loss_type="dft")
    args.defense = "kl"
    with pytest.raises(ValueError, match="loss_type='dft' does not work with defense='kl'"):
        EMGuardTrainer(make_model(), args, train_dataset=make_rows(4), processing_class=make_tokenizer())


@pytest.mark.parametrize(
    ("given", "value", "warns"),
    [
        ({}, True, False),
        ({"activation_checkpointing": False}, False, False),
        ({"gradient_checkpointing": False}, False, True),
        ({"gradient_checkpointing": True}, True, False),
        ({"activation_checkpointing": False, "gradient_checkpointing": True}, False, False),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, True, False),
    ],
    ids=str,
)
def test_the_default_of_checkpointing_is_no_use_of_its_old_name(tmp_path, given, value, warns):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        args = EMGuardConfig(str(tmp_path), use_cpu=True, bf16=False, **given)
    assert args.activation_checkpointing is args.gradient_checkpointing is value
    assert any("`gradient_checkpointing` is deprecated" in str(warning.message) for warning in warned) == warns
    assert EMGuardConfig.from_args(args).activation_checkpointing is value


def test_the_callers_config_stays_as_it_is(tmp_path):
    given = {"dtype": torch.bfloat16}
    more = {"use_cpu": True, "report_to": [], "activation_checkpointing": False}
    args = SFTConfig(str(tmp_path), model_init_kwargs=given, **more)
    args.parallelism_config = parallelism = ParallelismConfig()
    assert EMGuardConfig.from_args(args).parallelism_config == parallelism
    assert args.model_init_kwargs is given
    assert given == {"dtype": torch.bfloat16}


def test_fp16_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not work in fp16"):
        make_trainer(tmp_path, make_model(dtype=torch.float16), defense="kl")


def test_adalora_adds_nothing_of_its_own(tmp_path):
    """Leave out AdaLoRA's regulariser, as SFTTrainer's training does: PEFT adds it only to an output named `loss`."""
    runs = []
    for defense in ("none", "kl"):
        peft = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = make_trainer(tmp_path / defense, peft=peft, defense=defense, kl_coef=1e-12)
        trainer.train()
        runs.append(logged(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.usefixtures("own_defense")
def test_register_refuses_a_taken_name():
    class Mine(ReferenceDefense):
        name = "kl"

    with pytest.raises(ValueError, match="'kl' is taken by KL"):
        register(Mine)


def left_by(make):
    """Return the bytes of tensors that stay in memory after a training, until the garbage collector runs."""

    def tensors():
        return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        trainer = make()
        trainer.train()
        del trainer
        known = set(map(id, before))
        return sum(x.nbytes for x in tensors() if id(x) not in known)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("defense", "tuning", "options"),
    [
        (EVERYTHING, "lora", {}),
        ("kl,ldifs", "full", {}),
        ("kl,ldifs,interleave+", "lora", {"cache_reference": True, "dataloader_num_workers": 1}),
        ("interleave+,inoculation", "lora", {"packing": True, "max_length": 256}),
    ],
)
def test_no_more_is_left_in_memory_than_by_sfttrainer(tmp_path, defense, tuning, options):
    """A run that waits for the garbage collector keeps the memory that the next run in this process needs."""
    peft = lora() if tuning == "lora" else None
    stock = left_by(
        lambda: SFTTrainer(
            make_model(),
            plain_config(tmp_path / "stock"),
            train_dataset=make_rows(),
            processing_class=make_tokenizer(),
            peft_config=peft,
        )
    )
    assert stock > 0  # TRL's fused head refers to the model, and the model to the head
    assert left_by(lambda: make_trainer(tmp_path, peft=peft, **run_options(defense, tmp_path, **options))) <= stock
