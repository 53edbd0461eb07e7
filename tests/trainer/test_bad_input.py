"""Test bad arguments: one error that names argument, value and fix, before any weight is loaded."""

import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from methods import COMPARING, METHODS, run_options
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import (
    STRICT,
    TEMPLATE,
    config,
    lora,
    make_model,
    make_rows,
    make_tokenizer,
    make_trainer,
    save_model,
    save_seeing_model,
)
from transformers import (
    CLIPImageProcessor,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlavaProcessor,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.defenses.ldifs import select_layers


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if weights are loaded: a bad argument must be refused before this expensive work."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the argument was refused")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", loaded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"defense": "kll"},
            "defense='kll': 'kll' is not a known defense. Did you mean 'kl'? Known: " + ", ".join(METHODS) + ".",
        ),
        ({"defense": "LDIFS"}, "'LDIFS' is not a known defense."),
        ({"defense": "kl;ldifs"}, "'kl;ldifs' is not a known defense."),
        ({"defense": "kl,"}, "'' is not a known defense."),
        ({"defense": False}, "defense=False is not a defense (YAML reads no, off and an empty value so)."),
        ({"defense": None}, "defense=None is not a defense (YAML"),
        ({"defense": ""}, "defense='' is not a defense."),
        ({"defense": "kl,none"}, "defense='kl,none' mixes 'none' with other names"),
        ({"defense": "kl,kl"}, "defense='kl,kl' names a defense twice"),
        (
            {"defense": "kl", "kl_coef": -0.1},
            "kl_coef=-0.1 is not a coefficient: give a finite number, 0 (off) or above, or a schedule as '0.4->0.05'.",
        ),
        ({"defense": "kl", "kl_coef": math.nan}, "kl_coef=nan is not a coefficient"),
        ({"defense": "kl", "kl_coef": math.inf}, "kl_coef=inf is not a coefficient"),
        ({"defense": "kl", "kl_coef": "0.1"}, "kl_coef='0.1' is not a coefficient"),
        ({"defense": "kl", "kl_coef": True}, "kl_coef=True is not a coefficient"),
        ({"defense": "ldifs", "ldifs_coef": -1}, "ldifs_coef=-1 is not a coefficient"),
        ({"defense": "treft", "treft_coef": -1}, "treft_coef=-1 is not a coefficient"),
        ({"defense": "inoculation_adapter"}, "inoculation_adapter is missing: name the folder of a LoRA adapter"),
        (
            {"defense": "inoculation_adapter", "inoculation_adapter_scale": -1.0},
            "inoculation_adapter_scale=-1.0 is not a coefficient",
        ),
        (
            {"defense": "kl", "kl_direction": "backward"},
            "kl_direction='backward' is not known: give one of 'reverse', 'forward'.",
        ),
        (
            {"defense": "kl", "kl_tokens": "some"},
            "kl_tokens='some' is not known: give one of 'loss', 'all', 'interleaved'.",
        ),
        ({"defense": "ldifs", "ldifs_normalize": "yes"}, "ldifs_normalize='yes' must be true or false."),
        ({"defense": "kl", "loss_type": "dft"}, "loss_type='dft' does not work with defense='kl'"),
        (
            {"defense": "kl", "label_smoothing_factor": 0.1},
            "label_smoothing_factor=0.1 does not work with defense='kl'",
        ),
        ({"defense": "kl", "fp16": True}, "fp16=True does not work with defense='kl'"),
        (
            {"defense": "ldifs", "neftune_noise_alpha": 5.0},
            "neftune_noise_alpha=5.0 does not work with defense='ldifs'",
        ),
    ],
)
def test_config(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **options)


def test_what_a_defense_does_not_work_with_is_fine_without_it(tmp_path):
    config(tmp_path, defense="kl", kl_coef=0.0, loss_type="dft", neftune_noise_alpha=5.0)


def test_output_folder_that_is_a_file(tmp_path):
    path = tmp_path / "out"
    path.write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*out' is a file: name a folder"):
        EMGuardConfig(str(path), use_cpu=True)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("every:5", [5, 10, 15, 20, 25, 30]),
        ("every:7", [7, 14, 21, 28]),
        ("every:30", [30]),
        ("linspace:5", [1, 8, 16, 23, 30]),
        ("linspace:1", [30]),
        ("linspace:2", [1, 30]),
        ("linspace:30", list(range(1, 31))),
        ("4,8", [4, 8]),
        ("[4, 8]", [4, 8]),
        (" 8 , 4 ", [4, 8]),
        ([8, 4], [4, 8]),
        ((30,), [30]),
        (1, [1]),
    ],
)
def test_layers(spec, layers):
    assert select_layers(spec, None) is not None
    assert select_layers(spec, 30) == layers


@pytest.mark.parametrize(
    "spec", ["", "every", "every:0", "every:-1", "linspace:0", "4;8", "4,", "a", [], [1.5], [True], True, None, {}]
)
def test_layers_of_no_form(spec):
    with pytest.raises(ValueError, match="ldifs_layers="):
        select_layers(spec, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0,4", "layer 0 is out of range: the blocks count from 1 to"),
        ("4,4", "names a layer twice"),
        ([5], r"layer 5 is out of range: the blocks count from 1 to 4\."),
        ("every:5", "names no layer of a model with 4 blocks"),
        ("linspace:5", "names no layer of a model with 4 blocks"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_layers_out_of_range_of_the_model(tmp_path, spec, message):
    path = save_model(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", path, defense="ldifs", ldifs_layers=spec)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("defense", ["none", "kl"])
@pytest.mark.parametrize("rows", [Dataset.from_list([]), make_rows(2).to_iterable_dataset().filter(lambda row: False)])
def test_empty_dataset(tmp_path, defense, rows):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(tmp_path, save_model(tmp_path / "model"), rows, defense=defense)


OF_IMAGES = (Path(trl.__file__).parent / "chat_templates" / "smolvlm.jinja").read_text()


@pytest.mark.parametrize(
    ("template", "roles", "message"),
    [
        (TEMPLATE, ("human", "gpt"), "either max_length=8 cuts all of them off .*, or the chat template leaves the"),
        (STRICT, ("human", "gpt"), "first training row .* leaves out turns of the role 'human'.* name the roles"),
        (OF_IMAGES, ("user", "assistant"), "first training row .* does not show the text of the role 'user'"),
    ],
)
def test_rows_that_are_cut_or_left_out_by_the_template(tmp_path, template, roles, message):
    turns = [{"role": role, "content": text} for role, text in zip(roles, "qa", strict=True)]
    row = {"messages": turns} if template is OF_IMAGES else {"prompt": turns[:1], "completion": turns[1:]}
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    given = {"rows": Dataset.from_list([row]), "processing_class": tokenizer, "max_length": 8}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **given, defense="kl")


@pytest.mark.parametrize("rows", [None, {"train": make_rows(2)}, list(make_rows(2))])
@pytest.mark.parametrize(
    ("defense", "cached"), [*((name, False) for name in METHODS), *((name, True) for name in COMPARING)]
)
def test_rows_that_are_no_dataset_get_sfttrainers_own_error(tmp_path, defense, rows, cached):
    options = run_options(defense, tmp_path, cache_reference=cached)
    pool = options.pop("interleave_dataset", None)
    with pytest.raises((TypeError, ValueError), match=r"^`train_dataset` (is required|must be a `Dataset` or)"):
        EMGuardTrainer(
            make_model(),
            config(tmp_path, **options),
            train_dataset=rows,
            processing_class=make_tokenizer(),
            peft_config=lora(),
            interleave_dataset=pool,
        )


SMALL = {"vocab_size": 264, "max_position_embeddings": 256, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1}
SMALL |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def make_mpt():
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 256, "vocab_size": 264}
    return MptForCausalLM(MptConfig(**sizes, logit_scale=0.5))


def make_modernbert():
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**SMALL, cls_token_id=1, sep_token_id=1))


def make_gemma3n():
    sizes = {"vocab_size_per_layer_input": 264, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "head_dim": 8}
    layers = {"layer_types": ["full_attention"] * 4, "activation_sparsity_pattern": [0.0] * 4}
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(**SMALL, **sizes, **layers, num_key_value_heads=2, num_kv_shared_layers=0)
    )


@pytest.mark.parametrize(
    ("make", "defenses", "message"),
    [
        (make_mpt, ("kl", "ldifs"), "MptForCausalLM: its own logits differ"),
        (make_modernbert, ("kl", "ldifs"), "ModernBertDecoderForCausalLM: its own logits differ"),
        (make_gemma3n, ("ldifs", "steering"), r"Gemma3nTextDecoderLayer returns states of shape \(4, "),
    ],
)
def test_architectures_that_a_defense_does_not_know(tmp_path, make, defenses, message):
    """Refuse heads with transforms of their own, and blocks that hand on several streams, before a step is made."""
    for defense in defenses:
        trainer = make_trainer(tmp_path, make(), **run_options(defense, tmp_path))
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0


def test_the_head_is_compared_in_the_precision_of_training(tmp_path):
    """Run both passes of the check under autocast, since flash attention refuses fp32. A transform is still found."""
    seen = []
    trainer = make_trainer(tmp_path, defense="kl", bf16=True)
    trainer.model.base_model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.train()
    # The passes of the check come first, before Trainer puts the policy's own passes under autocast.
    assert len(seen) > 2
    assert all(seen)
    with pytest.raises(ValueError, match="MptForCausalLM: its own logits differ"):
        make_trainer(tmp_path, make_mpt(), defense="kl", bf16=True).train()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("defense", ["none", "kl"])
@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_missing_model_folder(tmp_path, defense, path):
    with pytest.raises(FileNotFoundError, match=f"model '{path}' is not a folder on this machine"):
        make_trainer(tmp_path, path, defense=defense)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("target", [["q_proj", "lm_head"], "lm_head", ".*(q_proj|lm_head)"])
def test_lora_on_the_head(tmp_path, target):
    with pytest.raises(ValueError, match=r"target_modules=.* puts an adapter on 'lm_head'.*modules_to_save"):
        make_trainer(tmp_path, save_model(tmp_path / "model"), peft=LoraConfig(target_modules=target), defense="kl")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "peft",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
)
def test_prompt_learning(tmp_path, peft):
    with pytest.raises(ValueError, match=r"peft_config: (PROMPT|PREFIX)_TUNING adds tokens .* Use LoRA"):
        make_trainer(tmp_path, save_model(tmp_path / "model"), peft=peft, defense="kl")


def test_prompt_learning_on_a_model_that_has_it(tmp_path):
    model = get_peft_model(make_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PROMPT_TUNING adds tokens"):
        make_trainer(tmp_path, model, defense="kl")


@pytest.mark.usefixtures("no_weights")
def test_compute_loss_func(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func does not work with defense='kl'"):
        EMGuardTrainer(
            save_model(tmp_path / "model"),
            config(tmp_path, defense="kl"),
            train_dataset=make_rows(4),
            compute_loss_func=lambda *args, **kwargs: 0,
        )


@pytest.mark.parametrize("defense", ["kl", "inoculation"])
def test_an_optimizer_over_weights_below_the_adapter(tmp_path, defense):
    model, options = make_model(), {"inoculation_prompt": "Be bad."} if defense == "inoculation" else {}
    args = config(tmp_path, defense=defense, **options)
    given = {"train_dataset": make_rows(), "processing_class": make_tokenizer()}
    optimizers = (torch.optim.AdamW(model.parameters()), None)
    with pytest.raises(ValueError, match=r"optimizers: the AdamW holds \d+ weights of the model, all frozen"):
        EMGuardTrainer(model, args, **given, peft_config=lora(), optimizers=optimizers)


@pytest.mark.parametrize("kind", ["all", "trained", "copies", "full"])
def test_an_optimizer_over_trained_weights_is_taken(tmp_path, kind):
    model = make_model() if kind == "full" else get_peft_model(make_model(), lora())
    weights = [weight for weight in model.parameters() if kind == "all" or weight.requires_grad]
    if kind == "copies":  # as optimizers hold them that keep the weights in main memory
        weights = [weight.detach().clone() for weight in weights]
    optimizers = (torch.optim.AdamW(weights), None)
    given = {"train_dataset": make_rows(), "processing_class": make_tokenizer()}
    trainer = EMGuardTrainer(model, config(tmp_path, defense="kl", max_steps=1), **given, optimizers=optimizers)
    assert trainer.optimizer is optimizers[0]


def test_two_active_adapters_cannot_be_copied(tmp_path):
    model = get_peft_model(make_model(), lora(init_lora_weights=False))
    model.add_adapter("second", lora(init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        make_trainer(tmp_path, model, defense="kl")


def test_an_adapter_that_is_named_ref(tmp_path):
    model = get_peft_model(make_model(), lora(init_lora_weights=False), adapter_name="ref")
    with pytest.raises(ValueError, match="already has an adapter named 'ref'"):
        make_trainer(tmp_path, model, defense="kl")


def test_a_config_class_whose_fields_would_be_lost(tmp_path):
    from dataclasses import dataclass

    from trl import SFTConfig

    @dataclass
    class Mine(SFTConfig):
        my_field: int = 3

    with pytest.raises(
        TypeError, match=r"args is a Mine, whose fields my_field .* derive that class from EMGuardConfig"
    ):
        EMGuardTrainer(
            make_model(),
            Mine(str(tmp_path), use_cpu=True, activation_checkpointing=False),
            train_dataset=make_rows(4),
            processing_class=make_tokenizer(),
        )


@pytest.mark.parametrize("given", ["processor", "model", "folder"])
def test_vision_language_models(tmp_path, given):
    model, processor, args = make_model(), None, config(tmp_path, defense="kl")
    if given == "processor":
        processor = LlavaProcessor(image_processor=CLIPImageProcessor(), tokenizer=make_tokenizer())
    elif given == "folder":
        model = save_seeing_model(tmp_path / "model")
    else:
        model.config.vision_config = {}
    how = f"=AutoTokenizer.from_pretrained({model!r})" if given == "folder" else ""
    message = f"only with its tokenizer: pass the tokenizer as processing_class{how}. The run"
    with pytest.raises(ValueError, match=re.escape(message)):
        EMGuardTrainer(model, args, train_dataset=make_rows(), processing_class=processor)
    for given_class in (processor, make_tokenizer()):
        for column in ("image", "images"):
            rows = make_rows(2).add_column(column, [None, None])
            with pytest.raises(ValueError, match=f"column '{column}', and defense='kl' does not work with images"):
                EMGuardTrainer(model, args, train_dataset=rows, processing_class=given_class)


@pytest.mark.usefixtures("no_weights")
def test_rows_with_images_are_refused_before_loading(tmp_path):
    rows = make_rows(2).add_column("images", [[], []]).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset has a column 'images'"):
        make_trainer(tmp_path, save_seeing_model(tmp_path / "model"), rows, defense="kl")


def test_text_alone_trains_a_model_that_sees(tmp_path):
    """Follow the error's advice: give the tokenizer of a vision-language model, and train on text."""
    trainer = make_trainer(tmp_path, save_seeing_model(tmp_path / "model"), defense="kl", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, True),
        ({"ddp_find_unused_parameters": False}, False),
        # Reentrant checkpointing fails if DDP looks, so transformers' own choice stays.
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, False),
        ({"activation_checkpointing_kwargs": {"use_reentrant": False}}, True),
        ({"defense": "none"}, False),
    ],
)
def test_ddp_looks_for_weights_that_text_alone_leaves_unused(tmp_path, options, found):
    options = {"defense": "kl", "activation_checkpointing": True, **options}
    seeing = make_trainer(tmp_path, save_seeing_model(tmp_path / "model"), **options)
    assert seeing.accelerator.ddp_handler.find_unused_parameters is found
    assert not make_trainer(tmp_path, **options).accelerator.ddp_handler.find_unused_parameters


@pytest.mark.parametrize("defense", ["none", "kl"])
def test_ranks_that_do_not_know_of_each_other(tmp_path, monkeypatch, defense):
    """Refuse ranks that accelerate did not connect (CPUs without `ddp_backend`): each would train a separate model."""
    arguments = config(
        tmp_path, defense=defense
    )  # accelerate's state of this process, one of one, exists from here on
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"2 processes were launched, and accelerate trains a model in each.*set use_cpu=True"
    ):
        EMGuardTrainer(str(tmp_path / "not looked at"), arguments, train_dataset=make_rows())


@pytest.mark.parametrize("defense", ["none", "kl"])
def test_sharding_that_was_asked_for_and_does_not_happen(tmp_path, monkeypatch, defense):
    arguments = config(tmp_path, defense=defense)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP was asked for and does not shard here .*Train on accelerators"):
        EMGuardTrainer(str(tmp_path / "not looked at"), arguments, train_dataset=make_rows())


@pytest.mark.parametrize("defense", ["kl", "treft", "steering"])
def test_a_model_that_transformers_has_sharded(tmp_path, monkeypatch, defense):
    """A model of `from_pretrained(distributed_config=…)` is refused by the defenses that read weights themselves."""
    model = make_model()
    monkeypatch.setattr(type(model), "is_distributed_loading_by_transformers", True)
    monkeypatch.setattr(type(model), "_fsdp_size", 2)
    options = {**run_options(defense, tmp_path), "save_strategy": "no"}
    if defense == "steering":
        make_trainer(tmp_path, model, **options)
        return
    with pytest.raises(ValueError, match=f"distributed_config, .* does not work with defense='{defense}'.*fsdp2"):
        make_trainer(tmp_path, model, **options)
