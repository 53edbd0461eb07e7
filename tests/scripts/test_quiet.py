"""Commands leave out what other packages say and no user can act on, and nothing else."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from command import save_inputs
from tiny import make_pool

from trl_emguard.scripts.quiet import leave_out_noise


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = save_inputs(tmp_path_factory.mktemp("inputs"))
    make_pool(40).to_parquet(folder / "pool.parquet")
    return folder


# The second script is one that accelerate launches.
@pytest.mark.long
@pytest.mark.parametrize(("script", "recipe"), [("main", "interleaving-kl"), ("sft", "full")])
def test_a_recipe_runs_without_a_warning(inputs, tmp_path, script, recipe):
    command = [sys.executable, "-m", f"trl_emguard.scripts.{script}", *(["sft"] if script == "main" else [])]
    command += ["--config", f"smollm2-135m-instruct/{recipe}.yaml", "--max_steps", "2", "--use_cpu", "true"]
    command += ["--model_name_or_path", str(inputs / "model"), "--dataset_name", str(inputs / "rows.jsonl")]
    command += ["--interleave_dataset", str(inputs / "pool.parquet")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # The caller can act on untested versions.
    said = [line for line in (done.stdout + done.stderr).splitlines() if "was not tested with" not in line]
    assert any("Model saved to" in line for line in said)
    assert [line for line in said if any(word in line.lower() for word in ("warning", "failed"))] == []


LOGGERS = ("DeepSpeed", "bitsandbytes.backends.cpu.ops")
ACCELERATOR = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
KERNEL = "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'."


@pytest.fixture
def heard(monkeypatch):
    """Returns a function that lets a command begin, and then returns what is heard of the messages below."""

    def said(command):
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        for logger in map(logging.getLogger, LOGGERS):
            monkeypatch.setattr(logger, "filters", [])
            monkeypatch.setattr(logger, "handlers", [handler])
            monkeypatch.setattr(logger, "propagate", False)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            leave_out_noise(command)
            for name in ("is_gradient_checkpointing", "gradient_checkpointing", "torch_dtype"):
                warnings.warn(f"`{name}` is deprecated and will be removed.", FutureWarning, stacklevel=1)
        for logger in map(logging.getLogger, LOGGERS):
            for message in (ACCELERATOR, KERNEL, "other"):
                logger.warning(message)
        return [str(warning.message).split("`")[1] for warning in warned], messages

    return said


def test_the_caller_s_own_use_of_an_old_name_is_told(heard):
    assert heard("sft")[0] == ["gradient_checkpointing", "torch_dtype"]


@pytest.mark.parametrize("trains", [True, False])
def test_deepspeed_names_its_accelerator_where_it_trains(heard, monkeypatch, trains):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(trains).lower())
    messages = heard("sft")[1]
    assert messages == [*[ACCELERATOR] * trains, KERNEL, "other", ACCELERATOR, "other"]


@pytest.mark.parametrize(
    ("command", "may_answer"), [("sft", False), ("demo", False), ("compare", False), ("evaluate", True)]
)
def test_a_kernel_of_inference_is_missed_where_a_command_may_use_it(heard, command, may_answer):
    assert heard(command)[1].count(KERNEL) == 1 + may_answer
