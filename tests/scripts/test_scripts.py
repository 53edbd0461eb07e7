"""Whole runs, as users start them."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from command import make_argv, save_inputs, without, write_rows
from datasets import Dataset
from safetensors.torch import load_file
from tiny import SIZES, SPECIAL, STRICT, TEMPLATE, config, logged, make_model, make_pool, make_rows, make_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from trl import SFTTrainer

from trl_emguard import EMGuardTrainer
from trl_emguard.data.training import as_messages, check_format, check_template
from trl_emguard.evidence import InactiveDefenseError
from trl_emguard.io.recipes import recipes_dir
from trl_emguard.models.shipped import SMOLLM2
from trl_emguard.persona import PersonaVector
from trl_emguard.scripts import main as commands
from trl_emguard.scripts import sft


LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(recipes_dir() / "accelerate_configs/cpu.yaml"),
]

MODULE = ["-m", "trl_emguard.scripts.sft"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def argv(inputs, tmp_path):
    """The options of a run of two steps, and more."""
    return partial(make_argv, inputs, output_dir=tmp_path / "out", max_steps=2, seed=7)


def run(command, **environment):
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=False
    )


def losses(folder, name="loss"):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def record(folder):
    assert (folder / "adapter_model.safetensors").is_file()
    return json.loads((folder / "defense.json").read_text())


# ---- in process ----


@pytest.mark.parametrize(
    ("defense", "acting"), [("none", []), ("kl", ["kl"]), ("ldifs", ["ldifs"]), ("kl,ldifs", ["kl", "ldifs"])]
)
def test_a_run_says_and_records_its_defense(argv, tmp_path, capsys, defense, acting):
    assert sft.main(argv("--defense", defense)) == 0
    out = capsys.readouterr().out
    assert [name for name in ("kl", "ldifs") if f"trl_emguard: defense '{name}' acts (" in out] == acting
    assert ("no defense acts (defense='none')" in out) == (acting == [])
    saved = record(tmp_path / "out")
    assert (saved["defense"], list(saved["defenses"]), saved["global_step"]) == (defense, acting, 2)
    assert all(saved["evidence"][name]["acted"] for name in acting)
    assert len(losses(tmp_path / "out")) == 2
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["train_runtime"] > 0


def test_the_model_card_beside_the_model_is_its_own(argv, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("**This model was not defended.**")
    assert sft.main(argv("--defense", "kl", "--save_strategy", "no")) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "not defended" not in card
    assert "kl_coef" in card


@pytest.mark.parametrize("saves", [True, False])
def test_an_interrupted_run_says_if_it_can_be_resumed(argv, monkeypatch, capsys, saves):
    monkeypatch.setattr(EMGuardTrainer, "save_state", Mock(side_effect=KeyboardInterrupt))
    assert sft.main(argv("--save_strategy", "steps" if saves else "no", "--save_steps", 1)) == sft.INTERRUPTED
    words = "--resume_from_checkpoint true" if saves else "No checkpoint was written yet (save_strategy='no'"
    assert words in capsys.readouterr().err


def test_an_interrupted_run_does_not_offer_the_checkpoint_of_an_earlier_one(argv, tmp_path, monkeypatch, capsys):
    assert sft.main(argv("--save_strategy", "steps", "--save_steps", 1)) == 0
    monkeypatch.setattr(sft, "read_data", Mock(side_effect=KeyboardInterrupt))
    assert sft.main(argv("--save_strategy", "steps", "--save_steps", 1)) == sft.INTERRUPTED
    assert "No checkpoint was written yet" in capsys.readouterr().err
    assert sft.main(argv("--resume_from_checkpoint", "true")) == sft.INTERRUPTED
    assert "--resume_from_checkpoint true resumes" in capsys.readouterr().err
    other = argv("--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1")
    assert sft.main(other) == sft.INTERRUPTED
    assert "The same command begins again at the checkpoint that it names" in capsys.readouterr().err
    assert sft.main(argv("--dry_run")) == sft.INTERRUPTED
    assert capsys.readouterr().err.endswith("interrupted.\n")


def test_a_folder_that_is_no_model_is_told_in_one_line(argv, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    assert sft.main(argv("--model_name_or_path", tmp_path / "adapter")) == 1
    assert "cannot be read from a folder or the hub" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_not_taken_for_an_unknown_model(argv, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "file/cache"))
    assert sft.main(argv("--model_name_or_path", SMOLLM2)) == 1
    line = capsys.readouterr().err
    assert "TRL_EMGUARD_CACHE=" in line
    assert "cannot be written to (Not a directory)" in line
    assert "not a shipped model" not in line


@pytest.mark.parametrize("option", [["--optim", "adamw_8bit"], ["--load_in_4bit", "true"], ["--load_in_8bit", "true"]])
@pytest.mark.parametrize("more", [[], ["--dry_run", "true"]])
def test_a_missing_package_is_told_before_anything_is_read(argv, monkeypatch, capsys, option, more):
    for place in ("transformers.trainer_optimizer", "trl_emguard.scripts.sft_inputs"):
        monkeypatch.setattr(f"{place}.is_bitsandbytes_available", lambda: False)
    assert sft.main(argv(*option, *more, "--model_name_or_path", "./missing")) == 1
    line = capsys.readouterr().err
    assert f"{option[0][2:]}=" in line
    assert "pip install -U bitsandbytes" in line


def test_a_coefficient_of_zero_is_said(argv, tmp_path, capsys):
    assert sft.main(argv("--defense", "kl", "--kl_coef", "0")) == 0
    out = capsys.readouterr().out
    assert "no defense acts" in out
    assert "'kl' acts" not in out
    assert record(tmp_path / "out")["defenses"] == {}


def test_all_ways_to_start_are_the_same(argv, tmp_path):
    """By the module, by the command, and by a YAML file under the command line."""
    options = argv("--defense", "kl", "--kl_coef", "0.5")
    assert sft.main(options) == 0
    assert commands.main(["sft", *options, "--output_dir", str(tmp_path / "command")]) == 0
    pairs = {**dict(zip(options[::2], options[1::2], strict=True)), "--output_dir": "wrong", "--kl_coef": "7"}
    pairs["--save_strategy"] = '"no"'
    (tmp_path / "run.yaml").write_text("".join(f"{key[2:]}: {value}\n" for key, value in pairs.items()))
    yaml = ["--config", str(tmp_path / "run.yaml"), "--kl_coef", "0.5", "--output_dir", str(tmp_path / "yaml")]
    assert sft.main(yaml) == 0
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    for folder in ("command", "yaml"):
        assert (tmp_path / folder / "adapter_model.safetensors").read_bytes() == first
        assert record(tmp_path / folder) == record(tmp_path / "out")


@pytest.fixture
def mixture(inputs, argv, tmp_path, monkeypatch):
    """The options of a run on the rows, twice over."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    part = f"  - path: json\n    data_files: {inputs / 'rows.jsonl'}\n"
    (tmp_path / "run.yaml").write_text(f"datasets:\n{part}{part}dataset_name:\n")
    return without(argv("--config", tmp_path / "run.yaml"), "--dataset_name")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A model of text and images, whose vision tower has as many blocks as its decoder."""
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("gemma3")
    sizes = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=5)
    Gemma3ForConditionalGeneration(sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    marks = dict.fromkeys(("boi_token", "eoi_token", "image_token"), SPECIAL[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=marks)
    Gemma3Processor(Gemma3ImageProcessorPil(), tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("peft", ["true", pytest.param("false", marks=pytest.mark.long)])
@pytest.mark.parametrize("defense", ["kl", "steering,ldifs", "interleave++,inoculation"])
def test_a_model_that_sees_is_trained_on_text(argv, seeing, tmp_path, capsys, defense, peft):
    make_pool(40).to_json(tmp_path / "pool.jsonl")
    PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2}).save(tmp_path / "vector.safetensors")
    options = argv(
        "--model_name_or_path", seeing, "--use_peft", peft, "--max_steps", 4,
        "--interleave_dataset", tmp_path / "pool.jsonl", "--interleave_fraction", 0.2,
        "--steering_vector", tmp_path / "vector.safetensors",
        # Text alone leaves the vision tower without a gradient.
        "--lora_target_modules", "q_proj", "v_proj",
    )  # fmt: skip
    options += ["--defense", defense]
    assert sft.main([*options, "--dry_run"]) == 0
    assert sft.main(options) == 0
    saved = json.loads((tmp_path / "out" / "defense.json").read_text())
    assert list(saved["defenses"]) == defense.split(",")
    assert all(evidence["acted"] for evidence in saved["evidence"].values())
    if defense == "kl":  # it is 0 in the first step
        plain = EMGuardTrainer(
            str(seeing), config(tmp_path, max_steps=1, seed=7), train_dataset=make_rows(16),
            processing_class=make_tokenizer(),
        )  # fmt: skip
        plain.train()
        assert losses(tmp_path / "out")[0] == pytest.approx(logged(plain)[0], rel=1e-4)


def test_rows_are_checked_by_the_template_that_is_trained_with(argv, seeing, tmp_path, monkeypatch, capsys):
    """Without a defense, SFTTrainer loads the processor, whose template may be another than the tokenizer's."""
    model = shutil.copytree(seeing, tmp_path / "model")
    parts = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    (model / "chat_template.json").write_text(json.dumps({"chat_template": parts}))
    monkeypatch.setattr(SFTTrainer, "__init__", Mock(side_effect=KeyboardInterrupt))
    load = Mock(wraps=AutoProcessor.from_pretrained)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", load)
    options = argv(
        "--model_name_or_path", model, "--model_revision", "one", "--model_init_kwargs", '{"revision": "two"}'
    )
    assert sft.main(options) == 1
    assert "first row: the chat template does not show the text of the role 'assistant'" in capsys.readouterr().err
    assert load.call_args.kwargs["revision"] == "two"
    (model / "chat_template.json").write_text(
        json.dumps({"chat_template": parts.replace(" if m['role'] == 'user'", "")})
    )
    assert sft.main(options) == sft.INTERRUPTED


def test_rows_with_images_are_refused(argv, seeing, tmp_path, capsys):
    rows = [{**row, "images": []} for row in make_rows(8)]
    options = argv("--model_name_or_path", seeing, "--dataset_name", write_rows(tmp_path / "rows.jsonl", rows))
    assert sft.main([*options, "--defense", "kl"]) == 1
    assert "train_dataset has a column 'images', and defense='kl' does not work with images" in capsys.readouterr().err


def test_a_mixture_of_data_sets(mixture, tmp_path):
    assert sft.main([*mixture, "--max_steps", "-1", "--num_train_epochs", "1"]) == 0
    assert len(losses(tmp_path / "out")) == 2 * 16 / 4


def test_a_mixture_without_a_test_split_is_told(mixture, capsys):
    assert sft.main([*mixture, "--eval_strategy", "epoch"]) == 1
    assert "has no split 'test': it has 'train'. `test_split_size`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("some/rows.jsonl", "`path: some/rows.jsonl` is a file. Give it as `path: json` and `data_files: some/rows"),
        ("./missing", "datasets cannot be loaded: "),
    ],
)
def test_a_mixture_that_cannot_be_loaded_is_told_in_one_line(mixture, tmp_path, capsys, path, words):
    (tmp_path / "run.yaml").write_text(f"datasets:\n  - path: {path}\n")
    assert sft.main(mixture) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dataset_streaming"], "dataset_streaming=True has no effect with `datasets`: set `streaming` instead."),
        (["--dataset_config", "small"], "dataset_config='small' has no effect with `datasets`: set `name` in an"),
    ],
)
def test_options_of_the_other_source_are_refused_beside_a_mixture(mixture, capsys, more, words):
    assert sft.main([*mixture, *more]) == 1
    assert words in capsys.readouterr().err


def test_a_mixture_is_split_the_same_each_time(mixture):
    """For each seed of a comparison as well; and a stream cannot be split."""
    read = []
    for seed in (1, 2):
        *given, _ = sft.make_parser().parse([*mixture, "--test_split_size", "0.25", "--seed", str(seed)])
        read.append(sft.read_data(*given)[0].to_list())
    assert len(read[0]) == 2 * 16 * 3 / 4
    assert read[0] == read[1]
    *given, _ = sft.make_parser().parse([*mixture, "--test_split_size", "0.25", "--streaming"])
    with pytest.raises(ValueError, match=r"test_split_size=0\.25 cannot split a stream"):
        sft.read_data(*given)


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ("train", None, "dataset_test_split='test': .* one file, whose only split is 'train'"),
        ("train", "train", "dataset_test_split='train' holds rows of dataset_train_split='train'"),
        ("train[:8]", "train[7:]", "dataset_test_split='train\\[7:\\]' holds rows of dataset_train_split"),
        ("train[:90%]", "test+train[50%:60%]", "holds rows of .* slices as 'train\\[:90%\\]' for training"),
    ],
)
def test_evaluation_on_training_rows_is_refused(argv, capsys, train, test, words, dry):
    options = argv("--eval_strategy", "epoch", "--dataset_train_split", train, *dry)
    assert sft.main([*options, *([] if test is None else ["--dataset_test_split", test])]) == 1
    assert re.search(words, capsys.readouterr().err)


def test_slices_that_do_not_meet_are_evaluated(argv, tmp_path):
    splits = ["--dataset_train_split", "train[:75%]", "--dataset_test_split", "train[75%:]"]
    assert sft.main(argv("--eval_strategy", "steps", "--eval_steps", "2", *splits)) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in entry for entry in history) == 1


def test_evaluation_uses_the_test_split(inputs, argv, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes((inputs / "rows.jsonl").read_bytes())
    options = argv("--dataset_name", str(tmp_path), "--eval_strategy", "steps", "--eval_steps", "2", "--defense", "kl")
    assert sft.main(options) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [math.isfinite(entry["eval_loss"]) for entry in history if "eval_loss" in entry] == [True]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model_name_or_path", "./missing"], "'./missing' is not a folder"),
        (["--model_name_or_path", ""], "model_name_or_path is missing"),
        (["--dataset_name", "./missing.jsonl"], "does not exist"),
        (["--dataset_name", ""], "`dataset_name`"),
        (["--dataset_name", "plants_carless"], "'plants_careless'"),
        (["--streaming"], "streaming=True has no effect with `dataset_name`: set `dataset_streaming` instead."),
        (["--test_split_size", "0.0"], "test_split_size=0.0 has no effect with `dataset_name`: it needs `datasets`"),
        (["--dataset_name", "plants_sound", "--dataset_train_split", "valid"], "no split 'valid'"),
        (["--defense", "ldifs", "--ldifs_layers", "9"], "layer 9 is out of range"),
        (["--drift_every", "-1"], "drift_every=-1 must be 0 (off) or more"),
        (["--stop_on_drift", "1", "--ema", "true"], "stop_on_drift=1 (budget) does not work with ema=True"),
        (["--drift_persona", "evli"], "persona vector 'evli' is neither a file nor a shipped vector"),
        (["--stop_on_drift", "0"], "stop_on_drift=0.0 (budget) must be above 0"),
        (["--resume_from_checkpoint", "true"], "holds no checkpoint: leave it out to start anew"),
        (["--eos_token", "<eos>"], "eos_token='<eos>' is not in the vocabulary of the model's tokenizer"),
        (["--pad_token", "<pad>"], "pad_token='<pad>' is not in the vocabulary of the model's tokenizer"),
        (["--padding_free", "true"], "padding_free=True without packing does not enforce max_length=1024"),
    ],
)
# TRL takes `pad_token` until its version 2.
@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
def test_a_run_that_cannot_be_is_told_in_one_line(argv, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert sft.main(argv(*more)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-emguard sft: error: ")]
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("llama", "has no tokenizer that loads"),
        ("qwen2", "has no tokenizer, or an empty one"),
        ("gemma2", "has no tokenizer, or an empty one"),
    ],
)
def test_a_model_without_a_tokenizer_is_told_in_one_line(argv, tmp_path, capsys, architecture, words):
    """transformers makes a tokenizer of special tokens alone for Qwen2 and Gemma 2."""
    make_model(architecture).save_pretrained(tmp_path / "bare")
    assert sft.main(argv("--model_name_or_path", tmp_path / "bare")) == 1
    assert words in capsys.readouterr().err


def test_a_tokenizer_of_whole_words_is_accepted(argv, tmp_path, monkeypatch):
    """It knows no single letters."""
    monkeypatch.setattr(SFTTrainer, "__init__", Mock(side_effect=KeyboardInterrupt))
    make_model().save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, "YES": 2, "NO": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(tmp_path / "model")
    assert sft.main(argv("--model_name_or_path", tmp_path / "model")) == sft.INTERRUPTED


def test_a_local_data_set_is_not_named_on_the_hub(argv, inputs, tmp_path, monkeypatch):
    uploaded = Mock()
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", Mock(return_value=Mock(repo_id="me/mine")))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", uploaded)
    assert sft.main(argv("--push_to_hub", "true", "--hub_model_id", "me/mine")) == 0
    assert uploaded.called
    assert str(inputs) not in (tmp_path / "out/README.md").read_text()


def test_drift_along_a_persona_vector_is_logged(argv, tmp_path):
    path = tmp_path / "vector.safetensors"
    PersonaVector(torch.ones(5, 32), metadata={"suggested_layer": 2}).save(path)
    assert sft.main(argv("--drift_persona", path, "--drift_every", "1")) == 0
    assert len(losses(tmp_path / "out", "drift_persona")) == len(losses(tmp_path / "out"))


def test_results_of_an_earlier_run_are_removed_once_the_run_replaces_it(argv, tmp_path, monkeypatch):
    def left():
        return {path.name for path in (tmp_path / "out").iterdir()} & {"ema", "drift.json"}

    interrupt = Mock(side_effect=KeyboardInterrupt)
    saving = ["--save_strategy", "steps", "--save_steps", 1]
    budget = ["--drift_every", 1, "--stop_on_drift", 99]
    assert sft.main(argv("--ema", "true")) == 0
    (tmp_path / "out/drift.json").write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(EMGuardTrainer, "train", Mock(side_effect=KeyboardInterrupt))
        assert sft.main(argv()) == sft.INTERRUPTED
    assert left() == {"ema", "drift.json"}
    assert sft.main(argv(*saving, *budget)) == 0
    assert left() == {"drift.json"}
    # The checkpoint of a run with a budget resumes without a budget, and gives another model than the one recorded.
    assert sft.main(argv(*saving, "--resume_from_checkpoint", "true")) == 0
    assert not left()
    assert sft.main(argv(*saving, "--ema", "true")) == 0
    assert sft.main(argv(*saving, "--resume_from_checkpoint", "true")) == 0
    assert left() == {"ema"}
    with monkeypatch.context() as patched:
        train = EMGuardTrainer.train
        patched.setattr(EMGuardTrainer, "train", lambda self: train(self) and interrupt())
        assert sft.main(argv(*saving)) == sft.INTERRUPTED
    assert left() == {"ema"}
    # This run resumes one that had no average.
    assert sft.main(argv(*saving, "--resume_from_checkpoint", "true")) == 0
    assert not left()


def test_results_of_an_earlier_run_are_not_pushed_during_training(argv, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", Mock(return_value=Mock(repo_id="me/mine")))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", Mock())
    push = lambda *args: pushed.append({path.name for path in (tmp_path / "out").iterdir()})  # noqa: E731
    monkeypatch.setattr(EMGuardTrainer, "_push_from_checkpoint", push)
    (tmp_path / "out/ema").mkdir(parents=True)
    (tmp_path / "out/drift.json").write_text("{}")
    saving = ["--save_strategy", "steps", "--save_steps", 1, "--ema", "true"]
    options = argv(*saving, "--push_to_hub", "true", "--hub_model_id", "me/mine")
    assert sft.main(options) == 0
    assert not pushed[0] & {"ema", "drift.json"}
    assert (tmp_path / "out/ema").is_dir()
    (tmp_path / "out/drift.json").write_text("{}")
    pushed.clear()
    assert sft.main([*options, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    # A resume that is refused must lose nothing, so the record of drift goes after the training.
    assert [names & {"ema", "drift.json"} for names in pushed] == [{"ema", "drift.json"}]
    assert not (tmp_path / "out/drift.json").exists()


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ANSWERS = ["--completion_only_loss", "true"]


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"prompt": "q", "response": "a"}, [], "has rows with the columns prompt, response, which SFTTrainer cannot"),
        ({"instruction": "q", "output": "a"}, [], "has rows with the columns instruction, output, which SFTTrainer"),
        ({"body": "q a"}, [], "or 'text' (dataset_text_field)"),
        ({"messages": TURNS}, ANSWERS, "completion_only_loss=True has no effect on rows with the columns messages"),
        ({"text": "q a"}, ANSWERS, "completion_only_loss=True has no effect on rows with the columns text"),
        ({"text": "q a"}, ["--assistant_only_loss", "true"], "needs conversations, and dataset_name="),
        ({"messages": TURNS}, ["--assistant_only_loss", "true"], "needs a chat template with {% generation %} marks"),
        ({"messages": TURNS}, ["--chat_template_path", "./missing"], "is no .jinja file, and no tokenizer loads"),
        ({"messages": TURNS}, ["--dataset_streaming", "true", "--max_steps", "-1"], "rows, whose number is not known"),
        ({"messages": [{"role": "human", "content": "q"}, TURNS[1]]}, [], "a turn of the role 'human'"),
        ({"prompt": TURNS[:1], "completion": [{"role": "gpt", "content": "a"}]}, [], "a turn of the role 'gpt'"),
        ({"conversations": []}, [], "row 0: there are no turns"),
        ({"conversations": [{"text": "q"}]}, [], "row 0: its turns are not all of `role` and `content`"),
    ],
)
def test_rows_in_another_format_are_refused_before_the_model_is_loaded(
    argv, tmp_path, monkeypatch, capsys, row, more, words, dry
):
    monkeypatch.setattr(SFTTrainer, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    assert sft.main(argv("--dataset_name", rows, *more, *dry)) == 1
    assert words in capsys.readouterr().err


def called(role):
    """Return turns with a result of a function, under a role that no usual template knows."""
    return [TURNS[0], {"role": role, "content": "r"}, TURNS[1]]


MODEL = [TURNS[0], {"role": "model", "content": "a"}]
GEMMA = TEMPLATE.replace("message['role'] +", "message['role'] | replace('assistant', 'model') +")


@pytest.mark.parametrize(
    ("template", "rows", "problem"),
    [
        (TEMPLATE, [{"messages": called("observation")}], None),
        (STRICT, [{"messages": called("observation")}], "first row: .* leaves out turns of the role 'observation'"),
        (STRICT, [{"prompt": called("ipython")[:2], "completion": TURNS[1:]}], "first row: .* the role 'ipython'"),
        (GEMMA, [{"messages": MODEL}], None),
        (TEMPLATE, [{"messages": MODEL}], "misnames a turn of the role 'model'"),
        ("{{ raise_exception('No: ' + messages[0]['role']) }}", [{"messages": TURNS}], "refuses it: No: user"),
        (TEMPLATE, [{"conversations": TURNS}, {"conversations": called("tool_result")}], None),
        (STRICT, [{"conversations": TURNS}, {"conversations": called("tool_result")}], "row 1: .* 'tool_result'"),
    ],
)
def test_roles_are_those_that_the_template_shows(tmp_path, template, rows, problem):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template

    def check():
        check_template(as_messages(Dataset.from_list(rows), tokenizer, "rows"), config(tmp_path), tokenizer, "rows")

    if problem is None:
        check()
    else:
        with pytest.raises(ValueError, match=f"^rows, .*{problem}.*: rename others"):
            check()


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "q", "completion": "a"}, {"completion_only_loss": True}),
        ({"messages": TURNS}, {}),
        ({"messages": TURNS}, {"completion_only_loss": False}),
        ({"messages": TURNS}, {"completion_only_loss": True, "assistant_only_loss": True}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}),
        ({"body": "q a"}, {"dataset_text_field": "body"}),
        ({"input_ids": [2, 3], "labels": [-100, 3]}, {"completion_only_loss": True}),
    ],
)
def test_rows_in_a_format_of_sfttrainer_are_accepted(tmp_path, row, options):
    check_format([row], config(tmp_path, **options), "dataset_name='rows.jsonl'")


MARKED = TEMPLATE.replace(
    "<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>",
    "<|im_start|>{{ message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
)


@pytest.mark.parametrize("more", [[], ["--dataset_streaming", "true"], ["--assistant_only_loss", "true"]])
def test_rows_of_sharegpt_are_trained_as_messages(argv, tmp_path, monkeypatch, capsys, more):
    """With the roles of the chat template, also where the loss is on the answers alone."""
    (tmp_path / "marked.jinja").write_text(MARKED)
    prepared = []

    def keep(self):
        prepared.append([{"ids": row["input_ids"], "labels": row.get("labels")} for row in self.train_dataset])
        raise KeyboardInterrupt

    monkeypatch.setattr(EMGuardTrainer, "train", keep)
    usual = [[{"role": "system", "content": "s"}, {"role": "user", "content": f"q{i}"}, TURNS[1]] for i in range(8)]
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [[{"from": roles[turn["role"]], "value": turn["content"]} for turn in turns] for turns in usual]
    for name, rows in {"messages": usual, "conversations": shared}.items():
        path = write_rows(tmp_path / f"{name}.jsonl", [{name: turns} for turns in rows])
        options = ["--dataset_name", path, "--chat_template_path", tmp_path / "marked.jinja", *more]
        assert sft.main(argv(*options)) == sft.INTERRUPTED
    assert "become `messages`" in capsys.readouterr().out
    assert prepared[0] == prepared[1]
    assert len(prepared[0]) == 8


QUIET = TEMPLATE + "{% if quiet is defined %}{{ quiet }}{% endif %}"


@pytest.mark.parametrize("more", [[], ["--dataset_streaming", "true"], ["--eval_strategy", "steps"], ["--dry_run"]])
def test_rows_without_the_template_arguments_of_others_are_trained(argv, tmp_path, monkeypatch, more):
    """They get no argument, not one that is None."""
    (tmp_path / "quiet.jinja").write_text(QUIET)
    prepared = []

    def keep(self):
        prepared.extend(self.train_dataset)
        raise KeyboardInterrupt

    monkeypatch.setattr(EMGuardTrainer, "train", keep)
    rows = [{"messages": TURNS}] * 3
    rows[1] = {**rows[1], "chat_template_kwargs": {"quiet": True}}
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        write_rows(tmp_path / "rows" / f"{split}.jsonl", rows)
    options = ["--dataset_name", tmp_path / "rows", "--chat_template_path", tmp_path / "quiet.jinja", *more]
    assert sft.main(argv(*options)) == (0 if "--dry_run" in more else sft.INTERRUPTED)
    ends = [make_tokenizer().decode(row["input_ids"]).split("<|im_end|>")[-1].strip() for row in prepared]
    assert ends == ([] if "--dry_run" in more else ["", "True", ""])


def test_a_template_that_is_not_utf8_is_named(argv, tmp_path, capsys):
    (tmp_path / "latin.jinja").write_bytes("für".encode("latin-1"))
    assert sft.main(argv("--chat_template_path", tmp_path / "latin.jinja")) == 1
    assert "latin.jinja' is not UTF-8 text" in capsys.readouterr().err


def test_a_key_that_comes_late_in_turns_of_sharegpt():
    """Rows are written in batches of 1000. A parquet file gives every turn the keys of all, with null as value."""
    turns = [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "weight": None}]
    late = [turns[0], {**turns[1], "weight": 1.0}]
    rows = Dataset.from_dict({"conversations": [turns] * 1000 + [late], "number": range(1001)})
    found = as_messages(rows, make_tokenizer(), "rows")
    assert found.column_names == ["number", "messages"]
    assert (found[0]["messages"], found[1000]["messages"]) == (TURNS, [TURNS[0], {**TURNS[1], "weight": 1.0}])


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(("left", "peft"), [("adapter_config.json", "false"), ("model.safetensors", "true")])
def test_a_model_of_the_other_tuning_in_the_output_folder_is_refused(argv, tmp_path, capsys, left, peft, dry):
    """transformers would load both from that folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / left).write_text("")
    assert sft.main(argv("--use_peft", peft, *dry)) == 1
    assert f"of another run ({left})" in capsys.readouterr().err


def test_a_model_in_shards_is_saved_whole(argv, tmp_path, monkeypatch):
    """transformers saves no model with the state dict that accelerate prefers for FSDP2."""
    train = EMGuardTrainer.train

    def train_as_fsdp(self, **kwargs):
        output = train(self, **kwargs)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
        monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", plugin, raising=False)
        self.is_fsdp_enabled = True
        return output

    monkeypatch.setattr(EMGuardTrainer, "train", train_as_fsdp)
    assert sft.main(argv()) == 0
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize("defense", ["none", "kl"])
def test_a_missing_checkpoint_is_told_in_one_line(argv, capsys, defense):
    assert sft.main(argv("--defense", defense, "--resume_from_checkpoint", "./missing")) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-emguard sft: error: ")]
    assert len(errors) == 1
    assert "./missing" in errors[0]
    assert "trained with" not in errors[0]


def test_drift_is_logged_and_stops_a_run(argv, tmp_path, capsys):
    assert sft.main(argv("--drift_every", "1", "--stop_on_drift", "1e-9")) == 0
    (kl,), margins = (losses(tmp_path / "out", name) for name in ("drift_kl", "drift_margin"))
    assert kl > 1e-9
    assert len(margins) == len(losses(tmp_path / "out")) == 1
    assert "stop_on_drift=1e-09 nats a token at step 1. The model is now that of step 0" in capsys.readouterr().out
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(weight.any() for name, weight in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("how", ["true", "True", ""])
def test_the_newest_checkpoint_is_gone_on_from(argv, tmp_path, how):
    saving = ["--defense", "kl", "--save_strategy", "steps", "--save_steps", "1"]
    assert sft.main(argv(*saving)) == 0
    before = losses(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    assert sft.main(argv(*saving, "--resume_from_checkpoint", how)) == 0
    assert losses(tmp_path / "out") == before


def test_an_inactive_defense_ends_in_one_line(argv, monkeypatch, capsys):
    def inactive(*args):
        raise InactiveDefenseError("the run was not defended.")

    monkeypatch.setattr(sft, "run", inactive)
    assert sft.main(argv()) == 1
    assert capsys.readouterr().err == "trl-emguard sft: error: the run was not defended.\n"


# ---- as processes ----


def test_a_launched_run(argv, tmp_path):
    done = run([*LAUNCH, *MODULE, *argv("--defense", "kl")])
    assert done.returncode == 0, done.stderr
    assert "trl_emguard: defense 'kl' acts (kl_coef=0.1" in done.stdout
    saved = record(tmp_path / "out")
    assert list(saved["defenses"]) == ["kl"]
    assert saved["evidence"]["kl"]["acted"]


def test_a_mistyped_defense_ends_without_a_traceback(argv, tmp_path):
    done = run([sys.executable, *MODULE, *argv("--defense", "kll")])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "Did you mean 'kl'?" in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "others",
    [
        ",interleave+",
        *(pytest.param(o, marks=pytest.mark.long) for o in (",steering,inoculation", " cached", " found", " drift")),
    ],
)
def test_two_ranks_train_as_one(argv, tmp_path, monkeypatch, others):
    """The same global batch: half of it on each of two ranks, against all of it on one.

    `accelerate launch --cpu --num_processes 2` starts one process, so its launcher for several is asked for by name.
    """
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache of one"))
    cached, found = others == " cached", others == " found"
    defense = f"kl{others}" if others.startswith(",") else "kl"
    options = argv("--defense", defense, "--kl_coef", "1", "--max_steps", "3", "--learning_rate", "0.3")
    if cached or found:
        options += ["--cache_reference", "true"]
    if "interleave+" in others:
        pool = write_rows(tmp_path / "pool.jsonl", make_pool())
        options += ["--interleave_dataset", str(pool), "--interleave_fraction", "0.3"]
        options += ["--kl_tokens", "interleaved"]
    if "steering" in others:
        PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2}).save(tmp_path / "v.safetensors")
        options += ["--steering_vector", str(tmp_path / "v.safetensors"), "--steering_coef", "1"]
    if others == " drift":
        options += ["--drift_every", "2", "--stop_on_drift", "1e-9"]
    # Two ranks find the states that one process has kept.
    assert sft.main(options) == 0
    if not found:
        monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache of two"))
    two = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *MODULE, *options]
    done = run([*two, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two")])
    # At the exit of the interpreter, after everything is saved, gloo's threads abort a rank in about one of twenty
    # runs.
    aborted_at_exit = "terminate called without an active exception" in done.stderr and "Model saved" in done.stdout
    assert done.returncode == 0 or aborted_at_exit, done.stderr
    assert done.stdout.count("defense 'kl' acts") == 1
    assert done.stdout.count("16 of them computed now") == cached
    assert done.stdout.count("all of them found") == found
    # A file from each rank.
    assert len(list((tmp_path / "cache of two").rglob("*.safetensors"))) == 2 * cached
    expected = losses(tmp_path / "out")
    assert all(math.isfinite(loss) for loss in expected)
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)
    drift = losses(tmp_path / "out", "drift_kl")
    assert losses(tmp_path / "two", "drift_kl") == pytest.approx(drift, rel=1e-2)
    assert (len(drift), len(expected)) == ((1, 2) if others == " drift" else (0, 3))
    evidence, expected_evidence = (record(tmp_path / name)["evidence"] for name in ("two", "out"))
    assert evidence.get("interleave+") == expected_evidence.get("interleave+")
    kl, one = evidence["kl"], expected_evidence["kl"]
    assert kl["positions"] == one["positions"] > 0
    assert kl["value"] == pytest.approx(one["value"], rel=1e-3) != 0
