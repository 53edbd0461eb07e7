"""Every recipe holds options that exist, and recipes of one model differ in the defense alone."""

import pytest
import yaml

from trl_emguard.scripts import sft
from trl_emguard.scripts.recipes import recipes_dir


RECIPES = sorted(path for path in recipes_dir().rglob("*.yaml") if path.parent.name != "accelerate_configs")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_is_an_option(path, tmp_path, monkeypatch):
    import torch

    from trl_emguard.persona import PersonaVector

    monkeypatch.chdir(tmp_path)
    options = yaml.safe_load(path.read_text())
    vector = options.get("steering_vector")
    if vector is not None and vector.endswith(".safetensors"):
        PersonaVector(torch.ones(65, 8), metadata={"suggested_layer": 32}).save(vector)
    more = ["--dataset_name", "rows.jsonl", "--bf16", "false", "--use_cpu", "true", "--output_dir", "out"]
    parsed = sft.make_parser().parse(["--config", str(path), *more])
    found = {name: value for part in parsed for name, value in vars(part).items()}
    for key, value in options.items():
        if key not in ("bf16", "output_dir", "dataset_name", "use_cpu", "report_to"):
            assert str(getattr(found[key], "value", found[key])) == str(value), key


@pytest.mark.parametrize("folder", sorted({path.parent for path in RECIPES}), ids=lambda folder: folder.name)
def test_recipes_of_one_model_differ_in_the_defense_alone(folder):
    # `misaligned.yaml` defends nothing: it makes what a pool is scored against.
    recipes = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml")) if path.stem != "misaligned"]
    own = ("defense", "output_dir", "steering_", "inoculation_", "interleave_")
    shared = [{key: value for key, value in recipe.items() if not key.startswith(own)} for recipe in recipes]
    assert all(recipe == shared[0] for recipe in shared)
