"""Compare values and gradients of a real training step with the float64 twin, in every batching."""

import pytest
import torch
from methods import COMPARING, split
from tiny import ARCHITECTURES, TEMPLATE, config, logged, lora, make_model, make_rows, make_tokenizer, make_trainer
from torch.autograd.graph import saved_tensors_hooks
from trl import SFTTrainer
from twin import first_gradients, move_policy, relative_error, twin_step

from trl_emguard import EMGuardTrainer
from trl_emguard.reference.watch import ReferenceWatch


ROWS = 8
STEP = {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
STRONG = {"kl_coef": 3.0, "ldifs_coef": 2.0}  # large enough that an error in a term shows in the sum


def trainer_for(tmp_path, tuning="lora", architecture="llama", rows=None, spread=0.2, **options):
    peft = {
        "lora": lora(),
        "dora": lora(use_dora=True),
        "dropout": lora(lora_dropout=0.5),
        "modules_to_save": lora(target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"]),
        "full": None,
    }[tuning]
    untied = {"tie_word_embeddings": False} if tuning == "modules_to_save" else {}
    model = make_model(architecture, initializer_range=spread, **untied)
    rows = make_rows(ROWS) if rows is None else rows
    trainer = make_trainer(tmp_path, model, rows, peft, **{**STEP, **STRONG, **options})
    move_policy(trainer)
    return trainer


def assert_equals_twin(trainer, tolerance=1e-5):
    values, expected = twin_step(trainer)
    gradients = first_gradients(trainer)
    for name in ("loss", "loss_ce", *split(trainer.args.defense)):
        assert logged(trainer, name)[0] == pytest.approx(values[name], rel=tolerance)
    assert relative_error(gradients, expected) < tolerance
    assert all(values[name] > 0 for name in split(trainer.args.defense))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("defense", COMPARING)
def test_architectures(tmp_path, architecture, defense):
    assert_equals_twin(trainer_for(tmp_path, architecture=architecture, defense=defense))


@pytest.mark.parametrize("tuning", ["dora", "dropout", "modules_to_save", "full"])
def test_tunings(tmp_path, tuning):
    assert_equals_twin(trainer_for(tmp_path, tuning, defense="kl,ldifs"))


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox"])
def test_full_fine_tuning_of_soft_capped_and_untied_heads(tmp_path, architecture):
    assert_equals_twin(trainer_for(tmp_path, "full", architecture, defense="kl,ldifs"))


@pytest.mark.parametrize(
    "options",
    [
        {"kl_direction": "forward"},
        {"kl_tokens": "all"},
        {"kl_tokens": "all", "kl_direction": "forward"},
        {"ldifs_normalize": False, "ldifs_coef": 0.01},
    ],
)
def test_options(tmp_path, options):
    assert_equals_twin(trainer_for(tmp_path, defense="kl,ldifs", **options))


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("tokens", ["loss", "all"])
def test_accumulation_and_batch_size_do_not_matter(tmp_path, batch, accumulation, tokens):
    """Compare each way to cut the same ragged rows with the twin."""
    assert_equals_twin(
        trainer_for(
            tmp_path,
            defense="kl,ldifs",
            kl_tokens=tokens,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"packing": True, "max_length": 256, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"padding_free": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.long),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_how_a_batch_is_laid_out_or_run_does_not_matter(tmp_path, setting):
    torch.compiler.reset()
    values, expected = twin_step(trainer_for(tmp_path, defense="kl,ldifs"))
    trainer = trainer_for(tmp_path, defense="kl,ldifs", **setting)
    if "packing" in setting:
        assert any(len(row["seq_lengths"]) > 1 for row in trainer.train_dataset)
        trainer.args.gradient_accumulation_steps = len(trainer.train_dataset)
    gradients = first_gradients(trainer)
    for name in ("loss", "loss_ce", "kl", "ldifs"):
        assert logged(trainer, name)[0] == pytest.approx(values[name], rel=1e-5)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    assert relative_error(gradients, expected) < 1e-5


GENERATION = TEMPLATE.replace(
    "{{ message['role'] + '\n' + message['content'] }}<|im_end|>",
    "{{ message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
)


@pytest.mark.parametrize(
    "setting",
    [{"max_length": 36}, {"completion_only_loss": False}, {"assistant_only_loss": True}],
    ids=lambda setting: next(iter(setting)),
)
def test_which_tokens_carry_a_label(tmp_path, setting):
    """Label tokens as SFTTrainer does: the terms use the tokens of CE."""
    rows, tokenizer = make_rows(ROWS), make_tokenizer()
    if "assistant_only_loss" in setting:
        rows = rows.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=rows.column_names)
        tokenizer.chat_template = GENERATION
    labels = {}
    for make in (SFTTrainer, EMGuardTrainer):
        arguments = config(tmp_path, **{**STEP, **STRONG, "defense": "kl,ldifs", **setting})
        model = make_model()
        trainer = make(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora())
        labels[make] = [row["labels"] for row in trainer.train_dataset]
    assert labels[EMGuardTrainer] == labels[SFTTrainer]
    assert any(-100 in row for row in labels[SFTTrainer]) or "completion_only_loss" in setting
    trainer.args.gradient_accumulation_steps = -(-len(trainer.train_dataset) // 4)
    move_policy(trainer)
    assert_equals_twin(trainer)


def test_rows_without_labels_and_with_one(tmp_path):
    """Train on fully masked rows (also a micro-batch of them) and one-token labels, as tokenised data may have."""
    rows = make_rows(4)
    tokenised = make_trainer(tmp_path, rows=rows, defense="none").train_dataset.to_list()
    for row in tokenised[:2]:
        row["labels"] = [-100] * len(row["labels"])
    tokenised[2]["labels"] = [-100] * (len(tokenised[2]["labels"]) - 1) + tokenised[2]["labels"][-1:]
    rows = type(rows).from_list(tokenised)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_equals_twin(trainer_for(tmp_path, rows=rows, defense="kl,ldifs", **options))


@pytest.mark.parametrize("defense", COMPARING[:2])
def test_batch_without_any_label_is_a_finite_zero(tmp_path, defense):
    rows = make_trainer(tmp_path, rows=make_rows(2), defense="none").train_dataset.to_list()
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    trainer = trainer_for(tmp_path, rows=type(make_rows(1)).from_list(rows), defense=defense, max_steps=2)
    gradients = first_gradients(trainer)
    assert logged(trainer) == [0.0, 0.0]
    assert gradients
    assert all(g.abs().max() == 0 for g in gradients.values())


# The reference's pass would warn, and a user would take it for a fault of the training.
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_does_not_matter(tmp_path, tuning, checkpointing):
    assert_equals_twin(
        trainer_for(
            tmp_path,
            tuning,
            defense="kl,ldifs",
            activation_checkpointing=True,
            activation_checkpointing_kwargs=checkpointing,
        )
    )


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("defense", COMPARING)
def test_default_bf16_with_checkpointing(tmp_path, defense, tuning):
    """Bound the error of bf16 autocast, TRL's default, and of the terms together, against a float64 backbone.

    The weights have a spread at which autocast's own rounding, which stock SFT has too, stays near 1 %."""
    trainer = trainer_for(tmp_path, tuning, spread=0.1, defense=defense, bf16=True, activation_checkpointing=True)
    assert trainer.model.dtype == torch.float32
    assert_equals_twin(trainer, tolerance=4e-2)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_one_call_of_the_wrapped_model_per_micro_batch(tmp_path, tuning, monkeypatch):
    """Make one top-level call, the adapter's reference pass inside: two would invalidate ZeRO-3's prefetch trace."""
    monkeypatch.setattr(ReferenceWatch, "record", lambda self, batch, run: None)  # the watch has passes of its own
    trainer = trainer_for(tmp_path, tuning, defense="kl,ldifs")
    calls, passes = [], []
    trainer.model.register_forward_pre_hook(lambda *args: calls.append(1))
    body = trainer.model.get_base_model() if tuning == "lora" else trainer.model
    body.model.register_forward_pre_hook(lambda *args: passes.append(torch.is_grad_enabled()))
    trainer.train()
    steps = STEP["gradient_accumulation_steps"]
    assert len(calls) == steps + (tuning == "full")  # the check of the head calls the bare model
    # The head is checked before training, in two passes.
    assert passes[2:] == ([False, True] if tuning == "lora" else [True]) * steps


@pytest.mark.parametrize("defense", ["kl,ldifs", "treft"])
def test_a_step_reads_saved_tensors_in_its_backward_passes_alone(tmp_path, defense):
    """Count passes as TRL's `activation_offloading` does, which begins to free memory at the first one of a step."""
    passes = set()
    trainer = trainer_for(tmp_path, defense=defense)
    trainer.maybe_activation_offload_context = saved_tensors_hooks(
        lambda tensor: tensor, lambda tensor: passes.add(torch._C._current_graph_task_id()) or tensor
    )
    trainer.train()
    assert len(passes) == trainer.args.gradient_accumulation_steps
