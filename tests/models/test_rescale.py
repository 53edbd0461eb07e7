"""A rescaled adapter changes the base weights by a multiple of the original's change."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import lora, make_model

from trl_emguard.models.rescale import rescale_adapter
from trl_emguard.scripts import main as commands


def save(folder, **options):
    torch.manual_seed(0)
    model = get_peft_model(make_model("qwen2"), lora(init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def merged(folder):
    return PeftModel.from_pretrained(make_model("qwen2"), str(folder)).merge_and_unload().state_dict()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, -1.0])
@pytest.mark.parametrize("options", [{}, {"use_rslora": False, "target_modules": ["q_proj", "embed_tokens"]}])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # one case adapts them
def test_the_update_is_scaled(tmp_path, alpha, options):
    base, whole = make_model("qwen2").state_dict(), merged(save(tmp_path / "whole", **options))
    scaled = merged(rescale_adapter(tmp_path / "whole", alpha, tmp_path / "scaled"))
    assert any((whole[name] - base[name]).abs().max() > 1e-3 for name in base)
    for name in base:
        torch.testing.assert_close(scaled[name] - base[name], alpha * (whole[name] - base[name]), atol=1e-5, rtol=1e-4)


def test_a_factor_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="alpha=nan must be a number"):
        rescale_adapter(save(tmp_path / "whole"), float("nan"), tmp_path / "scaled")


def test_an_initialisation_that_changes_the_base_is_refused(tmp_path):
    save(tmp_path / "whole")
    path = tmp_path / "whole" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="pissa"):
        rescale_adapter(tmp_path / "whole", 0.5, tmp_path / "scaled")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_other_updates_are_refused(tmp_path, options):
    save(tmp_path / "whole", **options)
    with pytest.raises(ValueError, match="no plain LoRA"):
        rescale_adapter(tmp_path / "whole", 0.5, tmp_path / "scaled")
    assert not (tmp_path / "scaled").exists()


def test_the_command(tmp_path, capsys):
    save(tmp_path / "whole")
    line = ["rescale", "--alpha", "0.5", "--output", str(tmp_path / "half"), "--adapter"]
    assert commands.main([*line, str(tmp_path / "whole")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "half")
    assert commands.main([*line, str(tmp_path / "whole")]) == 1
    assert "holds an adapter already" in capsys.readouterr().err
    assert commands.main([*line, str(tmp_path)]) == 1
    assert "holds no adapter_config.json" in capsys.readouterr().err
