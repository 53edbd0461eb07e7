"""Test SIGKILL: the next run resumes from the newest complete checkpoint, and ends as an uninterrupted one."""

import hashlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from forks import BEGUN, Group, die, die_at_write
from methods import reads, run_options
from peft import get_peft_model
from tiny import lora, make_model, make_pool, make_rows, make_tokenizer, make_trainer, save_model
from transformers import TrainerCallback

from trl_emguard.checkpoints.resume import newest_whole_checkpoint
from trl_emguard.guard.forward import ReferenceGuard
from trl_emguard.io.recipes import recipes_dir
from trl_emguard.persona import extract_vector
from trl_emguard.persona.traits import Trait
from trl_emguard.reference import cache as reference_cache
from trl_emguard.selection import score
from trl_emguard.selection.scored import read_scores


STEPS = 8
# Tuning and options of the runs that are killed.
RUNS = {
    "kl,interleave+": ("lora", {"defense": "kl,interleave+", "save_total_limit": 1}),
    "ldifs": ("full", {"defense": "ldifs", "save_total_limit": 2}),
    "none": ("lora", {"defense": "none", "save_total_limit": 1}),
    "packed": ("lora", {"defense": "interleave", "packing": True, "max_length": 48, "packing_strategy": "wrapped"}),
}
LOGGED = {
    "loss", "loss_ce", "kl", "ldifs", "loss_finetune", "loss_interleaved", "interleaved_fraction", "grad_norm",
    "learning_rate",
}  # fmt: skip


class Pace(TrainerCallback):
    """Callback that reports the beginning of training, and gives a killer time."""

    def __init__(self, folder, seconds):
        self.folder, self.seconds = folder, seconds

    def on_train_begin(self, args, state, control, **kwargs):
        (self.folder / BEGUN).touch()

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


def train(folder, run, ranks=1, rank=0, pause=0.0, fault=None, **more):
    """Train, from the newest complete checkpoint if there is one, and write `result.json`."""
    tuning, options = RUNS[run]
    options = {
        **run_options(options["defense"], folder),
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        **options,
        **more,
    }
    options["per_device_train_batch_size"] = 4 // ranks
    trainer = make_trainer(
        folder / "out", peft=lora() if tuning == "lora" else None, ddp_backend="gloo" if ranks > 1 else None, **options
    )
    assert trainer.accelerator.num_processes == ranks
    trainer.add_callback(Pace(folder, pause))
    writes = [] if fault is None else die_at_write(*fault)
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError as error:
        if "to start anew" not in str(error):
            raise
        trainer.train()
    if rank == 0:
        history = [
            {key: entry[key] for key in entry.keys() & LOGGED}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        weights = hashlib.sha256(
            b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
        ).hexdigest()
        result = {"history": history, "weights": weights, "writes": writes}
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


def result(folder):
    made = json.loads((folder / "result.json").read_text())
    return made["history"], made["weights"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return the result of a run that nobody kills, and the list of its writes."""
    made = {}

    def run(name, ranks=1):
        if (name, ranks) not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            Group(folder, lambda rank: train(folder, name, ranks, rank, fault=(0,)), ranks).finish()
            history = result(folder)[0]
            assert len(history) == STEPS
            assert reads(RUNS[name][1]["defense"], "pool") == any(entry.get("loss_interleaved") for entry in history)
            made[name, ranks] = result(folder), json.loads((folder / "result.json").read_text())["writes"]
        return made[name, ranks]

    return run


def assert_goes_on(folder, run, expected, ranks=1):
    """Require that the next run ends as an uninterrupted one, and does not begin anew without need."""
    whole, corrupt = newest_whole_checkpoint(folder / "out")
    group = Group(folder, lambda rank: train(folder, run, ranks, rank), ranks)
    group.finish()
    assert result(folder) == expected
    assert (("holds checkpoints that are corrupt" in group.output()) == bool(corrupt)) or whole is None
    assert newest_whole_checkpoint(folder / "out") == (STEPS, {})
    return whole


def die_writing(folder, run, number, ranks=1, victim=0, seed=0):
    def work(rank):
        train(folder, run, ranks, rank, fault=(number if rank == victim else 0, seed))

    group = Group(folder, work, ranks)
    assert group.wait_killed(), group.output()


# ---- while a checkpoint is written ----


@pytest.mark.long
@pytest.mark.parametrize("share", [0.6, 0.97])
def test_a_kill_while_a_checkpoint_is_written(tmp_path, unbroken, share):
    expected, writes = unbroken("kl,interleave+")
    die_writing(tmp_path, "kl,interleave+", round(share * len(writes)), seed=int(share * 100))
    assert assert_goes_on(tmp_path, "kl,interleave+", expected) is not None


@pytest.mark.faults
@pytest.mark.parametrize("run", ["kl,interleave+", "ldifs"])
def test_a_kill_at_every_write_of_two_checkpoints(tmp_path, unbroken, run):
    """Kill at each write of two checkpoints. The first has none before it to resume from; the second deletes one."""
    expected, writes = unbroken(run)
    saves = STEPS // 2
    began = set()
    for number in range(1, 2 * (len(writes) // saves) + 2):
        folder = tmp_path / str(number)
        die_writing(folder, run, number, seed=number)
        began.add(assert_goes_on(folder, run, expected))
    assert began == {None, 2, 4}


# ---- at any moment ----


def kill_at_random(folder, run, rng, ranks=1, victims=None, kills=3):
    """Kill a run, and those that resume from it, so many times or until one finishes."""
    killed = 0
    for _ in range(kills):
        group = Group(folder, lambda rank: train(folder, run, ranks, rank, pause=0.05), ranks)
        group.wait_begun()
        time.sleep(rng.uniform(0, 0.7))
        group.kill(victims)
        killed += group.wait_killed()
    return killed


@pytest.mark.long
def test_a_kill_at_a_random_moment(tmp_path, unbroken):
    assert kill_at_random(tmp_path, "kl,interleave+", random.Random(0), kills=1)
    assert_goes_on(tmp_path, "kl,interleave+", unbroken("kl,interleave+")[0])


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("run", list(RUNS))
def test_kills_at_random_moments(tmp_path, unbroken, run, seed):
    assert kill_at_random(tmp_path, run, random.Random(f"{run}{seed}"))
    assert_goes_on(tmp_path, run, unbroken(run)[0])


@pytest.mark.faults
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
@pytest.mark.parametrize("run", ["kl,interleave+", "ldifs"])
def test_kills_of_ranks(tmp_path, unbroken, run, victims):
    assert kill_at_random(tmp_path, run, random.Random(f"{run}{victims}"), ranks=2, victims=victims, kills=2)
    assert_goes_on(tmp_path, run, unbroken(run, 2)[0], ranks=2)


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "share"), [(1, 0.5), (0, 0.5), (0, 0.7)])
def test_a_kill_of_a_rank_that_writes(tmp_path, unbroken, victim, share):
    """Kill one of two ranks while it writes. Rank 1 writes only its random state."""
    expected, writes = unbroken("kl,interleave+", 2)
    die_writing(tmp_path, "kl,interleave+", 2 if victim == 1 else round(share * len(writes)), 2, victim)
    assert assert_goes_on(tmp_path, "kl,interleave+", expected, ranks=2) in ((2,) if victim == 1 else (2, 4))


# ---- as users start them ----


LAUNCH = [
    os.sys.executable, "-m", "accelerate.commands.launch", "--config_file",
    str(recipes_dir() / "accelerate_configs/cpu.yaml"),
    "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "trl_emguard.scripts.sft",
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["a rank", "the group"])
def test_a_launched_run_that_is_killed(tmp_path, victim):
    save_model(tmp_path / "model")
    for name, rows in (("rows", make_rows()), ("pool", make_pool())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "rows.jsonl", "max_steps": 12,
        "save_steps": 2,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": "true",
        "bf16": "false",
        "use_peft": "true", "lora_r": 4, "lora_dropout": 0, "lora_target_modules": "all-linear",
        "save_strategy": "steps",
        "save_total_limit": 1, "defense": "kl,interleave+", "interleave_dataset": tmp_path / "pool.jsonl",
        "interleave_fraction": 0.3,
    }  # fmt: skip

    def start(output, *more):
        command = LAUNCH + [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        log = (tmp_path / f"{output}.txt").open("a")
        return subprocess.Popen(
            [*command, "--output_dir", str(tmp_path / output), *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def finish(process, output):
        # At the exit of the interpreter gloo's threads abort a rank now and then.
        log = tmp_path / f"{output}.txt"
        assert process.wait(240) == 0 or "Model saved" in log.read_text(), log.read_text()[-6000:]
        history = json.loads((tmp_path / output / "trainer_state.json").read_text())["log_history"]
        return [{key: entry[key] for key in entry.keys() & LOGGED} for entry in history if "loss" in entry]

    expected = finish(start("unbroken"), "unbroken")
    process = start("killed")
    end = time.monotonic() + 120
    while newest_whole_checkpoint(tmp_path / "killed")[0] is None:
        assert process.poll() is None, (tmp_path / "killed.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(random.Random(victim).uniform(0, 0.3))
    ranks = psutil.Process(process.pid).children(recursive=True)
    for one in ranks[-1:] if victim == "a rank" else [*ranks, psutil.Process(process.pid)]:
        one.kill()
    assert process.wait(60) != 0
    psutil.wait_procs(ranks, 60)
    assert newest_whole_checkpoint(tmp_path / "killed")[0] is not None
    assert finish(start("killed", "--resume_from_checkpoint", "true"), "killed") == expected


# ---- scores, rollouts, the reference's states ----


def kill_work(folder, work, rng, longest):
    group = Group(folder, work)
    group.wait_begun()
    time.sleep(rng.uniform(0, longest))
    group.kill()
    return group.wait_killed()


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_scores(tmp_path, monkeypatch, seed):
    torch.manual_seed(10)
    get_peft_model(make_model(), lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    batch_nll, passes = score.batch_nll, tmp_path / "passes"

    def slow(*args):
        with passes.open("a") as file:
            file.write(".")
        (tmp_path / BEGUN).touch()
        time.sleep(0.03)
        return batch_nll(*args)

    monkeypatch.setattr(score, "batch_nll", slow)

    def work(output):
        model = score.load_misaligned(make_model(), {"bad": str(tmp_path / "adapter")})
        score.score_pool(model, make_tokenizer(), make_rows(32), ["bad"], batch_tokens=1, output=tmp_path / output)

    work("whole.parquet")
    passes.unlink()
    rng = random.Random(seed)
    for _ in range(3):
        kill_work(tmp_path, lambda rank: work("killed.parquet"), rng, 0.5)
    Group(tmp_path, lambda rank: work("killed.parquet")).finish()
    (rows, info), (expected, expected_info) = (
        read_scores(tmp_path / name) for name in ("killed.parquet", "whole.parquet")
    )
    assert rows.to_list() == expected.to_list()
    assert info == expected_info
    assert len(passes.read_text()) <= 32 + 3  # at most one row per kill is scored again
    assert not (tmp_path / "killed.parquet.parts").exists()


@pytest.mark.faults
@pytest.mark.parametrize("after", ["before", "after"])
def test_a_kill_while_the_scores_are_finished(tmp_path, monkeypatch, after):
    torch.manual_seed(10)
    get_peft_model(make_model(), lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")

    def work(output, dies=False):
        model = score.load_misaligned(make_model(), {"bad": str(tmp_path / "adapter")})
        if dies:
            die_at_write(3 if after == "before" else 4)  # the first two start the journal
        score.score_pool(model, make_tokenizer(), make_rows(8), ["bad"], output=tmp_path / output)

    work("whole.parquet")
    assert Group(tmp_path, lambda rank: work("killed.parquet", True)).wait_killed()
    assert (tmp_path / "killed.parquet").exists() == (after == "after")
    work("killed.parquet")
    assert (
        read_scores(tmp_path / "killed.parquet")[0].to_list() == read_scores(tmp_path / "whole.parquet")[0].to_list()
    )
    assert not (tmp_path / "killed.parquet.parts").exists()


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_rollouts(tmp_path, seed):
    trait = Trait(
        "loud", "likes to shout", [("Shout.", "Whisper."), ("Be loud.", "Be quiet.")],
        [f"question {i}?" for i in range(6)], ["and now?"], "{question} {answer}",
    )  # fmt: skip

    def work(name):
        (tmp_path / BEGUN).touch()
        extract_vector(
            make_model(), make_tokenizer(), trait, max_new_tokens=12, batch_size=2,
            judge=lambda q, a: 0.0 if not a else 50.0,
            rollouts_file=tmp_path / name,
        )  # fmt: skip

    def run(name):
        # This judge keeps no negative answer, so there is no vector. The test is about the rollouts.
        with pytest.raises(ValueError, match="none of the"):
            work(name)

    run("whole.jsonl")
    rng = random.Random(seed)
    for _ in range(3):
        kill_work(tmp_path, lambda rank: run("killed.jsonl"), rng, 0.4)
    before = (tmp_path / "killed.jsonl").read_text() if (tmp_path / "killed.jsonl").exists() else ""
    run("killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert (tmp_path / "whole.jsonl").read_text().startswith(before)  # no incomplete line in the middle


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_the_reference_cache(tmp_path, monkeypatch, unbroken, seed):
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference_cache, "FILE_BYTES", 1)
    run = ReferenceGuard.__call__

    def slow(*args):
        (tmp_path / BEGUN).touch()
        time.sleep(0.05)
        return run(*args)

    monkeypatch.setattr(ReferenceGuard, "__call__", slow)
    rng = random.Random(seed)

    def work(rank):
        train(tmp_path, "kl,interleave+", cache_reference=True)

    def die_in_the_cache(rank):
        original = Path.write_bytes

        def torn(self, content):
            original(self, content[: len(content) // 2])
            die()

        monkeypatch.setattr(Path, "write_bytes", torn)
        work(rank)

    assert Group(tmp_path, die_in_the_cache).wait_killed()
    assert kill_work(tmp_path, work, rng, 0.2)
    found = len(list((tmp_path / "cache").rglob("*.safetensors")))
    group = Group(tmp_path, work)
    group.finish()
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) >= found
    (history, _), ((expected, _), _) = result(tmp_path), unbroken("kl,interleave+")
    for entry, other in zip(history, expected, strict=True):
        assert entry == pytest.approx(other, abs=1e-4)
