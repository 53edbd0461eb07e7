"""Weights of a model, read one by one from its folder."""

import json

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import make_model

from trl_emguard.models.shipped import SMOLLM2
from trl_emguard.models.weight_files import WeightFiles


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "20KB"}])
def test_every_weight_is_read(tmp_path, saving):
    model = make_model("qwen2", torch.bfloat16)
    model.save_pretrained(tmp_path, **saving)
    files = WeightFiles("base", str(tmp_path))
    assert (files.model_type, files.name) == ("qwen2", tmp_path.name)
    assert files.stored.keys() == model.state_dict().keys()
    assert (len({stored.file for stored in files.stored.values()}) > 1) == bool(saving)
    for name, weight in model.state_dict().items():
        assert torch.equal(files.read(name), weight)
        assert files.stored[name].shape == tuple(weight.shape)


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path):
    model = make_model("qwen2")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    fingerprint = WeightFiles("base", str(tmp_path / "one")).fingerprint()
    assert WeightFiles("base", str(tmp_path / "many")).fingerprint() == fingerprint
    path = tmp_path / "one" / "model.safetensors"
    whole = load_file(path)
    for name in whole:
        changed = {key: weight.clone() for key, weight in whole.items()}
        changed[name].view(-1)[0] += 1
        save_file(changed, path)
        assert WeightFiles("base", str(tmp_path / "one")).fingerprint() != fingerprint
    save_file({**whole, "scalar": torch.tensor(1.0)}, path)
    assert WeightFiles("base", str(tmp_path / "one")).fingerprint() != fingerprint


def test_a_shipped_name_and_a_hub_id_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path))
    make_model().save_pretrained(tmp_path / SMOLLM2)
    assert WeightFiles("aligned", SMOLLM2).name == SMOLLM2
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--some--model"
    make_model().save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert WeightFiles("base", "some/model").name == "some/model"
    for missing in ("other/model", "no/such/model"):
        with pytest.raises(FileNotFoundError, match=f"base '{missing}' is neither a folder on this machine nor in"):
            WeightFiles("base", missing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "damaged model"),
        ("{}", "damaged model"),
        (json.dumps({"weight_map": {"a": "../other.safetensors"}}), "damaged model"),
        (json.dumps({"weight_map": {"a": 3}}), "damaged model"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors is missing or damaged"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, text, message):
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"base .*{message}"):
        WeightFiles("base", str(tmp_path))
