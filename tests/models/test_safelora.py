"""SafeLoRA against a dense float64 reference, its memory, its record, and what it refuses."""

import json
import shutil
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import lora, make_model
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from trl_emguard.models.safelora import project_adapter
from trl_emguard.scripts import main as commands


WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "safelora.json"


def fresh(architecture="qwen2", **overrides):
    if architecture != "gpt2":
        return make_model(architecture, **overrides)
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_inner=48, n_positions=64))


def align(model, blocks=(0, 2)):
    """Change every weight, in some blocks along one direction alone, so that updates there are far from it."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            change = torch.randn(weight.shape) * 0.1
            if weight.dim() == 2 and any(f".{block}." in name for block in blocks):
                change = torch.outer(change[:, 0], change[0])
            weight.add_(change.to(weight.dtype))
    return model


@pytest.fixture
def pair(tmp_path):
    return save_pair(tmp_path)


def save_pair(folder, architecture="qwen2", dtype=torch.float32, **saving):
    fresh(architecture).to(dtype).save_pretrained(folder / "base", **saving)
    align(fresh(architecture).to(dtype)).save_pretrained(folder / "aligned", **saving)
    return folder


def save_adapter(folder, architecture="qwen2", std=0.1, **options):
    torch.manual_seed(3)
    model = get_peft_model(fresh(architecture), lora(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder / "adapter")


def project(folder, adapter="adapter", output="output", **options):
    base, aligned = (str(folder / options.pop(name, name)) for name in ("base", "aligned"))
    return project_adapter(folder / adapter, base, aligned, folder / output, **options)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def dense(a, b, base, aligned):
    """Return C·B, the cosine and the ratio of norms by the paper's formula, from dense matrices in float64."""
    a, b, v = a.double(), b.double(), aligned.double() - base.double()
    c = v @ v.T / v.norm()
    before, after = b @ a, c @ b @ a
    cosine = cosine_similarity(after.flatten(), before.flatten(), dim=0)
    return c @ b, cosine.item(), (after.norm() / before.norm()).item()


@pytest.mark.parametrize(
    ("architecture", "dtype", "saving"),
    [
        ("qwen2", torch.float32, {}),
        ("llama", torch.bfloat16, {"max_shard_size": "20KB"}),
        ("gpt_neox", torch.float16, {}),
        ("gpt2", torch.float32, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT sets it for GPT-2
def test_the_projection_equals_the_dense_one(tmp_path, architecture, dtype, saving):
    save_pair(tmp_path, architecture, dtype, **saving)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == bool(saving)
    save_adapter(tmp_path, architecture)
    found = project(tmp_path, threshold=0.4)
    models = [fresh(architecture).to(dtype), align(fresh(architecture).to(dtype))]
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "output"))
    assert old.keys() == new.keys()
    assert len(found.layers) == len(old) // 2
    assert {layer.is_projected for layer in found.layers} == {True, False}
    for layer in found.layers:
        key_a, key_b = (f"base_model.model.{layer.name}.lora_{factor}.weight" for factor in "AB")
        base, aligned = (model.get_parameter(f"{layer.name}.weight").detach() for model in models)
        if architecture == "gpt2":
            base, aligned = base.T, aligned.T
        projected, cosine, ratio = dense(old[key_a], old[key_b], base, aligned)
        assert layer.cosine == pytest.approx(cosine, abs=1e-12)
        assert layer.ratio == pytest.approx(ratio, rel=1e-12)
        assert layer.is_projected == (cosine <= 0.4)
        assert torch.equal(new[key_a], old[key_a])
        if layer.is_projected:
            torch.testing.assert_close(new[key_b], projected.float(), atol=1e-8, rtol=1e-6)
        else:
            assert torch.equal(new[key_b], old[key_b])


@pytest.mark.parametrize("options", [{}, {"use_rslora": False, "lora_alpha": 3, "alpha_pattern": {"q_proj": 7}}])
def test_the_merged_update_is_projected_whatever_its_scale(pair, options):
    save_adapter(pair, **options)
    project(pair, threshold=1)
    base, aligned = fresh().state_dict(), align(fresh()).state_dict()
    before, after = (
        PeftModel.from_pretrained(align(fresh()), str(pair / name)).merge_and_unload().state_dict()
        for name in ("adapter", "output")
    )
    layers = [layer["name"] for layer in json.loads((pair / "output" / RECORD).read_text())["layers"]]
    assert len(layers) == 28
    for name in (f"{layer}.weight" for layer in layers):
        v = aligned[name] - base[name]
        expected = v @ v.T / v.norm() @ (before[name] - aligned[name])
        torch.testing.assert_close(after[name] - aligned[name], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_a_threshold_below_every_cosine(pair, dtype):
    save_adapter(pair)
    path = pair / "adapter" / WEIGHTS
    save_file({name: w.to(dtype) for name, w in load_file(path).items()}, path, metadata={"format": "pt"})
    found = project(pair, threshold=-1)
    assert not any(layer.is_projected for layer in found.layers)
    for name in (WEIGHTS, CONFIG):
        assert (pair / "output" / name).read_bytes() == (pair / "adapter" / name).read_bytes()


def test_a_projected_adapter_is_copied_unchanged(pair):
    save_adapter(pair)
    first = project(pair, threshold=1)
    assert any(layer.is_projected for layer in first.layers)
    assert project(pair, "output", "again", threshold=1) == first
    names = sorted(path.name for path in (pair / "output").iterdir())
    assert names == [CONFIG, WEIGHTS, RECORD]
    for name in names:
        assert (pair / "again" / name).read_bytes() == (pair / "output" / name).read_bytes()
    # Without its record, the same adapter would be projected a second time.
    (pair / "output" / RECORD).unlink()
    project(pair, "output", "twice", threshold=1)
    assert (pair / "twice" / WEIGHTS).read_bytes() != (pair / "output" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("other", [{"threshold": 0.5}, {"base": "aligned", "aligned": "base"}])
def test_a_projected_adapter_is_not_projected_otherwise(pair, other):
    save_adapter(pair)
    project(pair)
    with pytest.raises(ValueError, match=r"projected already \(base 'base', aligned 'aligned', threshold 0\.3\)"):
        project(pair, "output", "again", **other)


def test_a_record_of_other_weights_is_refused(pair):
    save_adapter(pair)
    project(pair)
    shutil.copy(pair / "adapter" / WEIGHTS, pair / "output" / WEIGHTS)
    with pytest.raises(ValueError, match="is not of the weights beside it"):
        project(pair, "output", "again")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"layers": [{}]}', '{"layers": [], "threshold": 0.3}'])
def test_a_damaged_record_is_refused(pair, text):
    save_adapter(pair)
    (pair / "adapter" / RECORD).write_text(text)
    with pytest.raises(ValueError, match=r"safelora.json is damaged"):
        project(pair)


def test_the_record_names_what_was_read_without_paths(pair):
    save_adapter(pair)
    project(pair)
    text = (pair / "output" / RECORD).read_text()
    assert str(pair) not in text
    record = json.loads(text)
    assert [record[key]["name"] for key in ("base", "aligned", "adapter")] == ["base", "aligned", "adapter"]
    assert record["base"]["fingerprint"] != record["aligned"]["fingerprint"]
    assert record["adapter"]["fingerprint"] != record["weights"]
    assert record["threshold"] == 0.3
    assert record["layers"][0].keys() == {"name", "cosine", "ratio", "is_projected"}


def test_an_untrained_layer_is_left_alone(pair):
    save_adapter(pair)
    path = pair / "adapter" / WEIGHTS
    zeroed = {name: w * 0 if "layers.1." in name and "lora_B" in name else w for name, w in load_file(path).items()}
    save_file(zeroed, path)
    for layer in project(pair, threshold=1).layers:
        assert layer.is_projected == ("layers.1." not in layer.name)
        assert (layer.cosine is None) == (layer.ratio is None) == ("layers.1." in layer.name)


def test_an_update_without_any_of_the_direction_becomes_zero(tmp_path):
    save_pair(tmp_path)
    save_adapter(tmp_path, target_modules=["q_proj"])
    # The alignment changed the first row alone, and the update all others.
    tuned = fresh().state_dict()
    for name in tuned:
        if "q_proj.weight" in name:
            tuned[name][0] += 1
    save_file(tuned, tmp_path / "aligned" / "model.safetensors")
    path = tmp_path / "adapter" / WEIGHTS
    weights = load_file(path)
    for name in weights:
        if "lora_B" in name:
            weights[name][0] = 0
    save_file(weights, path)
    assert [layer.cosine for layer in project(tmp_path, threshold=0).layers] == [0.0] * 4
    projected = load_file(tmp_path / "output" / WEIGHTS)
    assert not any(weight.any() for name, weight in projected.items() if "lora_B" in name)


class Watch(TorchDispatchMode):
    """Largest tensor in fp64, and the most numbers in fp64 that were held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.largest, self.most = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.largest = max(self.largest, tensor.numel())
                self.held.append(weakref.ref(tensor))
        alive = [tensor for tensor in (ref() for ref in self.held) if tensor is not None]
        self.most = max(self.most, sum({t.untyped_storage().data_ptr(): t.numel() for t in alive}.values()))
        return result


def test_one_layer_is_held_at_a_time(pair):
    save_adapter(pair)
    with Watch() as watch:
        project(pair, threshold=1)
    # The widest layer is 48 x 32, and C would be 48 x 48.
    assert watch.largest == 48 * 32
    assert watch.most == 2 * 48 * 32


# ---- what is refused ----


def drop_layer(folder):
    path = folder / "base" / "model.safetensors"
    save_file({name: w for name, w in load_file(path).items() if "layers.3.mlp.up_proj" not in name}, path)


def other_names(folder):
    """Name the weights as the files of some models do, whose weights are renamed when they are loaded."""
    for model in ("base", "aligned"):
        path = folder / model / "model.safetensors"
        save_file({f"language_model.{name}": weight for name, weight in load_file(path).items()}, path)


def as_bytes(folder):
    path = folder / "base" / "model.safetensors"
    save_file({name: (w * 9).to(torch.uint8) for name, w in load_file(path).items()}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_weight(folder, name, change):
    path = folder / name / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def same_layer(folder):
    key = "model.layers.2.mlp.up_proj.weight"
    weight = load_file(folder / "base" / "model.safetensors")[key]
    change_weight(folder, "aligned", lambda weights: weights.update({key: weight}))


def infinite(folder):
    change_weight(
        folder, "aligned", lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan"))
    )


def without_factor(folder):
    path = folder / "adapter" / WEIGHTS
    weights = load_file(path)
    del weights[next(name for name in weights if "lora_A" in name)]
    save_file(weights, path)


def not_finite(folder):
    path = folder / "adapter" / WEIGHTS
    weights = load_file(path)
    next(weight for name, weight in weights.items() if "lora_A" in name)[0] = float("inf")
    save_file(weights, path)


REFUSED = {
    "other shapes": (lambda f: fresh(vocab_size=300).save_pretrained(f / "base"), "'(lm_head|model.embed_tokens).w"),
    "other architecture": (lambda f: make_model("llama").save_pretrained(f / "base"), "'base' is a llama and aligned"),
    "missing layer": (drop_layer, "base 'base' holds no weight of the layer 'model.layers.3.mlp.up_proj'"),
    "other names": (other_names, "neither base 'base' nor aligned 'aligned' holds .*SafeLoRA cannot read them"),
    "quantised": (as_bytes, "as U8: name the model before its quantisation"),
    "damaged model": (lambda f: cut(f / "base" / "model.safetensors"), "model.safetensors is missing or damaged"),
    "no weights": (lambda f: (f / "base" / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no config": (lambda f: (f / "aligned" / "config.json").unlink(), "config.json cannot be read"),
    "same weights": (same_layer, "same weights in the layer 'model.layers.2.mlp.up_proj', so the direction"),
    "not finite": (infinite, "'model.layers.1.mlp.up_proj' of .* not finite"),
    "adapter not finite": (not_finite, "not finite"),
    "half a pair": (without_factor, "no fitting pair A, B"),
    "damaged adapter": (lambda f: cut(f / "adapter" / WEIGHTS), "has a damaged adapter_model.safetensors"),
    "no adapter": (lambda f: (f / "adapter" / CONFIG).unlink(), "holds no adapter_config.json"),
    "replicated": (lambda f: edit(f / "adapter" / CONFIG, layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    "full output": (lambda f: (f / "output").mkdir() or (f / "output" / "x").touch(), "not an empty folder"),
    "file as output": (lambda f: (f / "output").touch(), "not an empty folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unfit_files_are_refused(pair, name):
    save_adapter(pair)
    spoil, message = REFUSED[name]
    spoil(pair)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        project(pair)
    assert not (pair / "output" / CONFIG).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "no plain LoRA"),
        ({"bias": "lora_only"}, "no plain LoRA .*bias"),
        ({"lora_bias": True, "bias": "none"}, r"no plain LoRA of linear layers.*lora_B.bias"),
        ({"modules_to_save": ["lm_head"]}, "no plain LoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "no plain LoRA of linear layers"),
        ({"trainable_token_indices": [3]}, "no plain LoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # one case adapts them
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")  # no layer has a bias
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape:UserWarning")  # PEFT cannot load such a bias
def test_other_adapters_are_refused(pair, options, message):
    save_adapter(pair, **options)
    with pytest.raises(ValueError, match=message):
        project(pair)
    assert not (pair / "output").exists()


def test_an_adapter_of_another_model_is_refused(pair):
    get_peft_model(make_model("qwen2", hidden_size=64), lora()).save_pretrained(pair / "adapter")
    with pytest.raises(ValueError, match=r"shape \(64, 48\) in the layer 'model.layers.0.mlp.down_proj', and base"):
        project(pair)


def test_an_adapter_that_names_another_model_is_refused(pair):
    """Models of one shape cannot be told apart by their weights, as a model and its variant for code."""
    save_adapter(pair)
    edit(pair / "adapter" / CONFIG, base_model_name_or_path="org/Model-Coder")
    with pytest.raises(ValueError, match=r"was trained on 'org/Model-Coder', and aligned is .*aligned'"):
        project(pair)
    edit(pair / "adapter" / CONFIG, base_model_name_or_path="org/Aligned")
    assert project(pair).layers


@pytest.mark.parametrize("threshold", [1.1, -2, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(pair, threshold):
    save_adapter(pair)
    with pytest.raises(ValueError, match="must lie between -1 and 1"):
        project(pair, threshold=threshold)


# ---- the command ----


def test_the_command(pair, capsys):
    save_adapter(pair, target_modules=["q_proj"])
    line = ["project", "--base", str(pair / "base"), "--aligned", str(pair / "aligned"), "--threshold", "0.4"]
    line += ["--output", str(pair / "out"), "--adapter"]
    assert commands.main([*line, str(pair / "adapter")]) == 0
    said = capsys.readouterr().out
    rows = [row for row in said.splitlines() if "q_proj" in row]
    layers = json.loads((pair / "out" / RECORD).read_text())["layers"]
    assert len(rows) == len(layers) == 4
    for row, layer in zip(rows, layers, strict=True):
        numbers = [f"{layer[key]:.4f}" for key in ("cosine", "ratio")]
        cells = row.replace("│", " ").split()
        assert cells == [layer["name"], *numbers, "yes" if layer["is_projected"] else "no"]
    assert "Projected: 2 of 4 layers" in said
    assert "copied unchanged" not in said

    assert commands.main([*line, str(pair / "adapter")]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    line[line.index(str(pair / "out"))] = str(pair / "again")
    assert commands.main([*line, str(pair / "out")]) == 0
    assert "it is copied unchanged" in capsys.readouterr().out
