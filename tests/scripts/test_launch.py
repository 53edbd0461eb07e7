"""Test `--accelerate_config`: arguments of a launch, and refusals before it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from tiny import make_rows, save_model
from torch.distributed.elastic.multiprocessing.api import SignalException

from trl_emguard.io.recipes import recipes_dir
from trl_emguard.scripts import launch, sft
from trl_emguard.scripts import main as commands
from trl_emguard.scripts.launch import find_accelerate_config, launch_arguments


SHIPPED = sorted(path.stem for path in (recipes_dir() / "accelerate_configs").glob("*.yaml"))
FREE = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def launched(monkeypatch):
    """Record launches instead of starting them: (accelerate's arguments, the training script's command line)."""
    calls = []

    def launch(arguments, is_command):
        arguments.is_command = is_command
        calls.append((arguments, arguments.training_script_args))
        return 0

    monkeypatch.setattr(sft, "launch", launch)
    monkeypatch.setattr(sft, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(sft, "run", lambda *args: pytest.fail("training began in this process"))
    return calls


@pytest.fixture
def refused(capsys, launched):
    """Return a function that runs a bad command line and returns its one line on stderr."""

    def run(*argv, **how):
        with pytest.raises(SystemExit) as stop:
            sft.main([*FREE, *argv], **how)
        captured = capsys.readouterr()
        assert (stop.value.code, captured.out, launched) == (2, "", [])
        assert captured.err.startswith("trl-emguard sft: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


# ---- launching ----


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_known_by_name_and_by_path(launched, tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_bytes(find_accelerate_config(name).read_bytes())
    for given in (name, str(path)):
        assert sft.main([*FREE, "--accelerate_config", given]) == 0
    (by_name, _), (by_path, _) = launched
    assert (by_name.config_file, by_path.config_file) == (
        str(recipes_dir() / f"accelerate_configs/{name}.yaml"),
        str(path),
    )
    assert by_name.module
    assert by_name.training_script == "trl_emguard.scripts.sft"


@pytest.mark.parametrize("name", ["cpu", "zero3"])
def test_precision_is_judged_where_it_runs(launched, name):
    """The launching process does not judge the precision, since it may have no accelerator."""
    script = ["--bf16", "true", "--tf32", "true"]
    assert sft.main(["--accelerate_config", name, *script]) == 0
    assert launched[0][1] == script


def test_an_accelerate_file_for_the_cpu_is_enough(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    _, arguments, *_ = sft.make_parser(launched=True).parse(["--bf16", "true"])
    assert arguments.use_cpu


@pytest.mark.parametrize("form", ["{0} {1}", "{0}={1}"])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_accelerates_options_go_to_accelerate_and_the_rest_to_the_script(launched, form, position):
    own = [*FREE, "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "-1", "--defense=kl"]
    others = [
        word
        for pair in (("--accelerate_config", "cpu"), ("--num-processes", "2"))
        for word in form.format(*pair).split()
    ]
    argv = [*own[:position], *others, "--multi_gpu", *own[position:]]
    assert sft.main(argv) == 0
    ((arguments, script),) = launched
    assert (arguments.num_processes, arguments.multi_gpu, script) == (2, True, own)


def test_a_yaml_file_may_say_how_to_launch(launched, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "defense: kl\naccelerate_config: cpu\nnum_processes: 3\nmulti_gpu: true\nsame_network: false\ntf32: true\n"
    )
    argv = [*FREE, "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    assert sft.main(argv) == 0
    # The command line wins.
    assert sft.main([*argv, "--accelerate_config", "multi_gpu", "--num_processes", "2"]) == 0
    (first, script), (second, again) = launched
    assert (first.num_processes, first.multi_gpu, first.same_network, script) == (3, True, False, argv)
    assert (second.num_processes, second.config_file.endswith("multi_gpu.yaml"), again) == (2, True, argv)


@pytest.mark.parametrize("is_command", [True, False])
def test_only_the_command_may_become_the_training(launched, tmp_path, monkeypatch, is_command):
    """Python code that calls the command goes on after the training."""
    options = [*FREE, "--dataset_name", "plants_careless", "--output_dir", str(tmp_path), "--accelerate_config", "cpu"]
    line = ["trl-emguard", "sft", *options]
    monkeypatch.setattr(sys, "argv", line)
    assert commands.main(*([] if is_command else [line[1:]])) == 0
    ((arguments, script),) = launched
    assert (arguments.is_command, script, sys.argv) == (is_command, options[:-2], line)


def test_a_launched_process_ignores_the_launch_options(tmp_path, monkeypatch):
    """A launched rank reads the same file, and trains."""
    runs = []
    monkeypatch.setattr(sft, "run", lambda *args: runs.append(args[1].defense))
    monkeypatch.setattr(sft, "launch", lambda arguments: pytest.fail("launched again"))
    (tmp_path / "run.yaml").write_text("defense: kl\naccelerate_config: cpu\nnum_processes: 3\n")
    assert (
        sft.main([*FREE, "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")], launched=True)
        == 0
    )
    assert runs == ["kl"]


def test_without_it_nothing_is_launched(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(sft, "run", lambda *args: runs.append(args))
    monkeypatch.setattr(sft, "launch", lambda arguments: pytest.fail("launched"))
    assert sft.main([*FREE, "--output_dir", str(tmp_path / "out")]) == 0
    assert len(runs) == 1


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_understands_every_shipped_file(name):
    from trl_emguard.planning.engine import read_launch

    launch = read_launch(launch_arguments(find_accelerate_config(name), [], []))
    assert (launch.engine.ranks > 1) == (launch.engine.name != "one process")


# ---- refusals ----


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--accelerate_config", "zro3"], ["'zro3'", "Did you mean 'zero3'?", "multi_gpu", "cpu"]),
        (["--accelerate_config", "./missing.yaml"], ["'./missing.yaml'", "Known:"]),
        (["--accelerate_config"], ["accelerate_config", "expected one argument"]),
        (["--acelerate_config", "cpu"], ["'--acelerate_config'", "'--accelerate_config'"]),
        (["--accelerate_config", "cpu", "--num_proceses", "2"], ["'--num_proceses'", "'--num_processes'"]),
        (["--accelerate_config", "cpu", "--num_proc", "2"], ["'--num_proc'"]),
        (["--accelerate_config", "cpu", "--num_processes", "two"], ["num_processes", "'two'"]),
        (["--accelerate_config", "cpu", "--mixed_precision", "bf61"], ["'bf61'", "'bf16'"]),
        (["--accelerate_config", "cpu", "--num_processes", "2", "3"], ["'3'"]),
        (["--accelerate_config", "cpu", "--config_file", "x"], ["'--config_file'"]),
        (["--accelerate_config", "cpu", "--defense", "kll"], ["'kll'", "'kl'"]),
        (["--accelerate_config", "cpu", "--kl_coeff", "1"], ["'--kl_coeff'", "'--kl_coef'"]),
        (["--accelerate_config", "fsdp2", "--drift_every", "2"], ["DriftCallback does not work under FSDP"]),
        (["--accelerate_config", "zero3", "--ema", "true"], ["EMACallback does not work under DeepSpeed ZeRO-3"]),
        (["--num_processes", "2"], ["--num_processes", "--accelerate_config"]),
        (["--multi_gpu"], ["--multi_gpu", "--accelerate_config"]),
    ],
)
def test_bad_options_are_refused_before_ranks_start(refused, argv, words):
    line = refused(*argv)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_processes: 2", ["--num_processes", "--accelerate_config"]),
        ("accelerate_config: cpu\nnum_procesess: 2", ["'num_procesess'", "'num_processes'"]),
        ("accelerate_config: cpu\nnum_processes: two", ["num_processes", "'two'"]),
        ("accelerate_config: cpu\nnum_processes: 1.5", ["num_processes", "whole number"]),
        ("accelerate_config: cpu\nmulti_gpu: 1", ["multi_gpu", "true or false"]),
        ("accelerate_config: zro3", ["'zero3'"]),
        ("dry_run: 1", ["dry_run", "true or false"]),
    ],
)
def test_bad_yaml_is_refused_before_ranks_start(refused, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    line = refused("--config", str(tmp_path / "run.yaml"))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("distributed_type: 'NO'\nnum_proceses: 2", [], ["accelerate refuses", "num_proceses"]),
        ("", [], ["accelerate refuses"]),
        ("num_processes: [2", [], ["accelerate refuses"]),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\ngpu_ids: '0'", [], ["accelerate refuses", "--gpu_ids"]),
        ("num_processes: 2", ["--multi_gpu", "--num_processes", "1"], ["accelerate refuses", "at least 2 processes"]),
        ("distributed_type: DEEPSPEED\nnum_processes: 2", ["--deepspeed_config_file", "./ds.json"], ["'./ds.json'"]),
    ],
)
def test_what_accelerate_refuses_is_one_line(refused, tmp_path, text, more, words):
    (tmp_path / "engine.yaml").write_text(text)
    line = refused("--accelerate_config", str(tmp_path / "engine.yaml"), *more)
    for word in words:
        assert word in line


def test_a_launch_without_its_package_is_refused(refused, monkeypatch):
    monkeypatch.setattr(sft, "is_deepspeed_available", lambda: False)
    assert "not installed: pip install 'trl_emguard[deepspeed]'" in refused("--accelerate_config", "zero3")


def test_a_launch_without_the_package_of_its_optimizer_is_refused(refused, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    line = refused("--accelerate_config", "cpu", "--optim", "adamw_8bit")
    assert "optim=adamw_8bit: You need to install `bitsandbytes`" in line
    assert "pip install" in line


def test_a_launch_of_one_process_instead_of_several_is_told(launched, capsys):
    assert sft.main([*FREE, "--accelerate_config", "cpu", "--num_processes", "2"]) == 0
    assert "warning: num_processes=2 starts one process. On GPUs" in capsys.readouterr().err
    assert len(launched) == 1


@pytest.mark.parametrize("more", [["--accelerate_config", "cpu"], ["--num_processes=2"], ["--accelerate-config=cpu"]])
def test_a_launched_process_launches_nothing(refused, more):
    assert "--config_file" in refused(*more, launched=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_several_ranks_gives_the_exit_code_of_a_shell(monkeypatch, number):
    def launch_command(arguments):
        raise SignalException("got a signal", number)

    monkeypatch.setattr(launch, "launch_command", launch_command)
    assert sft.main([*FREE, "--accelerate_config", "cpu"]) == 128 + number


STUB = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
pathlib.Path("begun").write_text(str(os.getpid()))
time.sleep(60)
"""
LAUNCH = """
from trl_emguard.scripts.launch import find_accelerate_config, launch, launch_arguments
print("before the training")
arguments = launch_arguments(find_accelerate_config("cpu"), [], [])
arguments.training_script = "stub"
launch(arguments, is_command=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot replace a process: a child trains there")
def test_a_launch_of_one_process_becomes_the_training(tmp_path):
    """A SIGTERM to the command must end the training. A child process would train on unnoticed."""
    (tmp_path / "stub.py").write_text(STUB)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", LAUNCH]
    process = subprocess.Popen(line, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    begun, end = tmp_path / "begun", time.monotonic() + 300
    while not (begun.exists() and begun.read_text()):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    process.terminate()
    code = process.wait(60)
    with suppress(ProcessLookupError):  # it would be left to itself if this test failed
        os.kill(int(begun.read_text()), signal.SIGKILL)
    assert (code, int(begun.read_text())) == (7, process.pid)
    assert process.stdout.read() == "before the training\n"


# ---- real processes ----


@pytest.fixture
def command(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()), encoding="utf-8")
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "rows.jsonl",
        "max_steps": 2,
        "learning_rate": 0.1,
        "use_cpu": "true",
        "bf16": "false",
        "use_peft": "true",
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 1,
        "defense": "kl",
    }
    argv = [str(word) for key, value in options.items() for word in (f"--{key}", value)]

    def run(*more):
        line = [sys.executable, "-m", "trl_emguard.scripts.main", "sft", *argv, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)

    return run


@pytest.mark.long
def test_two_ranks_train_as_one(command, tmp_path):
    """Two ranks with half of the global batch each train like one process with all of it."""
    losses = {}
    runs = {
        "one": ["--per_device_train_batch_size", "4"],
        "two": [
            "--per_device_train_batch_size",
            "2",
            *["--accelerate_config", "cpu", "--multi_gpu", "--num_processes", "2"],
        ],
    }
    for name, more in runs.items():
        done = command("--output_dir", name, *more, *(["--main_process_port", "0"] if name == "two" else []))
        assert done.returncode == 0, done.stderr
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
        assert done.stdout.count("defense 'kl' acts") == 1
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [[], ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]])
def test_the_exit_code_of_a_failed_rank_is_the_commands(command, tmp_path, ranks):
    done = command("--output_dir", "out", "--accelerate_config", "cpu", *ranks, "--model_name_or_path", "./missing")
    assert done.returncode == 1
    assert "'./missing' is not a folder" in done.stderr
    assert "Traceback" not in done.stderr
