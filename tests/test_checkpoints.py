"""What is saved, and going on from it."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import logged, lora, make_model, make_trainer
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from trl_emguard.evidence import read_defense_file


IDS = torch.tensor([[9, 8, 7, 6, 5, 4]])
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}


def trainer_for(tmp_path, tuning="lora", **options):
    model, peft = make_model(), None
    if tuning == "lora":
        peft = lora(lora_dropout=0.1)
    elif tuning == "pissa":
        torch.manual_seed(2)
        model = get_peft_model(model, lora(init_lora_weights=False))
    return make_trainer(tmp_path, model, peft=peft, **{"defense": "kl,ldifs", **SAVING, **options})


@pytest.mark.parametrize("tuning", ["lora", "pissa", "full"])
def test_a_checkpoint_is_the_policy_alone_and_loads_in_plain_libraries(tmp_path, tuning):
    trainer = trainer_for(tmp_path, tuning)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        expected = trainer.model.eval()(IDS).logits
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        names = {path.name for path in folder.iterdir()}
        assert "ref" not in names
        if tuning == "full":
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            assert set(load_file(folder / "model.safetensors")) <= set(make_model().state_dict())
        else:
            stored = load_file(folder / "adapter_model.safetensors")
            assert not [name for name in stored if "ref" in name.split(".")]
            loaded = PeftModel.from_pretrained(make_model(), folder)
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tuning", ["lora", "pissa", "full"])
def test_resume_equals_the_run_that_never_stopped(tmp_path, tuning):
    whole = trainer_for(tmp_path / "whole", tuning)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", tuning)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key in ("loss", "loss_ce", "kl", "ldifs", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key)
    assert resumed._ledger.state() == whole._ledger.state()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("defense", ["none", "kl", "kl,ldifs"])
def test_defense_file(tmp_path, defense):
    trainer = trainer_for(tmp_path, defense=defense, kl_coef=0.25)
    trainer.train()
    trainer.save_model()
    for folder, step in ((tmp_path / "checkpoint-2", 2), (tmp_path, 4)):
        record = read_defense_file(folder)
        assert record["defense"] == defense
        assert list(record["defenses"]) == [name for name in defense.split(",") if name != "none"]
        assert record["global_step"] == step
        for name, options in record["defenses"].items():
            assert options == {d.name: d.options() for d in trainer.defenses}[name]
            assert record["evidence"][name]["acted"] is True
            assert record["evidence"][name]["positions"] > 0
    if "kl" in defense:
        assert record["defenses"]["kl"]["kl_coef"] == 0.25


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"defense": "kl"}, {"defense": "none"}),
        ({"defense": "none"}, {"defense": "kl"}),
        ({"defense": "kl"}, {"defense": "ldifs"}),
        ({"defense": "kl"}, {"defense": "kl,ldifs"}),
        ({"defense": "kl"}, {"defense": "kl", "kl_coef": 0.2}),
        ({"defense": "ldifs"}, {"defense": "ldifs", "ldifs_layers": "1"}),
    ],
)
def test_resuming_with_another_defense_is_refused(tmp_path, then, now):
    trainer_for(tmp_path, **then).train()
    with pytest.raises(ValueError, match=r"was trained with .*, and this run has .*[Rr]esume with the same"):
        trainer_for(tmp_path, **now).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_resuming_with_the_checkpoint_as_model_is_refused(tmp_path, tuning):
    """The half-trained policy would become the reference, and KL would start at 0 again."""
    trainer = trainer_for(tmp_path, tuning)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    if tuning == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(make_model(), folder, is_trainable=True)
    again = make_trainer(tmp_path, model, **{"defense": "kl,ldifs", **SAVING})
    with pytest.raises(ValueError, match=r"held to another reference .* Resume with the model that training started from"):
        again.train(resume_from_checkpoint=str(folder))


def test_the_same_layers_in_another_form_are_the_same_defense(tmp_path):
    trainer_for(tmp_path, ldifs_layers="[2, 4]").train()
    for layers in ((4, 2), [2, 4], "2,4"):
        trainer_for(tmp_path, ldifs_layers=layers)._check_resume(tmp_path / "checkpoint-2")


def test_resume_from_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint='.*missing' is not a folder"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "missing"))


def test_coefficient_zero_resumes_a_plain_run(tmp_path):
    trainer_for(tmp_path, defense="none").train()
    trainer_for(tmp_path, defense="kl", kl_coef=0.0).train(resume_from_checkpoint=True)


def test_a_plain_trainers_checkpoint_is_no_defended_one(tmp_path):
    stock = SFTTrainer(
        make_model(),
        trainer_for(tmp_path, defense="none").args,
        train_dataset=trainer_for(tmp_path).train_dataset,
        processing_class=trainer_for(tmp_path).processing_class,
        peft_config=lora(),
    )
    stock.train()
    with pytest.raises(ValueError, match="was trained with no defense, and this run has kl"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)
    trainer_for(tmp_path, defense="none").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"defenses": 3}', '{"defenses": {}}', "\x00"])
def test_a_damaged_defense_file_is_refused(tmp_path, content):
    trainer_for(tmp_path).train()
    (tmp_path / "checkpoint-4" / "defense.json").write_text(content)
    with pytest.raises(ValueError, match=r"defense.json is damaged .*Resume from another checkpoint"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("defense", ["none", "kl", "kl,ldifs"])
def test_model_card_names_defense_coefficient_and_paper(tmp_path, defense):
    trainer = trainer_for(tmp_path, defense=defense, kl_coef=0.25)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Defense against emergent misalignment") == 1
    if defense == "none":
        assert "None: plain supervised fine-tuning." in card
    else:
        assert "`kl`: `kl_coef=0.25`" in card
        assert "https://arxiv.org/abs/2508.06249" in card
    assert ("https://arxiv.org/abs/2308.13320" in card) == ("ldifs" in defense)
    assert "### Framework versions" in card
    json.dumps(trainer._record())
