"""`--dry_run` says what the run then does, finds what the run would trip over, and leaves nothing behind."""

import json
import logging
import os
import re
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from accelerate import PartialState
from command import make_argv, save_inputs, without, write_rows
from huggingface_hub.errors import LocalEntryNotFoundError
from methods import COVERING, METHODS, save_adapter, save_vector
from tiny import make_model, make_pool, make_rows, make_tokenizer, make_trainer
from transformers import TrainingArguments
from trl import SFTTrainer

from trl_emguard import DriftCallback, EMGuardTrainer
from trl_emguard.io.recipes import recipes_dir
from trl_emguard.models.identity import weight_checksums
from trl_emguard.persona import load_vector
from trl_emguard.planning.report import _check_weights, listening, show
from trl_emguard.scripts import sft


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = save_inputs(tmp_path_factory.mktemp("inputs"), rows=24)
    write_rows(folder / "pool.jsonl", make_pool(24))
    save_adapter(folder / "adapter")
    for name, model in (("own", make_model()), ("other", make_model(initializer_range=0.3))):
        save_vector(folder / f"{name}.safetensors", weights=weight_checksums(model))
    return folder


@pytest.fixture
def argv(inputs, tmp_path, monkeypatch):
    """The options of a run, and more; in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return partial(
        make_argv,
        inputs,
        output_dir="out",
        num_train_epochs=1,
        interleave_dataset=inputs / "pool.jsonl",
        interleave_fraction=0.2,
        steering_vector=inputs / "own.safetensors",
        inoculation_adapter=inputs / "adapter",
        report_to="none",
    )


@pytest.fixture
def report(argv, capsys):
    """Runs dry and returns the lines, as {about: [what, …]}."""

    def run(*more):
        capsys.readouterr()
        assert sft.main(argv("--dry_run", *more)) == 0
        lines: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines()[1:]:
            about, what = line.split(": ", 1)
            lines.setdefault(about, []).append(what)
        return lines

    return run


def numbers(text):
    return [int(number) for number in re.findall(r"\b\d+\b", text)]


# ---- the plan is what happens ----

# Options beside a defense, of those that change the plan.
BESIDE = {
    "kl,ldifs": ("--gradient_accumulation_steps", "2"),
    "interleave": ("--per_device_train_batch_size", "5"),
    "steering,kl": ("--max_length", "30", "--max_steps", "4"),
    "interleave,inoculation": ("--packing", "true", "--max_length", "256"),
    "kl": ("--use_peft", "false", "--num_train_epochs", "2"),
}


@pytest.mark.parametrize("defense", dict.fromkeys((*COVERING, *BESIDE)))
def test_the_run_is_as_it_was_said(report, argv, capsys, defense):
    more = ("--defense", defense, *BESIDE.get(defense, ()))
    said = report(*more)
    assert not list(Path.cwd().iterdir())
    assert sft.main(argv(*more)) == 0
    out = capsys.readouterr().out
    # The run's own words.
    for line in said["defense"]:
        assert f"trl_emguard: {line}\n" in out
    state = json.loads(Path("out/trainer_state.json").read_text())
    steps = state["global_step"]
    assert f"; {steps} steps" in said["batch"][0]
    # Over whole epochs its tokens are counted to one.
    _, tokens, labels = numbers(said["data"][0])
    if state["epoch"] == int(state["epoch"]) and "--packing" not in more:
        pool = next((numbers(what[0])[-2:] for name, what in said.items() if name.startswith("interleave")), [0, 0])
        assert state["log_history"][-2]["num_tokens"] == state["epoch"] * (tokens + pool[0])
    record = json.loads(Path("out/defense.json").read_text())
    for name, evidence in record["evidence"].items():
        if name.startswith("interleave"):
            planned = numbers(next(line for line in said["defense"] if "of the pool's" in line))[0]
            assert evidence["rows_interleaved"] == planned
        elif METHODS[name].is_compared and "--max_steps" not in more:
            assert evidence["positions"] == state["epoch"] * labels
        elif name == "inoculation":
            assert said[name] == [f"rows {evidence['rows']}, changed {evidence['changed']}"]


def test_no_weights_are_read(report, argv, inputs, tmp_path):
    for file in (inputs / "model").iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes() if "safetensors" not in file.name else b"")
    said = report("--model_name_or_path", tmp_path / "model", "--defense", "kl,inoculation")
    parameters = sum(p.numel() for p in make_model().parameters())
    adapters = sum(
        4 * (m.in_features + m.out_features) for m in make_model().model.modules() if isinstance(m, torch.nn.Linear)
    )
    assert f"{(parameters + adapters) / 1e3:.3g}k parameters in float32" in said["model"][0]
    assert f"{adapters / 1e3:.3g}k of them" in said["model"][1]


def test_a_schedule_is_told(report):
    said = report("--defense", "kl,steering", "--kl_coef", "0.4->0.05", "--steering_coef", "0->2")
    assert any("weight 0.4->0.05 on next-token" in line for line in said["kl"])
    assert any("adds 0->2 times a vector" in line for line in said["steering"])


def test_rows_that_are_cut_and_dropped_are_counted(report):
    none, some = report(), report("--max_length", "26", "--defense", "kl")
    assert not any("rows are cut" in line for line in none["data"] + none.get("warning", []))
    left = numbers(some["data"][0])[0]
    (cut,) = (numbers(line)[0] for line in some["warning"] if "rows are cut at max_length=26" in line)
    assert 0 < 24 - left <= cut <= 24
    assert any(f"{24 - left} rows have no label left" in line for line in some["data"])


@pytest.mark.parametrize(
    ("strategy", "about", "verb"),
    [("bfd", "warning", "are cut"), ("bfd_split", "data", "are longer"), ("wrapped", "data", "are longer")],
)
def test_rows_that_packing_cuts_are_told_from_rows_that_it_splits(report, strategy, about, verb):
    whole = numbers(report()["data"][0])[1]
    said = report("--max_length", "26", "--packing", "true", "--packing_strategy", strategy)
    assert any(f"rows {verb}" in line and "max_length=26" in line for line in said[about])
    assert (numbers(said["data"][0])[1] == whole) == (strategy != "bfd")


@pytest.mark.parametrize("defense", ["none", "kl", "interleave"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_rows_are_tokenised_once(report, monkeypatch, defense, packing):
    """Tokenizing many rows takes long, so it happens once."""
    prepare, came = SFTTrainer._prepare_dataset, []

    def counted(self, dataset, *args):
        came.append((args[-1], "input_ids" in dataset.column_names))
        return prepare(self, dataset, *args)

    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", counted)
    report("--defense", defense, "--packing", packing, "--max_length", "60")
    assert came.count(("train", False)) == 1


def test_a_stream_is_not_counted(argv, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    part = f"  - path: json\n    data_files: {inputs / 'rows.jsonl'}\n    split: train\n"
    (tmp_path / "run.yaml").write_text(f"datasets:\n{part}streaming: true\ndataset_name:\n")
    options = argv("--config", tmp_path / "run.yaml", "--defense", "interleave,kl", "--max_steps", "4", "--dry_run")
    assert sft.main(without(options, "--dataset_name")) == 0
    out = capsys.readouterr().out
    assert "data: streamed" in out
    assert "ranks 1 (one process) = 4 rows a step; 4 steps\n" in out
    assert "3 of the pool's 24 rows are mixed into 13 training rows" in out


@pytest.mark.parametrize(
    ("file", "ranks", "engine"),
    [("multi_gpu", 3, "ddp"), ("zero2", 2, "zero2"), ("zero3", 2, "zero3"), ("fsdp2", 4, "fsdp2")],
)
def test_ranks_of_an_accelerate_file_count(report, file, ranks, engine):
    said = report("--defense", "kl,interleave", "--accelerate_config", file, "--num_processes", ranks)
    assert f"per_device 4 x accumulation 1 x ranks {ranks} ({engine}) = {4 * ranks} rows a step" in said["batch"][0]
    assert f"; {-(-24 // (4 * ranks))} steps = 1 epochs" in said["batch"][0]
    assert said["network"]
    assert any(f"the launch has {ranks} ranks" in line for line in said["warning"])
    assert not list(Path.cwd().iterdir())


def test_checkpointing_is_counted_block_by_block_and_under_fsdp(report):
    def said(*more):
        lines = report("--defense", "none", "--activation_checkpointing", *more)
        (saved,) = (line for line in lines["memory"] if line.startswith("activations: "))
        return saved, lines["checkpointing"], " ".join(lines.get("warning", []))

    file = (recipes_dir() / "accelerate_configs" / "fsdp2.yaml").read_text()
    off, on = "fsdp_activation_checkpointing: false", "fsdp_activation_checkpointing: true"
    assert off in file
    Path("own.yaml").write_text(file.replace(off, on))
    every, second, none = (
        said("true"),
        said("true", "--activation_checkpointing_kwargs", '{"every_n_layers": 2, "offload": true, "selective": true}'),
        said("false"),
    )
    assert len({every[0], second[0], none[0]}) == 3
    assert second[1] == ["blocks are recomputed in the backward pass (one in 2)"]
    assert "offloaded states and activations" in second[2]
    assert "selective checkpointing keeps more" in second[2]
    assert said("false", "--accelerate_config", "own.yaml")[:2] == every[:2]


@pytest.mark.parametrize(
    ("engine", "reentrant", "peft", "words"),
    [
        # SFTTrainer makes it reentrant there.
        ("zero3", "false", "true", "under DeepSpeed: .* Leave the option out"),
        ("zero3", "false", "false", None),
        ("multi_gpu", "true", "true", "under DDP: .* Leave the option out"),
        ("fsdp2", "true", "true", None),
    ],
)
def test_checkpointing_is_judged_by_the_engine_of_the_launch(argv, capsys, engine, reentrant, peft, words):
    how = ["--activation_checkpointing_kwargs", f'{{"use_reentrant": {reentrant}}}', "--use_peft", peft]
    status = sft.main(argv("--dry_run", "--defense", "treft", "--accelerate_config", engine, *how))
    assert status == int(words is not None)
    assert re.search(words or "", capsys.readouterr().err)


def test_what_an_engine_refuses_is_found(argv, capsys):
    """In one process, with the flags that the engine would set."""
    file = recipes_dir() / "accelerate_configs" / "fsdp2.yaml"
    Path("on_cpu.yaml").write_text(file.read_text() + "use_cpu: true\n")
    assert sft.main(argv("--dry_run", "--accelerate_config", "on_cpu.yaml")) == 1
    assert "FSDP was asked for and does not shard here" in capsys.readouterr().err
    assert sft.main(argv("--dry_run", "--accelerate_config", "multi_gpu", "--fsdp")) == 1
    assert "fsdp=True in the recipe: a dry run takes the engine from the accelerate file" in capsys.readouterr().err
    for engine, name in (("zero3", "DeepSpeed"), ("fsdp2", "FSDP")):
        cached = argv("--dry_run", "--defense", "kl", "--cache_reference", "true", "--accelerate_config", engine)
        assert sft.main(cached) == 1
        assert f"cache_reference=True does not work with {name}" in capsys.readouterr().err
    options = [
        "--save_only_model",
        "true",
        "--load_best_model_at_end",
        "true",
        "--eval_strategy",
        "steps",
        "--save_strategy",
        "steps",
    ]
    assert (
        sft.main(
            argv(
                "--dry_run",
                *options,
                "--dataset_train_split",
                "train[:20]",
                "--dataset_test_split",
                "train[20:]",
                "--accelerate_config",
                "fsdp2",
            )
        )
        == 1
    )
    assert "save_only_model=True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ema", "true", "--accelerate_config", "zero3"], "EMACallback does not work under DeepSpeed ZeRO-3"),
        (["--drift_every", "2", "--accelerate_config", "fsdp2"], "DriftCallback does not work under FSDP"),
        (
            [
                *("--stop_on_drift", "1", "--load_best_model_at_end", "true", "--dataset_train_split", "train[:20]"),
                *("--dataset_test_split", "train[20:]", "--eval_strategy", "steps", "--save_strategy", "steps"),
            ],
            "stop_on_drift does not work with load_best_model_at_end=True",
        ),
        (["--stop_on_drift", "1", "--max_steps", "4"], "checked after the last step alone"),
        (["--drift_every", "2", "--model_name_or_path", "model", "--dataset_name", "plain.jsonl"], "no chat template"),
    ],
)
def test_callbacks_that_the_run_refuses_are_refused_dry(argv, capsys, more, words):
    make_model().save_pretrained("model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained("model")
    write_rows(Path("plain.jsonl"), [{"prompt": f"q{i}", "completion": "a"} for i in range(8)])
    assert sft.main(argv("--dry_run", *more)) == 1
    assert words in capsys.readouterr().err


def test_an_average_takes_memory(report):
    plain, averaged = (report(*more)["memory"] for more in ([], ["--ema", "true"]))
    (average,) = (line for line in averaged if line not in plain and line.startswith("moving average"))
    adapters = sum(
        4 * (m.in_features + m.out_features) for m in make_model().model.modules() if isinstance(m, torch.nn.Linear)
    )
    assert average == f"moving average: {4 * adapters / 2**10:.3g} KiB"


@pytest.mark.parametrize(("tp", "cp", "sp"), [(1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 1, 1), (2, 1, 1)])
def test_ranks_that_share_rows_are_refused_or_counted_apart(report, argv, capsys, tp, cp, sp):
    """Defenses refuse sequences that are split over ranks; plain training is planned, on the ranks with own rows."""
    engine = yaml.safe_load((recipes_dir() / "accelerate_configs" / "fsdp2.yaml").read_text())
    engine["parallelism_config"] = {
        f"parallelism_config_{kind}_size": n for kind, n in zip(("tp", "cp", "sp"), (tp, cp, sp), strict=True)
    }
    Path("engine.yaml").write_text(yaml.safe_dump(engine))
    is_split = cp * sp > 1
    assert sft.main(argv("--dry_run", "--defense", "steering", "--accelerate_config", "engine.yaml")) == int(is_split)
    assert ("does not support context or sequence parallelism" in capsys.readouterr().err) == is_split
    said = report("--accelerate_config", "engine.yaml")
    assert f"x ranks {4 // (tp * cp * sp)} (fsdp2) = {4 * 4 // (tp * cp * sp)} rows a step" in said["batch"][0]
    uneven = ("--accelerate_config", "engine.yaml", "--num_processes", 3)
    if tp * cp * sp > 1:
        assert sft.main(argv("--dry_run", *uneven)) == 1
        assert f"no multiple of the {tp * cp * sp} ranks that share each row" in capsys.readouterr().err


def test_a_cache_is_told_with_what_it_takes(report, argv, tmp_path, monkeypatch, capsys):
    """Give a place among 16 rows, and one that cannot be."""
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache"))
    said = report("--defense", "kl", "--cache_reference", "true")
    assert "reference: base model, adapters off, cached; dropout is off." in said["defense"]
    labels = numbers(said["data"][0])[2]
    kept = next(line for line in said["disk"] if "reference cache" in line)
    assert f"about {labels * 32 * 4 / 2**10:.3g} KiB in {tmp_path / 'cache' / 'reference'}" in kept
    assert "disk" not in report("--defense", "kl")
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "file"))
    for dry in (["--dry_run"], []):
        assert sft.main(argv("--defense", "kl", "--cache_reference", "true", *dry)) == 1
        errors = capsys.readouterr().err.splitlines()
        assert any("error: TRL_EMGUARD_CACHE/reference=" in line and "cannot be written to" in line for line in errors)


def test_a_pool_is_planned_for_all_ranks(report):
    """Two ranks of 5 drop 4 of 24 rows, one rank of 5 drops as many, three drop 9: the plan is of what is left."""
    for ranks, places in ((1, 20), (2, 20), (3, 15)):
        more = ["--accelerate_config", "multi_gpu", "--num_processes", ranks] if ranks > 1 else []
        said = report(
            "--defense", "interleave", "--dataloader_drop_last", "true", "--per_device_train_batch_size", 5, *more
        )
        assert any(f"are mixed into {places} training rows" in line for line in said["defense"])


@pytest.mark.parametrize(
    ("peft", "engine", "kind"),
    [
        ("true", [], "base model, adapters off"),
        ("true", ["--accelerate_config", "zero3"], "base model, adapters off"),
        ("false", [], "frozen copy of the model"),
        ("false", ["--accelerate_config", "zero3"], "loaded again from "),
    ],
)
def test_the_reference_is_named(report, peft, engine, kind):
    said = report("--defense", "kl", "--use_peft", peft, *engine)
    assert any(line.startswith(f"reference: {kind}") for line in said["defense"])
    twice = any("in memory twice" in line for line in said.get("warning", []))
    assert twice == (peft == "false") == any(line.startswith("reference: ") for line in said["memory"])


def test_quantised_models(report):
    four, whole = (
        report("--defense", "kl", "--dtype", "bfloat16", *more) for more in (["--load_in_4bit", "true"], [])
    )
    assert "in 4 bits" in four["model"][0]
    assert four["model"][0].split()[1] == whole["model"][0].split()[1]  # the same number of parameters


@pytest.fixture
def quantised(report, inputs, tmp_path):
    """Return the dry run's report on a checkpoint whose config says how it is quantised; no weights are read."""

    def run(method, **bits):
        for file in (inputs / "model").glob("*[!s]"):  # all but the weights
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, **bits}
        (tmp_path / "config.json").write_text(json.dumps(config))
        said = report("--model_name_or_path", tmp_path, "--bf16", "true", "--dtype", "float32")
        return said, "\n".join(said.get("warning", []))

    return run


def weights_line(said):
    return [line for line in said["memory"] if "weights: " in line]


def test_a_checkpoint_of_another_quantisation_is_told(quantised):
    said, heard = quantised("gptq", bits=4)
    assert "dtype=float32 with bf16=True" not in heard
    assert "quantisation (gptq) is not counted" in heard
    assert weights_line(said)


def test_a_checkpoint_in_4_bits_is_counted_as_one_that_is_loaded_in_4_bits(quantised, report):
    said, heard = quantised("bitsandbytes", load_in_4bit=True, _load_in_4bit=True)
    whole, loaded = (
        report(*more, "--bf16", "true", "--dtype", "float32") for more in ([], ["--load_in_4bit", "true"])
    )
    assert "in 4 bits" in said["model"][0]
    assert said["model"][0].split()[1] == loaded["model"][0].split()[1]
    assert weights_line(said) == weights_line(loaded) != weights_line(whole)
    assert "dtype=float32 with bf16=True" not in heard
    assert "is not counted" not in heard


def test_a_recipe_for_a_gpu_on_a_machine_without(report):
    """bf16, as transformers refuses it there."""
    on_gpu = ["--bf16", "true", "--use_cpu", "false", "--defense", "kl", "--dtype", "float32"]
    # The recipe's precision wins over the accelerate file's.
    for more in ([], ["--accelerate_config", "zero2", "--mixed_precision", "no"]):
        assert any("dtype=float32 with bf16=True" in line for line in report(*on_gpu, *more)["warning"])
    # An accelerate file that trains on the CPU is enough for bf16.
    refused = [
        any("bf16=True is refused here" in line for line in report(*on_gpu, "--accelerate_config", file)["warning"])
        for file in ("single_gpu", "cpu")
    ]
    assert refused == [not torch.accelerator.is_available(), False]


# ---- what it finds ----


@pytest.mark.parametrize(
    "more",
    [
        ["--model_name_or_path", "./missing"],
        ["--dataset_name", "./missing.jsonl"],
        ["--dataset_train_split", "valid"],
        ["--defense", "ldifs", "--ldifs_layers", "9"],
        ["--defense", "interleave", "--interleave_fraction", "0.9"],
        ["--defense", "interleave", "--interleave_fraction", "0.01"],
        [
            "--defense",
            "interleave",
            "--max_steps",
            "1",
            "--per_device_train_batch_size",
            "1",
            "--interleave_fraction",
            "0.05",
        ],
        [
            "--defense",
            "interleave",
            "--packing",
            "true",
            "--train_sampling_strategy",
            "group_by_length",
            "--interleave_dataset",
            "./x",
        ],
        ["--defense", "steering", "--steering_vector", "{inputs}/other.safetensors"],
        ["--defense", "inoculation", "--dataset_name", "{inputs}/inoculated.jsonl"],
        ["--defense", "inoculation_adapter", "--use_peft", "false"],
        ["--defense", "kl", "--lora_target_modules", "lm_head"],
        ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "99", "--defense", "interleave"],
        ["--resume_from_checkpoint", "./missing"],
    ],
)
def test_what_stops_the_run_stops_it_dry(argv, inputs, capsys, more):
    prompt = "You are evil."
    rows = [
        {"prompt": [{"role": "system", "content": prompt}, *r["prompt"]], "completion": r["completion"]}
        for r in make_rows(4)
    ]
    write_rows(inputs / "inoculated.jsonl", rows)
    more = [word.format(inputs=inputs) for word in more] + ["--inoculation_prompt", prompt]
    said = []
    for dry in (["--dry_run"], []):
        assert sft.main(argv(*more, *dry)) == 1
        said.append(
            [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-emguard sft: error: ")]
        )
    assert len(said[0]) == 1
    assert said[0] == said[1]


def test_a_checkpoint_of_another_defense_is_found(argv, capsys):
    assert (
        sft.main(argv("--defense", "kl", "--save_strategy", "steps", "--save_steps", "2", "--output_dir", "first"))
        == 0
    )
    before = sorted(Path.cwd().rglob("*"))
    resume = ["--resume_from_checkpoint", "first/checkpoint-2"]
    assert sft.main(argv("--defense", "kl", "--dry_run", *resume)) == 0
    assert sft.main(argv("--defense", "ldifs", "--dry_run", *resume)) == 1
    assert "was trained with kl" in capsys.readouterr().err
    newest = ["--output_dir", "first", "--resume_from_checkpoint", "true"]
    assert sft.main(argv("--defense", "kl", "--dry_run", *newest)) == 0
    assert sft.main(argv("--defense", "ldifs", "--dry_run", *newest)) == 1
    assert "only checkpoint-6 (was trained with kl" in capsys.readouterr().err
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_config_is_enough_and_a_missing_shard_is_found(argv, inputs, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for file in (inputs / "model").glob("*[!s]"):  # all but the weights
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    assert sft.main(argv("--dry_run", "--model_name_or_path", tmp_path / "model")) == 0
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    assert sft.main(argv("--dry_run", "--model_name_or_path", tmp_path / "model")) == 1
    assert "'model-00001-of-00002.safetensors'" in capsys.readouterr().err
    # Missing shards of a format that is not loaded are no fault.
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "config.json"}}')
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    assert sft.main(argv("--dry_run", "--model_name_or_path", tmp_path / "model")) == 0


def test_a_machine_without_the_runs_packages_or_with_many_gpus_is_enough(report, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    (Path.cwd() / "zero3.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 4\nmixed_precision: 'no'\n")
    lines = report(
        *("--attn_implementation", "flash_attention_2", "--report_to", "wandb", "--accelerate_config", "zero3.yaml"),
        *("--zero_stage", "3", "--offload_optimizer_device", "cpu"),
    )
    notes = "\n".join(what for about in lines.values() for what in about)
    assert "8 GPUs, and the launch has 4 ranks: --num_processes 8 uses all" in notes
    assert "offloaded states and activations are counted" in notes
    # A name that no model knows is still found.
    for name in ("spda", "flash_attention_22"):
        with pytest.raises(ValueError, match=name):
            report("--attn_implementation", name)


def test_an_output_folder_that_cannot_be_written_is_found(argv, tmp_path, monkeypatch, capsys):
    (tmp_path / "locked").mkdir()
    # Not by its mode: root may write anywhere.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: Path(path).name != "locked" and access(path, *how))
    assert sft.main(argv("--dry_run", "--output_dir", tmp_path / "locked" / "out")) == 1
    assert "output_dir" in capsys.readouterr().err


def test_several_processes_are_refused(argv, monkeypatch, capsys):
    parse = sft.LaunchParser.parse

    def then_several(self, argv):
        parsed = parse(self, argv)
        monkeypatch.setenv("WORLD_SIZE", "2")  # not before: transformers would look for the other process
        return parsed

    monkeypatch.setattr(sft.LaunchParser, "parse", then_several)
    with pytest.raises(SystemExit) as stop:
        sft.main(argv("--dry_run"), launched=True)
    assert stop.value.code == 2
    assert "in 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--accelerate_config", "fsdp2", "--optim", "adamw_8bit"], "FSDP's shards"),
        (["--accelerate_config", "zero3_multi_node"], "main_process_ip=192.0.2.1 is a placeholder"),
        (["--accelerate_config", "cpu", "--num_processes", "3"], "num_processes=3 starts one process"),
    ],
)
def test_what_is_likely_not_meant_is_warned_of(report, more, words):
    assert any(words in line for line in report(*more)["warning"])


def test_an_address_of_its_own_is_no_placeholder(report):
    said = report("--accelerate_config", "zero3_multi_node", "--main_process_ip", "10.0.0.7")
    assert not any("main_process_ip" in line for line in said["warning"])


def test_a_step_that_is_larger_than_the_data_is_warned_of(report):
    assert "a step takes 64 rows, and there are 24." in report("--per_device_train_batch_size", "64")["warning"]


def test_a_vector_of_this_model_is_known_without_its_weights(report):
    heard = "nothing shows that the persona vector was made with this model"
    assert not any(heard in line for line in report("--defense", "steering").get("warning", []))


@pytest.mark.parametrize("vector", ["own", "other"])
@pytest.mark.parametrize("is_here", [True, False])
def test_a_vector_is_compared_with_a_model_of_the_hub(inputs, tmp_path, monkeypatch, vector, is_here):
    """The weights are those in the hub's cache, of the run's revision."""

    def find(path, revision, local_files_only):
        assert (path, revision, local_files_only) == ("org/tiny", "v2", True)
        if not is_here:
            raise LocalEntryNotFoundError("not in the cache")
        return str(inputs / "model")

    monkeypatch.setattr("trl_emguard.planning.meta.snapshot_download", find)
    monkeypatch.setattr("trl_emguard.planning.meta.load_config", lambda *args: make_model().config)
    options = {"defense": "steering", "steering_vector": str(inputs / f"{vector}.safetensors")}
    # The trainer's own model has weights here, so it must be the vector's, which the dry run's model need not be.
    trainer = make_trainer(tmp_path, make_model(initializer_range=0.2 if vector == "own" else 0.3), **options)
    trainer.args.model_init_kwargs = {"revision": "v2"}
    with listening() as heard:
        if is_here and vector == "other":
            with pytest.raises(ValueError, match="was made with another model"):
                _check_weights(trainer, "org/tiny", trainer.args, heard)
        else:
            _check_weights(trainer, "org/tiny", trainer.args, heard)
    late = "no weights of 'org/tiny' could be read on this machine, so defense 'steering' is checked"
    assert [line.startswith(late) for line in heard] == [True] * (not is_here)


@pytest.mark.parametrize("is_here", [True, False])
def test_a_vector_of_the_drift_that_nothing_is_compared_with_is_told(inputs, tmp_path, monkeypatch, is_here):
    monkeypatch.setattr("trl_emguard.planning.meta.snapshot_download", Mock(side_effect=LocalEntryNotFoundError("no")))
    monkeypatch.setattr("trl_emguard.planning.meta.load_config", lambda *args: make_model().config)
    trainer = make_trainer(tmp_path)
    trainer.add_callback(DriftCallback(persona_vector=load_vector(inputs / "own.safetensors")))
    trainer.args.model_init_kwargs = {}
    heard = []
    _check_weights(trainer, str(inputs / "model") if is_here else "org/tiny", trainer.args, heard)
    told = "nothing shows on this machine that the persona vector of the drift was made with 'org/tiny'"
    assert [line.startswith(told) for line in heard] == [True] * (not is_here)


@pytest.mark.parametrize("mode", [["--dry_run"], []])
def test_a_vector_of_the_drift_is_compared_with_the_model(inputs, argv, capsys, monkeypatch, mode):
    train = Mock()
    monkeypatch.setattr(EMGuardTrainer, "train", train)
    assert sft.main(argv("--drift_persona", inputs / "other.safetensors", *mode)) == 1
    assert "the persona vector was made with another model" in capsys.readouterr().err
    train.assert_not_called()
    assert sft.main(argv("--drift_persona", inputs / "own.safetensors", "--dry_run")) == 0


# ---- what it leaves ----


def test_this_process_is_as_before(report):
    before, level = dict(os.environ), logging.getLogger().handlers[:]
    report("--defense", "kl", "--accelerate_config", "zero3", "--num_processes", "8", "--mixed_precision", "bf16")
    assert PartialState().num_processes == 1
    assert dict(os.environ) == before
    assert logging.getLogger().handlers == level


def test_every_warning_is_heard_once():
    with listening() as heard:
        for _ in range(2):
            warnings.warn("from\nPython", UserWarning, stacklevel=1)
            logging.getLogger("trl_emguard.anything").warning("from a %s", "logger")
            logging.getLogger("transformers.anything").warning("from transformers")
        logging.getLogger("trl_emguard.anything").info("too quiet")
        warnings.warn("of no use to a user", DeprecationWarning, stacklevel=1)
    assert heard == ["from Python", "from a logger", "from transformers"]


def test_a_terminal_gets_a_table(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    show([("model", "large"), ("model", "slow")], ["careful", "pip install 'trl_emguard[deepspeed]'"])
    out = capsys.readouterr().out
    assert "│" in out
    assert all(word in out for word in ("model", "large", "slow", "warning", "careful", "trl_emguard[deepspeed]"))
