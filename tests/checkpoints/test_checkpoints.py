"""Checkpoints, and runs that resume from them."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from methods import COMPARING, COVERING, EVERYTHING, METHODS, run_options, split
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import Hub, logged, lora, make_model, make_rows, make_trainer, record
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from trl_emguard.checkpoints import manifest, whole
from trl_emguard.checkpoints.manifest import (
    MANIFEST,
    begin_checkpoint,
    find_flaw,
    finish_checkpoint,
)
from trl_emguard.checkpoints.resume import newest_whole_checkpoint, why_other_adapter
from trl_emguard.evidence import read_defense_file


IDS = torch.tensor([[9, 8, 7, 6, 5, 4]])
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}


def trainer_for(tmp_path, tuning="lora", defense="kl,ldifs", **options):
    model, peft = make_model(), None
    if tuning == "lora":
        peft = lora(lora_dropout=0.1)
    elif tuning == "pissa":
        torch.manual_seed(2)
        model = get_peft_model(model, lora(init_lora_weights=False))
    return make_trainer(tmp_path, model, peft=peft, **{**run_options(defense, tmp_path), **SAVING, **options})


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


@pytest.mark.parametrize(
    ("tuning", "defense"),
    [("pissa", "kl,ldifs"), ("full", "kl,ldifs"), *(("lora", defense) for defense in (*COVERING, EVERYTHING))],
)
def test_resume_equals_the_run_that_never_stopped(tmp_path, tuning, defense):
    whole, resumed = (trainer_for(tmp_path / name, tuning, defense) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key in ("loss", "loss_ce", "grad_norm", *(key for name in split(defense) for key in METHODS[name].logs)):
        assert logged(resumed, key) == logged(whole, key)
    shown, expected = record(resumed)["evidence"], record(whole)["evidence"]
    for evidence in (shown, expected):
        evidence.get("steering", {}).pop("change", None)  # the largest change of this process's run
    assert shown == expected
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("defense", COVERING)
def test_a_run_that_was_at_its_end_makes_no_step_more(tmp_path, defense):
    """Resume from a last checkpoint within an epoch. Trainer alone would train on to step 4."""
    options = {"defense": defense, "max_steps": 3, "save_steps": 3, "gradient_accumulation_steps": 1}
    whole = trainer_for(tmp_path, **options, lr_scheduler_type="constant")
    whole.train()
    again = trainer_for(tmp_path, **options, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert logged(again) == logged(whole)
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("defense", ["none", *COMPARING])
def test_defense_file(tmp_path, defense):
    trainer = trainer_for(tmp_path, defense=defense, kl_coef=0.25)
    trainer.train()
    trainer.save_model()
    for folder, step in ((tmp_path / "checkpoint-2", 2), (tmp_path, 4)):
        found = read_defense_file(folder)
        assert found["defense"] == defense
        assert list(found["defenses"]) == [name for name in defense.split(",") if name != "none"]
        assert found["global_step"] == step
        for name, options in found["defenses"].items():
            assert options == {d.name: d.options() for d in trainer.defenses}[name]
            assert found["evidence"][name]["acted"] is True
            assert found["evidence"][name]["positions"] > 0
    if "kl" in defense:
        assert found["defenses"]["kl"]["kl_coef"] == 0.25


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
    """Refuse a half-trained policy as the reference, from which KL would start at 0 again."""
    trainer = trainer_for(tmp_path, tuning)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    if tuning == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(make_model(), folder, is_trainable=True)
    again = make_trainer(tmp_path, model, **{**run_options("kl,ldifs", tmp_path), **SAVING})
    with pytest.raises(
        ValueError, match=r"held to another reference .* Resume with the model that training started from"
    ):
        again.train(resume_from_checkpoint=str(folder))


def test_the_same_layers_in_another_form_are_the_same_defense(tmp_path):
    trainer_for(tmp_path, ldifs_layers="[2, 4]").train()
    for layers in ((4, 2), [2, 4], "2,4"):
        trainer_for(tmp_path, ldifs_layers=layers).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_without_the_optimizer_resumes_at_its_learning_rate(tmp_path, caplog):
    """SGD has no state of its own, so its losses are those of the run that never stopped."""
    options = {"optim": "sgd", "warmup_steps": 2}
    whole_run = trainer_for(tmp_path, **options)
    whole_run.train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    resumed = trainer_for(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == resumed.args.max_steps > 2
    assert (logged(resumed), logged(resumed, "learning_rate")) == (
        logged(whole_run),
        logged(whole_run, "learning_rate"),
    )
    assert "has no optimizer files: the optimizer's state (Adam's moments) begins anew. The losses" in caplog.text


def test_a_checkpoint_of_the_model_alone_warns_of_the_learning_rate(tmp_path, caplog):
    trainer_for(tmp_path, save_only_model=True).train()
    trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "begins anew, and so does the learning rate with its warm-up" in caplog.text


def test_the_record_names_the_step_of_the_best_model_where_it_is_loaded(tmp_path):
    best = {"eval_dataset": make_rows(4), "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, metric_for_best_model="eval_loss", greater_is_better=True, **best)
    for _ in range(2):  # a second training has nothing of the first one
        trainer.train()
        assert (record(trainer)["global_step"], trainer.state.global_step) == (2, 4)
        assert read_defense_file(tmp_path / "checkpoint-4")["global_step"] == 4


def test_the_best_model_is_none_of_an_earlier_run(tmp_path):
    """Step 1 is the best one. It has no checkpoint of this run, but one that an earlier run wrote."""
    trainer_for(tmp_path, save_steps=1, learning_rate=1e-3).train()
    best = {"eval_dataset": make_rows(4), "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, metric_for_best_model="eval_loss", greater_is_better=True, max_steps=2, **best)
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_model_checkpoint) == (1, None)
    folder = tmp_path / "checkpoint-2"
    assert json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"] is None
    saved = load_file(folder / "adapter_model.safetensors")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(saved[name.replace(".default", "")], weight) for name, weight in trained.items())


@pytest.mark.parametrize("has_optimizer", [True, False])
def test_a_resume_names_the_settings_that_have_no_effect(tmp_path, caplog, has_optimizer):
    trainer_for(tmp_path, lr_scheduler_type="constant").train()
    if not has_optimizer:
        (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    for options in ({}, {"learning_rate": 1e-3, "weight_decay": 0.1}):
        again = trainer_for(tmp_path, lr_scheduler_type="constant", **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert logged(again, "learning_rate") == [1e-2] * 4
        assert ("learning_rate 0.01 and not 0.001" in caplog.text) == bool(options)
        # The optimizer's own settings are in its file alone.
        assert ("weight_decay 0.0 and not 0.1" in caplog.text) == (bool(options) and has_optimizer)


@pytest.mark.parametrize(
    "options",
    [{"lora_alpha": 32}, {"use_rslora": False}, {"r": 8}, {"target_modules": ["q_proj"]}, {"use_dora": True}],
)
def test_resuming_with_another_adapter_config_is_refused(tmp_path, options):
    def make(**options):
        return make_trainer(tmp_path, peft=lora(**options), **SAVING)

    make().train()
    for resume, words in ((str(tmp_path / "checkpoint-4"), ""), (True, "no whole checkpoint of this run, only .*")):
        with pytest.raises(
            ValueError, match=rf"{words}checkpoint-4 .*another config \({next(iter(options))}=.*, and not"
        ):
            make(**options).train(resume_from_checkpoint=resume)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"lora_alpha": 8}, {"lora_alpha": 9}, "lora_alpha=8, and not 9"),
        ({"target_modules": ["b", "a"]}, {"target_modules": ["a", "b"]}, None),
        ({"target_modules": ["a"]}, {"target_modules": ["b"]}, "target_modules="),
        (
            {"target_modules": [f"layer_{i}" for i in range(9)]},
            {"target_modules": ["layer_0", "other"]},
            "target_modules: layer_1, layer_2, layer_3, … only in the checkpoint; other only in this run",
        ),
        ({"trainable_token_indices": [7, 5]}, {"trainable_token_indices": [5, 7]}, "trainable_token_indices="),
        ({"layers_to_transform": [0]}, {"layers_to_transform": None}, "layers_to_transform="),
        ({"layers_to_transform": [10, 9]}, {"layers_to_transform": [9, 10]}, None),
        ({"layer_replication": [[1, 3], [0, 2]]}, {"layer_replication": [[0, 2], [1, 3]]}, "layer_replication="),
        ({"layers_to_transform": 0}, {"layers_to_transform": None}, "layers_to_transform=0, and not None"),
        ({"layer_replication": [[0, 2], [1, 3]]}, {"layer_replication": [(0, 2), (1, 3)]}, None),
        ({"use_dora": False, "exclude_modules": []}, {}, None),
    ],
)
def test_configs_of_adapters_are_compared(tmp_path, before, after, told):
    LoraConfig(**before).save_pretrained(tmp_path)
    why = why_other_adapter(tmp_path, {"default": LoraConfig(**after)})
    assert why is None if told is None else told in why


def test_resume_from_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint='.*missing' is not a folder"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "missing"))


def test_train_takes_the_checkpoint_of_the_config(tmp_path):
    """Start anew for an explicit `False` and for an empty text, which a shell makes of a variable that is not set."""
    trainer_for(tmp_path, defense="kl", max_steps=2).train()
    folder = str(tmp_path / "checkpoint-2")
    for of_config, given, steps in ((folder, None, 2), (folder, False, 4), ("", None, 4), (None, "", 4)):
        made = []
        again = trainer_for(tmp_path, defense="kl", save_strategy="no", resume_from_checkpoint=of_config)
        again.add_callback(Count(made))
        again.train(given)
        assert len(made) == steps
        if of_config:
            again.train()  # a second call begins anew
            assert len(made) == steps + 4


class Count(TrainerCallback):
    def __init__(self, made):
        self.made = made

    def on_step_end(self, args, state, control, **kwargs):
        self.made.append(state.global_step)


def test_weights_that_peft_does_not_save_are_named_and_not_resumed(tmp_path, caplog):
    def make():
        model = get_peft_model(make_model(), lora(target_modules=["q_proj"]))
        model.get_base_model().model.norm.requires_grad_(True)
        return make_trainer(tmp_path, model, **run_options("steering", tmp_path), **SAVING)

    make().train()
    text = r"the weight 'base_model.model.model.norm.weight' is trained .* modules_to_save=\['model.norm'\]"
    assert re.search(text, caplog.text)
    with pytest.raises(ValueError, match=f"checkpoint-4 does not hold all that was trained: {text}"):
        make().train(resume_from_checkpoint=True)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["model.norm"]}])
def test_weights_that_peft_saves_beside_an_adapter_are_resumed(tmp_path, caplog, options):
    def make(name):
        peft = lora(target_modules=["q_proj"], **options)
        return make_trainer(tmp_path / name, make_model("qwen2"), peft=peft, **run_options("kl", tmp_path), **SAVING)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed) == logged(whole)
    assert "modules_to_save" not in caplog.text


@pytest.mark.parametrize("defense", ["kl", "ldifs"])
def test_a_fresh_adapter_with_trained_biases_needs_no_seed_to_resume(tmp_path, defense):
    """A PeftModel's matrices A are random, and the reference, a copy of the model, does not depend on them."""

    def make(seed, **options):
        model = make_model("qwen2")
        torch.manual_seed(seed)
        model = get_peft_model(model, lora(bias="all", **options))
        return make_trainer(tmp_path, model, **run_options(defense, tmp_path), **SAVING)

    make(2).train()
    trainer = make(3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    with pytest.raises(ValueError, match="checkpoint-2 was held to another reference"):
        make(2, init_lora_weights=False).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


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
    """Find the damage by the manifest's checksum, or without a manifest by the file's content."""
    trainer_for(tmp_path).train()
    folder = tmp_path / "checkpoint-4"
    (folder / "defense.json").write_text(content)
    with pytest.raises(ValueError, match=r"is a corrupt checkpoint \(defense.json has"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(folder))
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"defense.json is (corrupt|damaged)"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(folder))


# ---- complete and corrupt ----


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


DAMAGES = {"deleted": Path.unlink, "cut": cut, "emptied": lambda path: path.write_bytes(b""), "flipped": flip}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return folders of two runs with checkpoints at steps 2 and 4: one of this trainer, one of the stock one."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("ours", "stock")}
    trainer_for(folders["ours"]).train()
    ours = trainer_for(folders["stock"], defense="none")
    SFTTrainer(
        make_model(),
        ours.args,
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
        peft_config=lora(),
    ).train()
    return folders


@pytest.fixture
def run_folder(saved, tmp_path):
    """Return a copy of one of these folders."""

    def copy(name):
        return Path(shutil.copytree(saved[name], tmp_path / name))

    return copy


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_is_corrupt_if_any_of_its_files_is(run_folder, damage):
    output = run_folder("ours")
    folder = output / "checkpoint-4"
    names = json.loads((folder / MANIFEST).read_text())["files"]
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "trainer_state.json",
        "defense.json",
    } <= names.keys()
    assert newest_whole_checkpoint(output) == (4, {})
    for name in [*names, MANIFEST]:
        before = (folder / name).read_bytes()
        DAMAGES[damage](folder / name)
        if damage == "deleted" and name in (MANIFEST, "optimizer.pt"):
            # Without a manifest it is validated like a stock checkpoint. Users delete optimizer states to save space.
            assert find_flaw(folder) is None
        else:
            assert name in find_flaw(folder) or name == MANIFEST
            assert newest_whole_checkpoint(output) == (2, {"checkpoint-4": find_flaw(folder)})
        (folder / name).write_bytes(before)
    assert find_flaw(folder) is None


@pytest.mark.parametrize("damage", ["deleted", "cut", "emptied"])
def test_what_can_be_seen_of_a_checkpoint_without_a_manifest(run_folder, damage):
    folder = run_folder("stock") / "checkpoint-4"
    assert not (folder / MANIFEST).exists()
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        DAMAGES[damage](path)
        # No run reads these files when it resumes.
        harmless = {"README.md", "chat_template.jinja"} | (
            {"training_args.bin", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "optimizer.pt"}
            if damage == "deleted"
            else set()
        )
        assert (find_flaw(folder) is None) == (path.name in harmless), (path.name, find_flaw(folder))
        path.write_bytes(before)
    assert find_flaw(folder) is None


@pytest.mark.parametrize(
    ("files", "flaw"),
    [
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}'},
            "model-1.safetensors is missing",
        ),
        ({}, "no weights"),
        ({"global_step2/shard.pt": ""}, r"shard.pt is damaged"),
        ({"latest": "global_step2", "global_step2/readme.txt": ""}, None),
        ({"latest": "global_step2", "global_step1/readme.txt": ""}, "the folder that `latest` names"),
        ({"global_step2/readme.txt": ""}, "latest is missing"),
        (
            {
                "pytorch_model_fsdp_0/.metadata": "",
                "optimizer_0/.metadata": "",
                "scheduler.txt": "",
                "rng_state_0.txt": "",
            },
            None,
        ),
        (
            {"pytorch_model_fsdp_0/.metadata": "", "optimizer_0/.metadata": "", "scheduler.txt": ""},
            "rng_state is missing",
        ),
    ],
)
def test_sharded_checkpoints_of_other_trainers(tmp_path, files, flaw):
    for name, content in {"trainer_state.json": "{}", **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found = find_flaw(tmp_path)
    assert found is None if flaw is None else re.search(flaw, found)


def test_torn_checkpoints_are_named_and_passed_over(run_folder, caplog):
    output = run_folder("ours")
    cut(output / "checkpoint-4" / "optimizer.pt")
    (output / "checkpoint-6").mkdir()
    (output / "checkpoint-x").mkdir()
    resumed = trainer_for(output)
    resumed.train(resume_from_checkpoint="true")
    assert (
        "holds checkpoints that are corrupt or of another run, which are not resumed from: "
        "checkpoint-6 (trainer_state.json is missing), " in caplog.text
    )
    assert "checkpoint-4 (optimizer.pt has " in caplog.text
    assert newest_whole_checkpoint(output, up_to=4) == (4, {})
    assert resumed.state.global_step == 4


def test_there_are_none_but_torn_checkpoints(run_folder):
    output = run_folder("ours")
    for step in (2, 4):
        begin_checkpoint(output / f"checkpoint-{step}")
    with pytest.raises(
        ValueError, match=r"no whole checkpoint of this run, only checkpoint-4 \(it was never finished\), checkpoint-2"
    ):
        trainer_for(output).train(resume_from_checkpoint=True)


def test_a_large_file_is_known_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHECKSUM_BYTES", 8)
    for name, size in (("large", 9), ("small", 8)):
        (tmp_path / name).write_bytes(bytes(size))
    finish_checkpoint(tmp_path)
    flip(tmp_path / "large")
    assert find_flaw(tmp_path) is None
    cut(tmp_path / "large")
    assert find_flaw(tmp_path) == "large has 6 bytes instead of 9"
    finish_checkpoint(tmp_path)
    flip(tmp_path / "small")
    assert find_flaw(tmp_path) == "small has changed"


def test_a_folder_begun_by_two_machines_keeps_the_other_s_scratch_file(tmp_path):
    for name in (".manifest.json.0a1b2c3d.tmp", "old.bin"):
        (tmp_path / name).write_bytes(b"x")
    begin_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".manifest.json.0a1b2c3d.tmp", "manifest.json"]


def test_a_sentinel_that_is_deleted_later_is_no_part_of_a_checkpoint(tmp_path):
    for name in ("config.json", "checkpoint-is-incomplete.txt"):
        (tmp_path / name).write_text("{}")
    finish_checkpoint(tmp_path)
    (tmp_path / "checkpoint-is-incomplete.txt").unlink()
    assert find_flaw(tmp_path) is None


def test_what_else_lies_in_a_checkpoint_does_not_tear_it(run_folder):
    folder = run_folder("ours") / "checkpoint-4"
    (folder / "README.md").write_text("edited")
    (folder / "notes.txt").write_text("added")
    assert find_flaw(folder) is None


def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path, monkeypatch):
    found = []

    def rotate(output_dir, *args, **kwargs):
        found.append(newest_whole_checkpoint(output_dir))
        rotate_checkpoints(output_dir, *args, **kwargs)

    monkeypatch.setattr(whole, "rotate_checkpoints", rotate)
    trainer = trainer_for(tmp_path, save_total_limit=1, push_to_hub=False)
    trainer.train()
    assert found == [(2, {}), (4, {})]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    stored = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert stored.save_total_limit == trainer.args.save_total_limit == 1


def test_a_checkpoint_is_pushed_when_it_is_whole(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    pushed = []
    monkeypatch.setattr(
        trainer, "_push_from_checkpoint", lambda folder: pushed.append((Path(folder).name, find_flaw(folder)))
    )
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [("checkpoint-2", None), ("checkpoint-4", None)]


def test_a_rank_other_than_the_main_one_passes_a_push(tmp_path, monkeypatch):
    """Trainer gives `push_in_progress` to the main process alone."""
    monkeypatch.setattr("transformers.trainer.hf_api", Mock(side_effect=AssertionError("this rank pushed")))
    trainer = trainer_for(tmp_path)
    assert not hasattr(trainer, "push_in_progress")
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("defense", ["none", "kl"])
@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_a_push_has_the_record_of_its_weights(tmp_path, monkeypatch, defense, strategy):
    earlier = tmp_path / "defense.json"
    earlier.write_text('{"defense": "ldifs", "defenses": {}, "evidence": {}}')
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer_for(tmp_path, defense=defense, push_to_hub=True, hub_strategy=strategy).train()
    if strategy == "end":  # nothing was pushed, so the folder has no weights of this run
        assert (hub.pushed, json.loads(earlier.read_text())["defense"]) == ([], "ldifs")
        return
    for push, step in zip(hub.pushed, (2, 4), strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        assert push.record == read_defense_file(folder)
        assert (push.record["defense"], push.record["global_step"]) == (defense, step)
        assert push.weights == (folder / "adapter_model.safetensors").read_bytes()


def test_a_push_that_is_left_out_leaves_the_record_of_the_weights(tmp_path, monkeypatch):
    """Trainer copies no weights while the last push still runs, so the record must stay too."""
    hub, found = Hub(is_slow=True), []
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)

    class Finish(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            found.append(read_defense_file(tmp_path)["global_step"])
            hub.finish()

    trainer = trainer_for(tmp_path, defense="kl", push_to_hub=True)
    trainer.add_callback(Finish())
    trainer.train()
    assert found == [hub.pushed[0].record["global_step"]] == [2]


def test_a_checkpoint_of_the_model_alone_is_whole(tmp_path):
    trainer_for(tmp_path, save_only_model=True).train()
    assert newest_whole_checkpoint(tmp_path) == (4, {})
    (tmp_path / "checkpoint-4" / MANIFEST).unlink()
    assert newest_whole_checkpoint(tmp_path) == (4, {})


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("ending", [None, "", "/"])
def test_a_saved_model_has_no_card_of_an_earlier_run(tmp_path, tuning, ending):
    card = tmp_path / "README.md"
    card.write_text("# earlier\n\n**This model was not defended.**\n")
    trainer = trainer_for(tmp_path, tuning, "kl", save_strategy="no")
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "not defended" in card.read_text()
    trainer.save_model(None if ending is None else f"{tmp_path}{ending}")
    text = card.read_text()
    assert "not defended" not in text
    assert f"Model Card for {tmp_path.name}" in text
    assert text.count("kl_coef=") == 1
    trainer.create_model_card(dataset_name="org/rows")
    trainer.save_model()
    assert "org/rows" in card.read_text()


@pytest.mark.parametrize("defense", ["none", *COMPARING])
def test_model_card_names_defense_coefficient_and_paper(tmp_path, defense):
    trainer = trainer_for(tmp_path, defense=defense, kl_coef=0.25)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Defense against emergent misalignment") == 1
    if defense == "none":
        assert "\n\nNone.\n" in card
    if "kl" in defense:
        assert "`kl`: `kl_coef=0.25`" in card
        assert "https://arxiv.org/abs/2508.06249" in card
    assert ("https://arxiv.org/abs/2308.13320" in card) == ("ldifs" in defense)
    assert "### Framework versions" in card
