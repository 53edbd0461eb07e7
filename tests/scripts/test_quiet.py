"""Commands leave out what other packages say and no user can act on, and nothing else."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from command import save_inputs

from trl_emguard.scripts.quiet import leave_out_noise


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    ("script", "recipe"),
    [
        ("main", "kl"),
        # As accelerate launches it.
        pytest.param("sft", "full", marks=pytest.mark.long),
    ],
)
def test_a_recipe_runs_without_a_warning(inputs, tmp_path, script, recipe):
    command = [sys.executable, "-m", f"trl_emguard.scripts.{script}", *(["sft"] if script == "main" else [])]
    command += ["--config", f"smollm2-135m-instruct/{recipe}.yaml", "--max_steps", "2", "--use_cpu", "true"]
    command += ["--model_name_or_path", str(inputs / "model"), "--dataset_name", str(inputs / "rows.jsonl")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = (done.stdout + done.stderr).splitlines()
    assert any("Model saved to" in line for line in said)
    assert [line for line in said if "warning" in line.lower()] == []


@pytest.fixture
def quiet():
    logger = logging.getLogger("DeepSpeed")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before, logger.filters = logger.filters, []
        leave_out_noise()
        leave_out_noise()
        assert len(logger.filters) == 1
        yield logger
        logger.filters = before


def test_the_caller_s_own_use_of_an_old_name_is_told(quiet):
    with warnings.catch_warnings(record=True) as heard:
        for name in ("is_gradient_checkpointing", "gradient_checkpointing", "torch_dtype"):
            warnings.warn(f"`{name}` is deprecated and will be removed.", FutureWarning, stacklevel=1)
    assert [str(warning.message).split("`")[1] for warning in heard] == ["gradient_checkpointing", "torch_dtype"]


@pytest.mark.parametrize("trains", [True, False])
def test_deepspeed_names_its_accelerator_where_it_trains(quiet, monkeypatch, trains):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(trains).lower())
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    quiet.addHandler(handler)
    try:
        quiet.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
        quiet.warning("Something else.")
    finally:
        quiet.removeHandler(handler)
    assert len(heard) == 1 + trains
