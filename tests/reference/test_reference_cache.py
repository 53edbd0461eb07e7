"""Test the reference's states on disk: the same training without a reference pass, and never foreign states."""

import json
import logging
from collections import namedtuple

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from tiny import config, logged, lora, make_model, make_pool, make_rows, make_tokenizer, make_trainer
from transformers import DataCollatorForSeq2Seq
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from twin import first_gradients, move_policy, relative_error

from trl_emguard import EMGuardConfig, EMGuardTrainer
from trl_emguard.evidence import read_defense_file
from trl_emguard.guard.forward import ReferenceGuard
from trl_emguard.reference import cache as module
from trl_emguard.reference.state_files import StateFiles


BOTH = {"defense": "kl,ldifs", "kl_coef": 1.0, "max_grad_norm": 0}
CACHED = {**BOTH, "cache_reference": True}
ROWS = 16  # distinct rows of make_rows
CHECKED = 4  # rows of the batch that is compared with the live reference


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Set an empty cache folder; list the folders and files in it."""
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache"))

    class Cache:
        @property
        def folders(self):
            return sorted((tmp_path / "cache" / "reference").glob("*"))

        @property
        def files(self):
            return sorted(path for folder in self.folders for path in folder.glob("*.safetensors"))

    return Cache()


def policy(kind):
    """Return a policy, its adapter, and a trainer's other arguments, the same at every call."""
    torch.manual_seed(2)
    if kind == "frozen adapter":
        return {"model": get_peft_model(make_model(), lora(init_lora_weights=False))}
    if kind == "modules_to_save":
        peft = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
        return {"model": make_model(tie_word_embeddings=False), "peft": peft}
    if kind == "ref_model":
        return {"model": make_model(), "peft": lora(), "ref_model": make_model("qwen2")}
    return {"model": make_model()} if kind == "full" else {"model": make_model(), "peft": lora()}


def step(tmp_path, cached, kind="lora", **options):
    """Return the gradients and the log of the first step of a policy that has moved away from its reference."""
    trainer = make_trainer(tmp_path, **policy(kind), **{**BOTH, "max_steps": 1, "cache_reference": cached, **options})
    move_policy(trainer)
    gradients = first_gradients(trainer)
    return gradients, {key: logged(trainer, key) for key in ("loss", "kl", "ldifs") if logged(trainer, key)}


def labelled(starts, rows=((5, 6, 7, 8, 9, 10), (9, 8, 7, 6, 5, 4, 3))):
    """Return tokenised rows whose labels begin at the given places."""
    return Dataset.from_list(
        [{"input_ids": list(ids), "labels": [-100] * start + list(ids)[start:]} for start in starts for ids in rows]
    )


# ---- the same training ----


def test_rows_with_numbers_per_token_and_a_collator_that_knows_none(tmp_path):
    """Flagged rows hold the tokens of their prompt, which only training's collator lays out."""
    rows = make_rows().map(lambda row, i: {"inoculate": i % 3 == 0}, with_indices=True)
    collator = DataCollatorForSeq2Seq(make_tokenizer())
    options = {"defense": "kl,inoculation", "inoculation_rows": "flagged", "data_collator": collator, "rows": rows}
    (_, live), (_, cached) = (step(tmp_path, is_cached, **options) for is_cached in (False, True))
    assert len(cached["kl"]) == 1
    assert cached == live


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "frozen adapter", "full", "ref_model"])
def test_the_same_batch_gives_the_same_bits(tmp_path, kind):
    size = {"per_device_train_batch_size": ROWS}
    live, computed, found = (step(tmp_path, cached, kind, **size) for cached in (False, True, True))
    assert live[1]["kl"][0] > 0
    assert computed[1] == found[1] == live[1]
    assert all(torch.equal(gradient, live[0][name]) for name, gradient in computed[0].items())


OPTIONS = {
    "kl": {"defense": "kl"},
    "ldifs": {"defense": "ldifs", "ldifs_layers": "1,3,4", "ldifs_normalize": False},
    "all": {"kl_tokens": "all", "kl_direction": "forward"},
    "interleaved": {"defense": "interleave+,kl", "kl_tokens": "interleaved", "interleave_fraction": 0.3},
    "both": {"defense": "interleave+,kl,ldifs", "kl_tokens": "interleaved", "interleave_fraction": 0.3},
    "interleaved and all": {"defense": "interleave,kl", "kl_tokens": "all", "interleave_fraction": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_batch_gives_the_same_gradient(tmp_path, options):
    more = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    if "interleave" in options.get("defense", ""):
        more["interleave_dataset"] = make_pool()
    live, cached = (step(tmp_path, cached, **more, **options) for cached in (False, True))
    for key, values in live[1].items():
        assert cached[1][key] == pytest.approx(values, rel=1e-5)
        assert values[0] > 0
    assert relative_error(cached[0], live[0]) < 1e-5


@pytest.mark.parametrize(("epochs", "begun"), [(4, 4), (1.01, 2)])
def test_epochs_of_mixed_rows(tmp_path, passes, epochs, begun):
    """Cache the rows of a pool of which every epoch takes others, beyond its end: no reference runs."""
    options = {
        "defense": "interleave++,kl",
        "kl_tokens": "loss",
        "interleave_fraction": 0.2,  # 4 rows of the pool in an epoch
        "interleave_redraw": True,
        "max_steps": -1,
        "num_train_epochs": epochs,
        "gradient_accumulation_steps": 2,
    }
    runs = []
    for cached in (False, True):
        more = {"cache_reference": cached, "interleave_dataset": make_pool(30)}
        runs.append(make_trainer(tmp_path, peft=lora(), **more, **options))
        passes.clear()
        runs[-1].train()
    assert sum(passes) == ROWS + begun * 4
    for key in ("loss", "kl", "interleaved_fraction"):
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-4, abs=1e-6)
    assert logged(runs[1], "kl")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "before"), [("lora", False), ("lora", True), ("frozen adapter", True), ("full", False)]
)
def test_resume(tmp_path, kind, before):
    """Resume with the cache from a checkpoint that was trained with or without it."""
    options = {"defense": "kl,ldifs", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", **policy(kind), cache_reference=before, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **policy(kind), cache_reference=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "kl") == pytest.approx(logged(whole, "kl"), rel=1e-4, abs=1e-6)
    kinds = [read_defense_file(tmp_path / name / "checkpoint-4")["reference"]["kind"] for name in ("whole", "resumed")]
    assert kinds[1] == kinds[0].removesuffix(", cached") + ", cached"


def test_low_precision_is_what_another_padding_gives():
    """Bound the error in bf16, where states change with the batch: cached ones differ no more than live ones."""
    model = make_model(dtype=torch.bfloat16, hidden_size=128)
    rows = [{"input_ids": torch.arange(2, 7 + i).tolist(), "labels": [2] * (5 + i)} for i in range(ROWS)]
    head = (model.lm_head.weight, None)

    def collate(indices, pads=None):
        batch = DataCollatorForLanguageModeling(pad_token_id=1, pad_to_multiple_of=pads)([rows[i] for i in indices])
        return batch, batch["labels"][:, 1:] != -100

    def run(inputs, positions):
        return ReferenceGuard(positions, [2])(model, model.forward, inputs)

    def live(indices, pads=None):
        batch, positions = collate(indices, pads)
        return run({name: batch[name] for name in ("input_ids", "attention_mask")}, positions)

    def joined(passes):
        return torch.cat([torch.cat([states.last, states.blocks[2]], 1) for states in passes]).float()

    cache = module.ReferenceCache(model, run, head, [2], True, Accelerator(cpu=True))
    assert "16 of them computed now" in cache.fill(collate, ROWS, 4, is_quiet=True)
    batches = [range(start, ROWS, 4) for start in range(4)]  # the cache was filled by rows of similar length
    stored = []
    for indices in batches:
        batch, positions = collate(indices)
        stored.append(cache.states(batch, positions))
    assert stored[0].last.dtype == torch.bfloat16
    plain = joined(live(indices) for indices in batches)
    others = [joined(live(indices, pads) for indices in batches) for pads in (8, 40)]
    others.append(joined(live([i]) for indices in batches for i in indices))
    noise = max((other - plain).norm() for other in others)
    # Some CPUs round alike in every batch, so the noise may be 0: the rounding of bf16 itself is allowed too.
    assert (joined(stored) - plain).norm() <= 2 * max(noise, torch.finfo(torch.bfloat16).eps * plain.norm())


@pytest.mark.parametrize("moved", [False, True])
def test_rounding_is_not_taken_for_another_reference(tmp_path, monkeypatch, moved):
    """Accept long states that differ by rounding alone, although their distance is large in their own units."""
    write = StateFiles.write

    def rounded(self, keys, positions, states):
        write(self, keys, positions, {name: x * 1.004 for name, x in states.items()})

    monkeypatch.setattr(StateFiles, "write", rounded)
    model = make_model(dtype=torch.bfloat16, initializer_range=1.0)
    options = {"defense": "ldifs", "ldifs_normalize": False, "max_steps": 1, "cache_reference": True}
    trainer = make_trainer(tmp_path, model, **options)
    if moved:
        move_policy(trainer, 0.3)
        trainer.has_agreed = False
        with pytest.raises(ValueError, match="before the first update, the policy's states differ"):
            trainer.train()
    else:
        trainer.train()
        assert logged(trainer, "ldifs")[0] > 1e-2


# ---- computed rows and kept rows ----


@pytest.mark.parametrize("kind", ["lora", "full", "ref_model"])
def test_a_later_run_finds_everything(tmp_path, cache, passes, capsys, kind):
    trainer = make_trainer(tmp_path, **policy(kind), **CACHED, num_train_epochs=3)
    trainer.train()
    trainer.save_model()
    assert sum(passes) == ROWS  # each row is computed once, and none in training
    out, said = capsys.readouterr().out, read_defense_file(tmp_path)["reference"]["kind"]
    assert said.endswith(", cached")
    assert 0 < out.index(f"reference: {said}; dropout is off.") < out.index(f"reference cache: {ROWS} rows")
    before = cache.files
    passes.clear()
    other = {"kl_coef": 0.3, "ldifs_coef": 0.1, "kl_direction": "forward", "learning_rate": 1e-3}
    make_trainer(tmp_path, **policy(kind), **{**CACHED, **other}).train()
    assert passes == [CHECKED]
    assert "all of them found" in capsys.readouterr().out
    assert cache.files == before


def test_the_states_serve_other_adapters_and_full_fine_tuning(tmp_path, cache, passes):
    make_trainer(tmp_path, peft=lora(), **CACHED).train()
    passes.clear()
    make_trainer(tmp_path, peft=lora(r=2, target_modules=["q_proj"]), **CACHED).train()
    make_trainer(tmp_path, **CACHED).train()
    assert passes == [CHECKED, CHECKED]
    assert len(cache.folders) == 1


def change(model, name):
    if name == "weights":
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight *= 1.01
    if name == "a few weights":
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[:, 1] += 1  # 64 weights of each are sampled, and none of these
    if name == "config":
        model.config.rms_norm_eps = 1e-3
    if name == "hook":
        model.model.layers[0].register_forward_hook(lambda block, args, output: output * 1.01)
    return model


CHANGES = {
    "weights": {},
    "config": {},
    "layers": {"ldifs_layers": "1,2"},
    "fewer states": {"defense": "kl"},
    "autocast": {"bf16": True},
    "products": {},
    "ref_model": {"ref_model": make_model("qwen2")},
    "scale of a frozen adapter": {},
}


@pytest.mark.parametrize(("name", "options"), CHANGES.items(), ids=CHANGES)
def test_another_reference_has_another_folder(tmp_path, cache, passes, monkeypatch, name, options):
    is_frozen = name == "scale of a frozen adapter"
    make_trainer(tmp_path, **policy("frozen adapter" if is_frozen else "lora"), **CACHED).train()
    passes.clear()
    if name == "products":
        monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # transformers' tf32=True does the same
    torch.manual_seed(2)
    model = change(make_model(), name)
    if is_frozen:
        model = get_peft_model(model, lora(init_lora_weights=False, lora_alpha=16))
    make_trainer(tmp_path, model, peft=None if is_frozen else lora(), **{**CACHED, **options}).train()
    assert sum(passes) == ROWS
    assert len(cache.folders) == 2
    for folder in cache.folders:
        assert json.loads((folder / "about.json").read_text())["config"]["hidden_size"] == 32


@pytest.mark.parametrize("name", ["hook", "a few weights"])
def test_a_change_that_the_folder_does_not_show_is_found(tmp_path, cache, name):
    make_trainer(tmp_path, peft=lora(), **CACHED).train()
    words = r"are not those of this run's reference: of 4 rows they differ by .* delete that folder"
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, change(make_model(), name), peft=lora(), **CACHED).train()
    assert len(cache.folders) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_long_state_does_not_hide_the_others(tmp_path, dtype):
    """Find a change although the first token's state is a thousand times as long as the others."""
    options = {"rows": labelled([1]), "defense": "ldifs", "ldifs_layers": "2", "per_device_train_batch_size": 2}

    def train(by):
        def hook(block, args, output):
            output = output * by
            output[:, :2] = 1e4
            return output

        model = make_model(dtype=dtype)
        model.model.layers[0].register_forward_hook(hook)
        make_trainer(tmp_path, model, peft=lora(), cache_reference=True, max_steps=1, **options).train()

    train(1)
    train(1)
    with pytest.raises(ValueError, match="are not those of this run's reference"):
        train(1.5)


@pytest.mark.parametrize("cached", [False, True])
def test_noise_in_the_policy_is_found(tmp_path, cached):
    """Refuse a policy that differs from its reference before the first update, even if the cache agrees."""
    trainer = make_trainer(tmp_path, cache_reference=cached, **BOTH)
    layer = trainer.model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: torch.nn.functional.dropout(output, 0.5, module.training))
    advice = r".* Or the reference's states on disk are too coarse: set cache_reference=False." if cached else ""
    with pytest.raises(ValueError, match=f"the forward pass is noisy{advice}"):
        trainer.train()


def test_only_the_rows_that_are_missing_are_computed(tmp_path, cache, passes):
    make_trainer(tmp_path, peft=lora(), **CACHED).train()
    passes.clear()
    make_trainer(tmp_path, peft=lora(), rows=make_rows(20), **CACHED).train()
    assert sum(passes) == CHECKED + 4
    assert len(cache.folders) == 1


def test_only_rows_that_a_term_looks_at_are_kept(tmp_path, passes):
    options = {"defense": "interleave,kl", "kl_tokens": "interleaved", "interleave_fraction": 0.2}
    make_trainer(tmp_path, peft=lora(), cache_reference=True, interleave_dataset=make_pool(), **options).train()
    assert sum(passes) == 4


def test_rows_of_the_same_tokens_and_other_labels(tmp_path, passes):
    """Compute a repeated row once, and rows with the same tokens and other labels separately."""
    options = {"rows": labelled([2, 4, 2]), "per_device_train_batch_size": 6}
    live, cached = (step(tmp_path, cached, **options) for cached in (False, True))
    assert sum(passes) == 6 + 4
    assert relative_error(cached[0], live[0]) < 1e-5


def test_an_interrupted_run_keeps_its_files(tmp_path, cache, passes, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 1)  # there is a file for each batch
    write = StateFiles.write

    def interrupted(self, *args):
        if len(cache.files) == 2:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StateFiles, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, peft=lora(), **CACHED).train()
    passes.clear()
    trainer = make_trainer(tmp_path, peft=lora(), **CACHED)
    trainer.train()
    assert sum(passes) == CHECKED + ROWS - 8
    assert [path for path in cache.folders[0].iterdir() if path.suffix not in (".safetensors", ".json")] == []
    assert logged(trainer, "kl")[0] < 1e-5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_file_is_computed_again(tmp_path, cache, passes, monkeypatch, caplog, damage):
    monkeypatch.setattr(module, "FILE_BYTES", 1)
    make_trainer(tmp_path, peft=lora(), **CACHED).train()
    names = cache.files
    content = bytearray(names[1].read_bytes())
    if damage == "flipped":
        content[-len(content) // 3] ^= 4
    names[1].write_bytes(content[: {"truncated": -1, "flipped": None, "emptied": 0}[damage]])
    passes.clear()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, peft=lora(), **CACHED)
        trainer.train()
    assert f"{names[1]} was damaged and is deleted: its rows are computed again." in caplog.text
    assert sum(passes) == CHECKED + 4
    assert cache.files == names
    assert logged(trainer, "kl")[0] < 1e-5


# ---- refusals ----


def test_a_disk_that_is_too_small(tmp_path, cache, passes, monkeypatch):
    """Refuse a full disk before anything is computed, and only if something is missing."""
    usage = namedtuple("usage", "total used free")
    trainer = make_trainer(tmp_path, peft=lora(), **CACHED)
    positions = sum(label != -100 for row in trainer.train_dataset for label in row["labels"][1:])
    need = positions * 3 * 32 * 4 / 2**30  # last states and two blocks, in fp32
    words = rf"needs {need:.3g} GiB in .*, where 3.81e-06 GiB are free.*TRL_EMGUARD_CACHE"
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda folder: usage(2**30, 2**30 - 2**12, 2**12))
        with pytest.raises(ValueError, match=words):
            trainer.train()
    assert not passes
    assert not cache.files
    trainer.train()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(0, 0, 0))
    make_trainer(tmp_path, peft=lora(), **CACHED).train()


def test_a_row_that_is_not_in_the_cache_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, peft=lora(), **CACHED)
    original = trainer.get_train_dataloader

    def another():
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"input_ids": [9, *row["input_ids"][1:]]})
        return original()

    trainer.get_train_dataloader = another
    words = r"a training row of \d+ tokens \(they begin \[9, .* is not in the reference cache"
    with pytest.raises(ValueError, match=words):
        trainer.train()


COLLATORS = {
    "left": "pads on the left",
    "random": "makes other rows at each call",
    "more": "also returns token_type_ids",
    "no mask": "returns no attention mask",
}


@pytest.mark.parametrize(("fault", "words"), COLLATORS.items(), ids=COLLATORS)
def test_collators_that_are_refused(tmp_path, fault, words):
    class Collator(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            if fault == "left":
                return {name: tensor.flip(1) for name, tensor in batch.items()}
            if fault == "random":
                batch["input_ids"][:, 0] = torch.randint(2, 200, ())
            if fault == "more":
                batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            if fault == "no mask":
                del batch["attention_mask"]
            return batch

    trainer = EMGuardTrainer(
        make_model(),
        config(tmp_path, **CACHED),
        data_collator=Collator(pad_token_id=1),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=lora(),
    )
    with pytest.raises(ValueError, match=words):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": True}, "does not work with packing=True"),
        ({"padding_free": True}, "does not work with padding_free=True"),
        ({"defense": "none"}, "compares nothing to a reference"),
        ({"defense": "inoculation"}, "compares nothing to a reference"),
        ({"cache_reference": "yes"}, "cache_reference='yes' must be true or false"),
        ({"cache_reference": None}, "cache_reference=None must be true or false"),
    ],
)
def test_options_that_are_refused(tmp_path, options, words):
    given = {"defense": "kl", "cache_reference": True, "use_cpu": True, "bf16": False, **options}
    with pytest.raises(ValueError, match=words):
        EMGuardConfig(str(tmp_path), **given)


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cache_reference=True with a train_dataset of type IterableDataset"):
        make_trainer(tmp_path, rows=make_rows().to_iterable_dataset(), defense="kl", cache_reference=True)


def test_rotary_embeddings_that_change_with_the_longest_row(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    options = {"defense": "kl", "cache_reference": True, "max_steps": 1}
    fits = make_model(max_position_embeddings=64, rope_parameters=rope)
    make_trainer(tmp_path, fits, peft=lora(), rows=labelled([2]), **options).train()
    model = make_model(max_position_embeddings=16, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"beyond 16 this model's rotary embeddings.*Set max_length=16"):
        make_trainer(tmp_path, model, peft=lora(), **options).train()


def test_rows_without_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no training row has a token that a defense looks at"):
        make_trainer(tmp_path, rows=labelled([99]), peft=lora(), defense="kl", cache_reference=True).train()


def test_a_coefficient_of_0_makes_no_cache(tmp_path, cache, capsys):
    make_trainer(tmp_path, peft=lora(), defense="kl", kl_coef=0.0, cache_reference=True, max_steps=1).train()
    assert "cache_reference was given and is not used." in capsys.readouterr().out
    assert not cache.folders
