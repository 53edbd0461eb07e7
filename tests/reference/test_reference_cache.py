"""The reference's states from disk: the same training, without a reference pass, and never those of another reference or row."""

import json
import logging
import random
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import config, logged, lora, make_model, make_pool, make_rows, make_tokenizer, make_trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from twin import first_gradients, move_policy, relative_error

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.evidence import read_defense_file
from trl_emguard.guard.forward import ReferenceGuard
from trl_emguard.reference import cache as module


BOTH = {"defense": "kl,ldifs", "kl_coef": 1.0, "max_grad_norm": 0}
ROWS = 16  # of make_rows, all distinct


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and in it the folders of the references that are met."""
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache"))

    class Cache:
        @property
        def folders(self):
            return sorted((tmp_path / "cache" / "reference").glob("*"))

        @property
        def files(self):
            return sorted(path for folder in self.folders for path in folder.glob("*.safetensors"))

    return Cache()


@pytest.fixture
def passes(monkeypatch):
    """How many rows each pass of a reference was given, but for those that what is kept is compared to."""
    counts = []
    run, check = ReferenceGuard.__call__, module.ReferenceCache._check_live

    def counted(self, model, inputs):
        counts.append(len(inputs["input_ids"]))
        return run(self, model, inputs)

    def not_counted(self, collate, rows):
        before = len(counts)
        try:
            check(self, collate, rows)
        finally:
            assert len(counts) == before + bool(rows)
            del counts[before:]

    monkeypatch.setattr(ReferenceGuard, "__call__", counted)
    monkeypatch.setattr(module.ReferenceCache, "_check_live", not_counted)
    return counts


def policy(kind):
    """A policy, its adapter, and the rest of what a trainer wants, the same at every call."""
    torch.manual_seed(2)
    options = {
        "lora": {},
        "dora": {"use_dora": True},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    if kind == "frozen adapter":
        return {"model": get_peft_model(make_model(), lora(init_lora_weights=False))}
    if kind in options:
        return {"model": make_model(tie_word_embeddings=kind != "modules_to_save"), "peft": lora(**options[kind])}
    if kind == "ref_model":
        other = make_model("qwen2")
        return {"model": make_model(), "peft": lora(), "ref_model": other}
    return {"model": make_model()}


def step(tmp_path, cached, kind="lora", **options):
    """Gradients of the first step of a policy that has moved away from its reference, and what was logged."""
    trainer = make_trainer(tmp_path, **policy(kind), cache_reference=cached, max_steps=1, **{**BOTH, **options})
    move_policy(trainer)
    gradients = first_gradients(trainer)
    return gradients, {key: logged(trainer, key) for key in ("loss", "kl", "ldifs") if logged(trainer, key)}


# ---- the same training ----


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", "frozen adapter", "full", "ref_model"])
def test_the_same_batch_gives_the_same_bits(tmp_path, kind):
    whole = {"per_device_train_batch_size": ROWS}
    live, cached = (step(tmp_path, cached, kind, **whole) for cached in (False, True))
    assert cached[1] == live[1]
    assert live[1]["kl"][0] > 0
    assert all(torch.equal(gradient, live[0][name]) for name, gradient in cached[0].items())
    # And so does what is found on the disk.
    assert step(tmp_path, True, kind, **whole)[1] == live[1]


OPTIONS = {
    "kl": {"defense": "kl"},
    "ldifs": {"defense": "ldifs", "ldifs_layers": "1,3,4"},
    "ldifs as it is": {"defense": "ldifs", "ldifs_normalize": False},
    "forward": {"kl_direction": "forward"},
    "all": {"kl_tokens": "all"},
    "interleaved": {"defense": "interleave+,kl", "kl_tokens": "interleaved", "interleave_fraction": 0.3},
    "interleaved and ldifs": {
        "defense": "interleave+,kl,ldifs",
        "kl_tokens": "interleaved",
        "interleave_fraction": 0.3,
    },
    "interleaved and all": {"defense": "interleave,kl", "kl_tokens": "all", "interleave_fraction": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_batch_gives_the_same_gradient(tmp_path, options):
    more = {"interleave_dataset": make_pool()} if "interleave" in options.get("defense", "") else {}
    shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    live, cached = (step(tmp_path, cached, **shape, **options, **more) for cached in (False, True))
    for key, values in live[1].items():
        assert cached[1][key] == pytest.approx(values, rel=1e-5)
        assert values[0] > 0
    assert relative_error(cached[0], live[0]) < 1e-5


@pytest.mark.parametrize(("epochs", "begun"), [(4, 4), (1.01, 2)])
def test_epochs_of_mixed_rows(tmp_path, passes, epochs, begun):
    """Other rows of the pool in every epoch, up to its end and round again: all of them are in the cache, and nothing runs."""
    options = {
        "defense": "interleave++,kl",
        "interleave_fraction": 0.2,
        "interleave_redraw": True,
        "max_steps": -1,
        "num_train_epochs": epochs,
        "gradient_accumulation_steps": 2,
    }
    runs = []
    for cached in (False, True):
        pool = make_pool(30)
        trainer = make_trainer(tmp_path, peft=lora(), cache_reference=cached, interleave_dataset=pool, **options)
        passes.clear()
        trainer.train()
        runs.append(trainer)
    live, cached = runs
    assert sum(passes) == ROWS + begun * cached._mixing.plan.rows
    for key in ("loss", "kl", "interleaved_fraction"):
        assert logged(cached, key) == pytest.approx(logged(live, key), rel=1e-4, abs=1e-6)
    assert logged(cached, "kl")[0] == pytest.approx(0, abs=1e-6)


def test_only_rows_that_a_term_looks_at_are_kept(tmp_path, passes):
    options = {"defense": "interleave,kl", "kl_tokens": "interleaved", "interleave_fraction": 0.2}
    trainer = make_trainer(tmp_path, peft=lora(), cache_reference=True, interleave_dataset=make_pool(), **options)
    trainer.train()
    assert sum(passes) == trainer._mixing.plan.rows == 4


@pytest.mark.parametrize("kind", ["lora", "frozen adapter", "full"])
@pytest.mark.parametrize("before", [False, True])
def test_resume(tmp_path, kind, before):
    """Into the cache, whether the checkpoint was trained from it or not."""
    options = {"defense": "kl,ldifs", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", **policy(kind), cache_reference=before, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **policy(kind), cache_reference=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "kl") == pytest.approx(logged(whole, "kl"), rel=1e-4, abs=1e-6)
    kinds = [read_defense_file(tmp_path / name / "checkpoint-4")["reference"]["kind"] for name in ("whole", "resumed")]
    assert kinds[1] == kinds[0].removesuffix(", cached") + ", cached"


def test_low_precision_is_what_another_padding_gives(tmp_path, passes):
    """In bf16 a row's states change with the shape of the batch. From the cache they differ from the live pass's by no more."""
    trainer = make_trainer(
        tmp_path,
        make_model(dtype=torch.bfloat16, hidden_size=128),
        peft=lora(),
        cache_reference=True,
        max_steps=1,
        **BOTH,
    )
    trainer.train()
    reference, bare, cache = trainer._reference, trainer._bare_model(), trainer._cache

    def live(rows, pads):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        padded = {name: torch.nn.functional.pad(batch[name], (0, pads)) for name in ("input_ids", "attention_mask")}
        scope = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, pads))
        with reference.swapped_in():
            return states(ReferenceGuard(scope, [2, 4])(bare, padded))

    def stored(rows):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        made = cache.states(batch, [module.Term(trainer._terms[0], batch["labels"][:, 1:] != -100, torch.ones(()))])
        assert made.last.dtype == torch.bfloat16
        return states(made)

    def states(made):
        return torch.cat([made.last, *made.blocks.values()], 1).float()

    def distance(a, b):
        return (torch.cat(a) - torch.cat(b)).norm().item()

    batches = [range(start, start + 4) for start in range(0, ROWS, 4)]
    plain = [live(rows, 0) for rows in batches]
    noise = [distance([live(rows, pads) for rows in batches], plain) for pads in (1, 7, 40)]
    noise.append(distance([live([row], 0) for row in range(ROWS)], plain))
    assert 0 < distance([stored(rows) for rows in batches], plain) <= 2 * max(noise)
    assert logged(trainer, "kl")[0] < 1e-2


@pytest.mark.parametrize("another", [False, True])
def test_rounding_is_not_taken_for_another_reference(tmp_path, another):
    """A distance in the states' own units is large for long states that differ by their rounding alone."""
    for size in (1, 4):
        model = make_model(dtype=torch.bfloat16, initializer_range=1.0)
        options = {"defense": "ldifs", "ldifs_normalize": False, "per_device_train_batch_size": size, "max_steps": 1}
        trainer = make_trainer(tmp_path, model, cache_reference=True, **options)
        if another and size == 4:
            move_policy(trainer, 0.3)
            del trainer._check_agreement  # it is back
            with pytest.raises(ValueError, match="before the first update, ldifs to the reference"):
                trainer.train()
            return
        trainer.train()
    assert logged(trainer, "ldifs")[0] > 1e-2


# ---- when it is computed ----


@pytest.mark.parametrize("kind", ["lora", "full", "ref_model"])
def test_what_is_there_is_used_again(tmp_path, cache, passes, capsys, kind):
    make_trainer(tmp_path, **policy(kind), cache_reference=True, num_train_epochs=3, **BOTH).train()
    assert sum(passes) == ROWS  # each row once, and none in training
    assert f"reference cache: {ROWS} rows" in capsys.readouterr().out
    before = cache.files
    passes.clear()
    other = {**BOTH, "kl_coef": 0.3, "ldifs_coef": 0.1, "kl_direction": "forward", "per_device_train_batch_size": 2}
    make_trainer(tmp_path, **policy(kind), cache_reference=True, **other).train()
    assert not passes
    assert "all of them found" in capsys.readouterr().out
    assert cache.files == before


def test_what_one_adapter_computed_serves_another_and_full_fine_tuning(tmp_path, passes):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    passes.clear()
    make_trainer(tmp_path, peft=lora(r=2, target_modules=["q_proj"]), cache_reference=True, **BOTH).train()
    make_trainer(tmp_path, cache_reference=True, **BOTH).train()
    assert not passes


def changed_model(name):
    model = make_model()
    if name == "one weight":
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight[5, 7] += 1e-3
    if name == "config":
        model.config.rms_norm_eps = 1e-3
    if name == "hook":
        model.model.layers[0].register_forward_hook(lambda block, args, output: output * 1.01)
    return model


CHANGES = {
    "one weight": {},
    "config": {},
    "layers": {"ldifs_layers": "1,2"},
    "fewer states": {"defense": "kl"},
    "autocast": {"bf16": True},
    "ref_model": {"ref_model": make_model("qwen2")},
}


@pytest.mark.parametrize(("name", "options"), CHANGES.items(), ids=CHANGES)
def test_another_reference_has_another_cache(tmp_path, cache, passes, name, options):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    passes.clear()
    make_trainer(tmp_path, changed_model(name), peft=lora(), cache_reference=True, **{**BOTH, **options}).train()
    assert sum(passes) == ROWS
    assert len(cache.folders) == 2
    for folder in cache.folders:
        assert json.loads((folder / "about.json").read_text())["config"]["hidden_size"] == 32


def test_a_frozen_adapter_of_another_scale_has_another_cache(tmp_path, cache):
    for alpha in (8, 16):
        torch.manual_seed(2)
        model = get_peft_model(make_model(), lora(init_lora_weights=False, lora_alpha=alpha))
        make_trainer(tmp_path, model, cache_reference=True, **BOTH).train()
    assert len(cache.folders) == 2


def test_of_other_rows_only_the_new_ones_are_computed(tmp_path, cache, passes):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    passes.clear()
    make_trainer(tmp_path, peft=lora(), rows=make_rows(20), cache_reference=True, **BOTH).train()
    assert sum(passes) == 4
    assert len(cache.folders) == 1


def labelled(starts, rows=((5, 6, 7, 8, 9, 10), (9, 8, 7, 6, 5, 4, 3))):
    return Dataset.from_list(
        [{"input_ids": list(ids), "labels": [-100] * start + list(ids)[start:]} for start in starts for ids in rows]
    )


def test_rows_of_the_same_tokens_and_other_labels(tmp_path, passes):
    """They share their tokens and not their positions, and a row that is there twice is computed once."""
    rows = labelled([2, 4, 2])
    options = {"rows": rows, "per_device_train_batch_size": 6}
    live, cached = (step(tmp_path, cached, **options) for cached in (False, True))
    assert sum(passes) == 6 + 4
    assert relative_error(cached[0], live[0]) < 1e-5


def test_a_build_that_was_killed_goes_on(tmp_path, cache, passes, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 1)  # a file per batch
    run = module.ReferenceCache._run

    def killed(self, inputs, needed):
        if len(cache.files) == 2:
            raise KeyboardInterrupt
        return run(self, inputs, needed)

    monkeypatch.setattr(module.ReferenceCache, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    assert sum(passes) == 8
    monkeypatch.setattr(module.ReferenceCache, "_run", run)
    trainer = make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH)
    trainer.train()
    assert sum(passes) == ROWS
    assert [path for path in cache.folders[0].iterdir() if path.suffix not in (".safetensors", ".json")] == []
    assert logged(trainer, "kl")[0] < 1e-5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_file_is_computed_again(tmp_path, cache, passes, monkeypatch, caplog, damage):
    monkeypatch.setattr(module, "FILE_BYTES", 1)
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    names = cache.files
    content = bytearray(names[1].read_bytes())
    if damage == "flipped":
        content[-len(content) // 3] ^= 4
    names[1].write_bytes(content[: {"truncated": -1, "flipped": None, "emptied": 0}[damage]])
    passes.clear()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH)
        trainer.train()
    assert f"{names[1]} was damaged and is deleted: its rows are computed again." in caplog.text
    assert sum(passes) == 4
    assert cache.files == names
    assert logged(trainer, "kl")[0] < 1e-5


# ---- without being asked ----


@pytest.mark.parametrize("kind", ["lora", "full", "ref_model"])
def test_what_is_there_is_used_unasked(tmp_path, cache, passes, capsys, kind):
    """A sweep: one run keeps the states, and the others need not ask."""
    make_trainer(tmp_path, **policy(kind), cache_reference=True, **BOTH).train()
    before = cache.files
    for coef in (0.3, 3.0):
        runs = []
        for cached in (False, None):
            passes.clear()
            options = {**BOTH, "kl_coef": coef, "max_steps": 4}
            runs.append(make_trainer(tmp_path, **policy(kind), cache_reference=cached, **options))
            runs[-1].train()
        assert "all of them found" in capsys.readouterr().out
        assert passes == [4]  # in the first step, where policy and reference must agree
        for key in ("loss", "kl", "ldifs", "grad_norm"):
            assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-5, abs=1e-7)
        assert logged(runs[1], "kl")[-1] > 0
    runs[1].save_model()
    assert read_defense_file(tmp_path)["reference"]["kind"].endswith(", cached")
    assert cache.files == before


# What keeps a run from using what one of `make_rows` and both defenses has kept, the run's options, and what it says.
SINCE = {
    "damaged": ({}, "is damaged; cache_reference=True computes its rows again"),
    "one row more": ({"rows": make_rows(17)}, "row 16 is not in"),
    "hook": ({}, "are not those of this run's reference"),
    "one weight": ({}, ""),
    "other states": ({"defense": "kl"}, ""),
    "switched off": ({"cache_reference": False}, ""),
}


@pytest.mark.parametrize(("name", "options", "said"), [(name, *rest) for name, rest in SINCE.items()], ids=SINCE)
def test_unasked_nothing_is_computed(tmp_path, cache, passes, capsys, name, options, said):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    if name == "damaged":
        content = bytearray(cache.files[0].read_bytes())
        content[len(content) // 2] ^= 4
        cache.files[0].write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in cache.files}
    passes.clear()
    capsys.readouterr()
    options = {**BOTH, "max_steps": 2, "cache_reference": None, **options}
    trainer = make_trainer(tmp_path, changed_model(name), peft=lora(), **options)
    trainer.train()
    assert passes == [4, 4]  # in the steps
    assert {path: path.stat().st_mtime_ns for path in cache.files} == before
    assert len(cache.folders) == 1
    assert trainer._record()["reference"]["kind"] == "base model, adapters off"
    lines = [line for line in capsys.readouterr().out.splitlines() if "reference cache" in line]
    assert len(lines) == bool(said)
    assert all("not used, the reference runs" in line and said in line for line in lines)


@pytest.mark.parametrize("cached", [None, False])
def test_unasked_a_run_that_finds_nothing_leaves_no_trace(tmp_path, cached):
    make_trainer(tmp_path, peft=lora(), max_steps=1, cache_reference=cached, **BOTH).train()
    assert not (tmp_path / "cache").exists()


def test_what_no_key_can_say_is_found_out(tmp_path, cache):
    """A hook changes the reference's states and neither a weight nor a config."""
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    with pytest.raises(
        ValueError, match=r"are not those of this run's reference: of 4 rows they differ by .* delete that folder"
    ):
        make_trainer(tmp_path, changed_model("hook"), peft=lora(), cache_reference=True, **BOTH).train()
    assert len(cache.folders) == 1


def spoil(name, cache, monkeypatch):
    """Make a cache folder something that it should not be."""
    reference, folder = cache.folders[0].parent, cache.folders[0]

    def denied():
        raise PermissionError(13, "Permission denied")

    if name == "a file":
        reference.rename(reference.with_name("elsewhere"))
        reference.write_text("")
    elif name == "below a file":
        monkeypatch.setenv("TRL_EMGUARD_CACHE", str(cache.files[0] / "cache"))
    elif name == "no home":
        monkeypatch.setattr(module, "cache_dir", lambda: Path("~nobody-of-this-name").expanduser())
    elif name == "locked":
        monkeypatch.setattr(module, "reference_cache_dir", lambda: SimpleNamespace(is_dir=denied))
    elif name == "a folder in it":
        (folder / "x-1.safetensors").mkdir()
    elif name == "a link to nothing":
        (folder / "x-1.safetensors").symlink_to("nowhere")


@pytest.mark.parametrize(
    "name", ["a file", "below a file", "no home", "locked", "a folder in it", "a link to nothing"]
)
def test_unasked_no_disk_stops_a_run(tmp_path, cache, passes, monkeypatch, name):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    passes.clear()
    spoil(name, cache, monkeypatch)
    make_trainer(tmp_path, peft=lora(), cache_reference=None, max_steps=2, save_strategy="no", **BOTH).train()
    assert passes == ([4] if "in it" in name or "link" in name else [4, 4])


@pytest.mark.parametrize("kind", ["lora", "full", "ref_model"])
def test_unasked_a_row_that_is_not_there_brings_the_reference_back(tmp_path, passes, caplog, kind):
    make_trainer(tmp_path, **policy(kind), cache_reference=True, **BOTH).train()
    passes.clear()
    trainer = make_trainer(tmp_path, **policy(kind), cache_reference=None, max_steps=3, **BOTH)
    collate, batches = trainer.data_collator.torch_call, []

    def later(examples):
        batch = collate(examples)
        batches.append(len(examples))
        if len(batches) > ROWS + 3:  # those of the search, of the comparison, and of two steps, the first of them live
            batch["input_ids"][:, 0] = 9
        return batch

    trainer.data_collator.torch_call = later
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert passes == [4, 4]
    assert caplog.text.count("from here on the reference runs") == 1
    assert trainer._reference_kind().endswith(", cached")  # as all but that step were


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_unasked_a_miss_within_a_step(tmp_path, passes, kind):
    """In its second micro-batch, of bf16 states whose distances are large: the first step is as without a cache."""
    shape = {"defense": "ldifs", "ldifs_normalize": False, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    model = {"dtype": torch.bfloat16, "initializer_range": 1.0}
    peft = lora() if kind == "lora" else None
    make_trainer(
        tmp_path, make_model(**model), peft=peft, cache_reference=True, per_device_train_batch_size=1, **shape
    ).train()
    passes.clear()
    trainer = make_trainer(tmp_path, make_model(**model), peft=peft, cache_reference=None, max_steps=3, **shape)
    states = module.ReferenceCache.states
    batches = []

    def missing(self, inputs, terms):
        batches.append(1)
        if len(batches) == 2:
            raise ValueError("not there")
        return states(self, inputs, terms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.ReferenceCache, "states", missing)
        trainer.train()
    assert logged(trainer, "ldifs")[0] == 0
    assert passes == [4, 4, 4, 4, 4]
    assert trainer._reference_kind().endswith(", cached")


def test_a_cache_that_is_found_wrong_after_the_first_step(tmp_path, monkeypatch):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    monkeypatch.setattr(module.ReferenceCache, "_check_live", lambda *args: None)
    trainer = make_trainer(tmp_path, changed_model("hook"), peft=lora(), cache_reference=True, max_steps=3, **BOTH)
    with pytest.raises(ValueError, match=r"before the first update.*set cache_reference=False"):
        trainer.train()


@pytest.mark.parametrize("cached", [False, None, True])
def test_noise_is_found_whatever_is_on_the_disk(tmp_path, capsys, cached):
    """A policy that is not its reference before the first update is refused, though the cache agrees with the reference."""
    make_trainer(tmp_path, cache_reference=True, **BOTH).train()
    trainer = make_trainer(tmp_path, cache_reference=cached, **BOTH)
    layer = trainer.model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: torch.nn.functional.dropout(output, 0.5, module.training))
    capsys.readouterr()
    with pytest.raises(ValueError, match="the forward pass is noisy"):
        trainer.train()
    assert ("all of them found" in capsys.readouterr().out) == (cached is not False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_long_state_does_not_hide_the_others(tmp_path, cache, capsys, dtype):
    """The first token's state is often a thousand times as long as the others."""

    def change(by):
        def hook(block, args, output):
            output = output * by
            output[:, :2] = 1e4
            return output

        model = make_model(dtype=dtype)
        model.model.layers[0].register_forward_hook(hook)
        return model

    options = {
        "rows": labelled([1]),
        "defense": "ldifs",
        "ldifs_layers": "2",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
    }
    for by, asked, said in (
        (1, True, "computed now"),
        (1, None, "all of them found"),
        (1.5, None, "are not those of this run's"),
    ):
        make_trainer(tmp_path, change(by), peft=lora(), cache_reference=asked, **options).train()
        assert said in capsys.readouterr().out
    assert len(cache.folders) == 1


def test_ranks_go_the_same_way(tmp_path, passes, monkeypatch, capsys):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    passes.clear()
    monkeypatch.setattr(module, "gather_object", lambda mine: [*mine, False])
    make_trainer(tmp_path, peft=lora(), cache_reference=None, max_steps=2, **BOTH).train()
    assert passes == [4, 4]
    assert "not used, the reference runs (it does not serve every process)" in capsys.readouterr().out


def test_a_search_draws_no_random_numbers(tmp_path):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    trainer = make_trainer(tmp_path, peft=lora(), rows=make_rows(17), cache_reference=None, **BOTH)
    collate = trainer.data_collator.torch_call

    def drawing(examples):
        torch.rand(1), np.random.rand(), random.random()
        return collate(examples)

    trainer.data_collator.torch_call = drawing
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert trainer._open_cache(trainer._reference) is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_a_cache_that_is_gone_before_a_second_training(tmp_path, cache, passes):
    trainer = make_trainer(tmp_path, cache_reference=True, max_steps=2, **BOTH)
    trainer.train()
    trainer.args.cache_reference = None
    passes.clear()
    trainer.train()
    assert passes == [4]
    passes.clear()
    for path in cache.files:
        path.unlink()
    trainer.train()
    assert passes == [4, 4]


def test_another_precision_of_products_has_another_cache(tmp_path, cache, monkeypatch):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # as transformers' tf32=True
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    assert sorted(json.loads((folder / "about.json").read_text())["matmul"] for folder in cache.folders) == [
        "ieee",
        "tf32",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["one bit", "two rows trade places", "two signs", "a buffer"])
def test_the_digest_sees(dtype, change):
    model = torch.nn.Linear(9, 7, dtype=dtype)
    model.register_buffer("scale", torch.ones((), dtype=dtype), persistent=False)
    before = module._weights_digest(model, set())
    assert module._weights_digest(model, set()) == before
    weight = model.weight.data
    if change == "one bit":
        weight.view(torch.uint8)[6, -1] ^= 1
    if change == "two rows trade places":
        weight[[1, 2]] = weight[[2, 1]]
    if change == "two signs":
        weight[3, [2, 6]] *= -1
    if change == "a buffer":
        model.scale += 1
    assert module._weights_digest(model, set()) != before


# ---- what cannot be ----


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, cache, passes, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(2**30, 2**30 - 2**12, 2**12))
    trainer = make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH)
    positions = sum(label != -100 for row in trainer.train_dataset for label in row["labels"][1:])
    need = positions * 3 * 32 * 4 / 2**30  # the last states and two blocks, in fp32
    with pytest.raises(
        ValueError, match=rf"needs {need:.3g} GiB in .*, where 3.81e-06 GiB are free.*TRL_EMGUARD_CACHE"
    ):
        trainer.train()
    assert not passes
    assert not cache.files


def test_a_disk_that_is_full_is_fine_if_nothing_is_missing(tmp_path, monkeypatch):
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(0, 0, 0))
    make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH).train()


def test_a_row_that_is_not_in_the_cache_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), cache_reference=True, **BOTH)
    original = trainer.get_train_dataloader

    def another():
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"input_ids": [9, *row["input_ids"][1:]]})
        return original()

    trainer.get_train_dataloader = another
    with pytest.raises(
        ValueError, match=r"a training row of \d+ tokens \(they begin \[9, .* is not in the reference cache"
    ):
        trainer.train()


class Collator(DataCollatorForLanguageModeling):
    fault = ""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        if self.fault == "pads":
            lengths = batch["attention_mask"].sum(1).tolist()
            for tensor in batch.values():
                for row, length in zip(tensor, lengths, strict=True):
                    row.copy_(row.roll(len(row) - length))
        if self.fault == "left":
            return {name: tensor.flip(1) for name, tensor in batch.items()}
        if self.fault == "random":
            batch["input_ids"][:, 0] = torch.randint(2, 200, ())
        if self.fault == "more":
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        if self.fault == "no mask":
            del batch["attention_mask"]
        return batch


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("left", "pads on the left"),
        ("random", "makes other rows at each call"),
        ("more", "also returns token_type_ids"),
        ("no mask", "returns no attention mask"),
    ],
)
def test_collators_that_it_does_not_work_with(tmp_path, fault, words):
    collator = Collator(pad_token_id=1)
    collator.fault = fault
    trainer = EMGuardTrainer(
        make_model(),
        config(tmp_path, cache_reference=True, **BOTH),
        data_collator=collator,
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=lora(),
    )
    with pytest.raises(ValueError, match=words):
        trainer.train()


@pytest.mark.parametrize("how", ["pads", "left", "random", "more", "packing", "mixed and packed", "stream"])
def test_unasked_it_stops_no_run_that_it_does_not_work_with(tmp_path, passes, how):
    make_trainer(tmp_path, make_model(attn_implementation="eager"), peft=lora(), cache_reference=True, **BOTH).train()
    passes.clear()
    collator = Collator(pad_token_id=1)
    collator.fault = how
    options = {"packing": True, "max_length": 64} if "packed" in how or how == "packing" else {}
    if "mixed" in how:
        options |= {"defense": "interleave,kl,ldifs", "interleave_fraction": 0.2}
    trainer = EMGuardTrainer(
        make_model(attn_implementation="eager"),
        config(tmp_path, max_steps=2, **{**BOTH, "cache_reference": None, **options}),
        data_collator=collator if how in ("pads", "left", "random", "more") else None,
        train_dataset=make_rows().to_iterable_dataset() if how == "stream" else make_rows(),
        processing_class=make_tokenizer(),
        peft_config=lora(),
        interleave_dataset=make_pool() if "mixed" in how else None,
    )
    trainer.train()
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": True}, "does not work with packing=True"),
        ({"padding_free": True}, "does not work with padding_free=True"),
        ({"defense": "none"}, "compares nothing to a reference"),
        ({"defense": "inoculation"}, "compares nothing to a reference"),
        ({"cache_reference": "yes"}, "cache_reference='yes' must be true, false or None"),
    ],
)
def test_options_that_it_does_not_work_with(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        EMGuardConfig(
            str(tmp_path), **{"defense": "kl", "cache_reference": True, "use_cpu": True, "bf16": False, **options}
        )


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cache_reference=True with a train_dataset of type IterableDataset"):
        make_trainer(tmp_path, rows=make_rows().to_iterable_dataset(), defense="kl", cache_reference=True)


@pytest.mark.parametrize("engine", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_engines_are_refused(tmp_path, monkeypatch, engine):
    ask = EMGuardTrainer._engine_without_cache

    def sharded(self):
        monkeypatch.setattr(self, engine, True)
        return ask(self)

    monkeypatch.setattr(EMGuardTrainer, "_engine_without_cache", sharded)
    with pytest.raises(ValueError, match=r"cache_reference=True does not work with (DeepSpeed|FSDP)"):
        make_trainer(tmp_path, defense="kl", cache_reference=True)


def test_rotary_embeddings_that_change_with_the_longest_row(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    options = {"defense": "kl", "cache_reference": True, "max_steps": 1}
    fits = make_model(max_position_embeddings=64, rope_parameters=rope)
    make_trainer(tmp_path, fits, peft=lora(), rows=labelled([2]), **options).train()
    trainer = make_trainer(
        tmp_path, make_model(max_position_embeddings=16, rope_parameters=rope), peft=lora(), **options
    )
    with pytest.raises(ValueError, match=r"beyond 16 this model's rotary embeddings.*Set max_length=16"):
        trainer.train()


def test_rows_without_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no training row has a token that a defense looks at"):
        make_trainer(tmp_path, rows=labelled([99]), peft=lora(), defense="kl", cache_reference=True).train()


def test_a_coefficient_of_0_makes_no_cache(tmp_path, cache, capsys):
    make_trainer(tmp_path, peft=lora(), defense="kl", kl_coef=0.0, cache_reference=True, max_steps=1).train()
    assert "cache_reference was given and is not used." in capsys.readouterr().out
    assert not cache.folders


def test_the_run_says_that_its_reference_is_cached(tmp_path, capsys):
    trainer = make_trainer(tmp_path, peft=lora(), defense="kl", cache_reference=True, max_steps=1)
    trainer.train()
    trainer.save_model()
    out = capsys.readouterr().out
    assert out.index("reference: base model, adapters off, cached; dropout is off.") < out.index(
        "reference cache: 16 rows"
    )
    assert read_defense_file(tmp_path)["reference"]["kind"] == "base model, adapters off, cached"
