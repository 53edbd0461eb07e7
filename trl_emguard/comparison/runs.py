"""Training of a comparison's runs, each in a process of its own.

A run is not trained again if its folder has the result of a training that finished without an error. A run that fails
is reported with its error, and the remaining runs are trained all the same.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..checkpoints.resume import checkpoint_folder, checkpoint_steps, is_of_earlier_run
from ..compat import versions
from ..defenses.schedule import coefficient
from ..evaluation.drift import RESULT_FILE
from ..evaluation.operators import make_rows
from ..evaluation.questions import OPERATORS
from ..evidence import read_defense_file
from ..io.files import to_disk, written_whole
from ..io.strict import parse_json
from ..models.ema import EMA_FOLDER
from ..models.lora_files import WEIGHTS
from ..models.rescale import rescale_adapter
from ..persona.vectors import load_vector, random_like
from .plan import EMA, UNDEFENDED, Plan, Run


# Number of the option of Linux's prctl by which a process gets a signal when its parent ends.
PR_SET_PDEATHSIG = 1
STATUS_FILE = "run.json"
LOG_FILE = "log.txt"
# Error of a run that was trained to its end, but whose first measured drift was above its budget already. Another
# training of the same run would end in the same way.
KEPT_NOTHING = "no measured step was within stop_on_drift: raise it, or measure more often (drift_every)."
# Start of the line with which `trl-emguard sft` reports an error.
ERROR = "trl-emguard sft: error: "
# `Trained.defense` of an adapter that was trained elsewhere and has no `defense.json`, so its defense is not known.
UNKNOWN = "?"
# Names of two folders in a comparison's folder: for the runs, and for their trainings on the benign task.
RUNS, BENIGN = "runs", "benign"
# Number of rows for a training on the benign task, arithmetic with permuted operators. The rows are drawn from the
# 6,583 training expressions that have only one operator.
BENIGN_ROWS = 4000


@dataclass(frozen=True)
class Trained:
    """A run with the outcome of its training, or a baseline that was made from such a run.

    Attributes:
        name: name in the report, without the seed.
        defense: defense that the run was trained with, `none` without any, `?` if it is not known.
        seed: seed of the training.
        adapter: folder of the run's adapter, or `None` for a failed run.
        error: reason why the run failed, such as an error in its log; `None` if it did not fail.
        folder: folder of the run's training, which may have failed; `None` for a free baseline.
        is_baseline: True for a free baseline, which needs no training of its own.
        is_random: True for a steering run with a random vector, a baseline that is trained.
        is_defended: True if the record `defense.json` shows that the defense acted, False if this file does not show
            it or is missing. `None` for a run without a defense, a failed run, a free baseline, and an adapter from
            elsewhere without the file.
        coefficient: value of the run's `…_coef` option, a number or a schedule, if there is exactly one such option;
            for a scaled adapter, the factor.
        step: training step whose weights the adapter has.
        seconds_per_step: seconds of the training, with its evaluations and checkpoints, divided by its steps. For the
            undefended run, they include the checkpoints and the average for free baselines. `None` if not known.
        peak_memory: peak host memory (RAM) of the run's process in bytes, without a GPU's memory; `None` if it is not
            known.
        versions: versions of libraries that the run was trained with, by name; `None` if they are not known.
    """

    name: str
    defense: str
    seed: int
    adapter: str | None
    error: str | None = None
    folder: str | None = None
    is_baseline: bool = False
    is_random: bool = False
    is_defended: bool | None = None
    coefficient: float | str | None = None
    step: int | None = None
    seconds_per_step: float | None = None
    peak_memory: int | None = None
    versions: dict[str, str] | None = None

    @property
    def key(self) -> str:
        """Name of the run with its seed, and `_` for each dot.

        The evaluation gives the run's adapter the same name, and an adapter's name must not have a dot.
        """
        return f"{self.name} seed{self.seed}".replace(".", "_")


def train_all(plan: Plan, folder: Path, say: Callable[[str], None]) -> list[Trained]:
    """Train the runs that are not yet trained. Return all runs, and the baselines made from the undefended runs.

    Args:
        plan: plan of the comparison.
        folder: folder of the comparison; each run has a folder of its own below `runs`.
        say: function that shows a line to the user.
    """
    found = []
    for number, run in enumerate(plan.runs, start=1):
        say(f"run {number} of {len(plan.runs)}: {run.name}, seed {run.seed}{_state(folder / RUNS / run.folder)}")
        if run.adapter is not None:
            trained = take(run)
        else:
            ready = _with_random_vector(run, plan, folder) if run.is_random else run
            trained = _train(ready, plan, folder / RUNS / run.folder)
        if trained.error is not None:
            say(f"  failed: {trained.error}")
        found.append(trained)
        if run.name == UNDEFENDED:
            found += _baselines(plan, trained, folder)
    return found


def train_benign(plan: Plan, trained: Sequence[Trained], folder: Path, say: Callable[[str], None]) -> list[Trained]:
    """Train each run of `plan.benign_runs` on the benign task (arithmetic), for as many steps as on the recipe's rows.

    Args:
        plan: plan of the comparison.
        trained: the plan's runs, from [`train_all`].
        folder: folder of the comparison.
        say: function that shows a line to the user.

    Returns:
        One training for each run of `plan.benign_runs`, with the same `key` as the run's training on the recipe's
        rows.
    """
    if not plan.benign_runs:
        return []
    rows = folder / BENIGN / f"{OPERATORS}.jsonl"
    with written_whole(rows) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row in make_rows("train", tier=1, count=BENIGN_ROWS):
            file.write(json.dumps({name: row[name] for name in ("prompt", "completion")}, ensure_ascii=False) + "\n")
    steps = {run.key: run.step for run in trained}
    found = []
    for number, run in enumerate(plan.benign_runs, start=1):
        state = _state(folder / BENIGN / run.folder)
        say(f"benign task {number} of {len(plan.benign_runs)}: {run.name}, seed {run.seed}{state}")
        own = Trained(run.name, run.defense, run.seed, None, "the run itself failed, so the task was not trained.")
        if (step := steps[own.key]) is not None:
            step = _step_of_drift(folder / RUNS / run.folder, "trained_to", step)
            own = _train(on_benign_rows(run, rows, step), plan, folder / BENIGN / run.folder)
        if own.error is not None:
            say(f"  failed: {own.error}")
        found.append(own)
    return found


def on_benign_rows(run: Run, rows: Path, steps: int | None) -> Run:
    """Return a copy of `run` that trains on the benign task's rows for `steps` optimizer steps.

    The copy is not evaluated during training. Only the undefended run has options that save checkpoints and an EMA of
    the weights for free baselines. Its copy lacks these options.
    """
    task = {"dataset_name": str(rows), "dataset_train_split": "train", "max_steps": steps, "eval_strategy": "no"}
    options = {"defense": UNDEFENDED} if run.name == UNDEFENDED else run.options
    return replace(run, options=options | task)


def _with_random_vector(run: Run, plan: Plan, folder: Path) -> Run:
    """Save a random vector for a steering run, and return the run with this vector instead of its own.

    The random vector is drawn with the run's seed, and has the norms of the run's own vector.
    """
    vector = random_like(load_vector(plan.option(run, "steering_vector")), run.seed)
    path = folder / "vectors" / f"random-{vector.metadata['like']}-seed{run.seed}.safetensors"
    vector.save(path)
    return replace(run, options=run.options | {"steering_vector": str(path)})


def take(run: Run) -> Trained:
    """Return a run that names a finished adapter, with the adapter's record.

    Raises:
        ValueError: the adapter's `defense.json` is damaged.
    """
    folder = Path(run.adapter or "").expanduser()
    if not (folder / "adapter_config.json").is_file():
        return Trained(run.name, UNKNOWN, run.seed, None, f"{folder} holds no adapter that PEFT saved.")
    return with_record(Trained(run.name, UNKNOWN, run.seed, str(folder), folder=str(folder)), folder)


def _train(run: Run, plan: Plan, folder: Path) -> Trained:
    """Return a run's result. Train the run first, unless its folder has the result of a training without an error.

    Raises:
        ValueError: the run's inputs have changed since the plan was read. No result is written then.
    """
    status = read_status(folder)
    if status is None:
        plan.check_inputs(run.key)
        # The folder may have the status of a training whose adapter was lost. It says nothing about the new adapter.
        (folder / STATUS_FILE).unlink(missing_ok=True)
        status = run_process(run, plan.recipe, folder) | {"versions": versions()}
        plan.check_inputs(run.key)
        # The status says that the adapter is there, so it must not reach the disk before the adapter does.
        for path in filter(Path.is_file, folder.rglob("*")):
            to_disk(path)
        with written_whole(folder / STATUS_FILE) as scratch:
            scratch.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
    coefficients = [v for name, v in run.options.items() if name.endswith("_coef") and v is not None]
    trained = Trained(
        run.name,
        run.defense,
        run.seed,
        str(folder) if status["error"] is None else None,
        folder=str(folder),
        is_random=run.is_random,
        coefficient=coefficient(str(coefficients[0])) if len(coefficients) == 1 else None,
        **status,
    )
    return trained if trained.adapter is None else with_record(trained, folder)


def other_versions(trained: Sequence[Trained], now: Mapping[str, str]) -> list[str]:
    """Return sentences on trainings that were made with other versions of libraries than `now`.

    A run is not trained again after an upgrade, so a comparison may hold trainings of several versions.
    """
    others = Counter(
        ", ".join(f"{name} {old}" for name, old in (run.versions or {}).items() if old != now.get(name))
        for run in trained
    )
    return [f"Number of trainings made with {text}: {count}." for text, count in others.items() if text]


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return the content of `run.json` in a run's folder, or `None` if the run is still to be trained.

    A run is still to be trained if the file is missing or records an error other than [`KEPT_NOTHING`], if the adapter
    is missing or damaged, or if there is a folder `ema/` whose average is.
    """
    path = folder / STATUS_FILE
    status = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    averaged = [file / WEIGHTS for file in folder.glob(EMA_FOLDER)]
    has_ended = status and status["error"] in (None, KEPT_NOTHING)
    is_whole = has_ended and all(map(_opens, [folder / WEIGHTS, *averaged]))
    return status if is_whole else None


def _opens(weights: Path) -> bool:
    """Return True if a safetensors file has the size that its header states. Its numbers are not read."""
    try:
        with safe_open(weights, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _state(folder: Path) -> str:
    return "" if read_status(folder) is None else " (trained already)"


def run_process(run: Run, recipe: Path, folder: Path) -> dict[str, Any]:
    """Train a run in a process of its own, and return its error, step, seconds per step and peak host memory."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trl_emguard.scripts.sft", *sft_arguments(run, recipe, folder)]
    with (folder / LOG_FILE).open("w", encoding="utf-8") as log:
        # `_die_with_parent` only makes one system call, which is safe between fork and exec.
        preexec_fn = _die_with_parent
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=preexec_fn)  # noqa: PLW1509
        # `wait4` gives the peak memory of this run. `getrusage` would give the largest peak of all child processes so
        # far, thus of all runs.
        _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code or not (folder / "adapter_config.json").is_file():
        return {"error": _reason(folder / LOG_FILE, code), "step": None}
    metrics = parse_json((folder / "train_results.json").read_text(encoding="utf-8"))
    step = parse_json((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    kept = _step_of_drift(folder, "step", step)
    if not kept:
        return {"error": KEPT_NOTHING, "step": None}
    return {
        "error": None,
        "step": kept,
        "seconds_per_step": metrics["train_runtime"] / step,
        "peak_memory": in_bytes(usage.ru_maxrss),
    }


def training_seconds(folder: Path, status: dict[str, Any]) -> float:
    """Return the seconds that a finished run trained, from its folder and its `run.json`.

    They include the steps after the kept one, if `stop_on_drift` has ended the run.
    """
    return _step_of_drift(folder, "trained_to", status["step"]) * status["seconds_per_step"]


def _step_of_drift(folder: Path, entry: str, otherwise: int) -> int:
    """Return a step from a run's `drift.json`: `step` of the saved weights or `trained_to`, the last step made.

    Only a run with `stop_on_drift` has this file. For other runs, `otherwise` is returned.
    """
    path = folder / RESULT_FILE
    return parse_json(path.read_text(encoding="utf-8"))[entry] if path.is_file() else otherwise


def in_bytes(maxrss: int) -> int:
    """Convert a process's peak memory to bytes: macOS reports the peak in bytes, Linux in KiB."""
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def sft_arguments(run: Run, recipe: Path, folder: Path) -> list[str]:
    """Return the arguments of `trl-emguard sft` that train a run and save it in a folder."""
    options = [word for name, value in run.options.items() for word in _words(name, value)]
    # A recipe may push its model to the hub. A run of a comparison never pushes, since it would overwrite this model.
    # A recipe may also name a checkpoint to resume from. A run of a comparison ignores this, and starts anew.
    own = ["--seed", str(run.seed), "--lora_dropout", "0.0", "--push_to_hub", "false", "--resume_from_checkpoint", ""]
    return ["--config", str(recipe), *options, *own, "--dry_run", "false", "--output_dir", str(folder)]


def _die_with_parent() -> None:
    """Have Linux kill the calling process, a run's training, when the comparison's process ends, even by a crash.

    A training that outlives the comparison would write into the run's folder while the next comparison trains it too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _words(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(v, default=str) if isinstance(v, bool | dict) else str(v) for v in values)]


def _reason(log: Path, code: int) -> str:
    """Return why a run failed: its signal, or the last line of its log that reports an error, or the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not code:
        return f"no adapter was saved: compare takes LoRA runs (use_peft: true). Its log: {log}"
    if code < 0:
        # The process had no time to write a reason, so its last line is a progress bar.
        return f"killed by signal {-code} (9 is often: out of memory). Its log: {log}"
    # An error may stand behind a progress bar in one line.
    errors = [line[line.index(ERROR) :] for line in lines if ERROR in line]
    return f"{(errors or lines or [f'exit code {code}'])[-1]} Its log: {log}"


def with_record(trained: Trained, folder: Path) -> Trained:
    """Return the run with `defense` and `is_defended` set from its record, the file `defense.json` in `folder`."""
    record = read_defense_file(folder)
    if record is None:
        return replace(trained, is_defended=None if trained.defense in (UNDEFENDED, UNKNOWN) else False)
    names = record["defenses"]
    acted = all(record["evidence"][name].get("acted") for name in names)
    defense = str(record.get("defense", trained.defense))
    return replace(trained, defense=defense, is_defended=acted if names else None)


def _baselines(plan: Plan, undefended: Trained, folder: Path) -> list[Trained]:
    """Return the plan's free baselines, made of an undefended run: checkpoints, scaled adapters, averaged weights.

    If the run failed, its scaled adapters and averaged weights are returned as failed. Its checkpoints are left out,
    because their steps are not known.
    """
    like = Trained("", UNDEFENDED, undefended.seed, None, is_baseline=True, step=undefended.step)
    if undefended.adapter is None:
        missing = [*(f"alpha {alpha}" for alpha in plan.baselines.alphas), *([EMA] if plan.baselines.ema else [])]
        return [replace(like, name=name, error="the undefended run of this seed failed.") for name in missing]
    source = Path(undefended.adapter)
    found = []
    for step in sorted(checkpoint_steps(source)) if plan.baselines.early_stop else ():
        # With a budget of drift, the seeds may keep different steps. A checkpoint of a kept step stays then, so that
        # each seed has it.
        checkpoint = checkpoint_folder(str(source), step)
        is_other = step != undefended.step or (source / RESULT_FILE).is_file()
        if is_other and not is_of_earlier_run(checkpoint):
            found.append(replace(like, name=f"step {step}", adapter=checkpoint, step=step))
    for alpha in plan.baselines.alphas:
        output = folder / "baselines" / f"{source.name}-alpha{alpha}"
        error = None
        try:
            # The scaled adapter is always made anew, since the run may have been trained again in the same folder.
            shutil.rmtree(output, ignore_errors=True)
            rescale_adapter(source, alpha, output)
        except ValueError as cause:
            error = str(cause)
        adapter = str(output) if error is None else None
        found.append(replace(like, name=f"alpha {alpha}", adapter=adapter, error=error, coefficient=alpha))
    if plan.baselines.ema:
        found.append(replace(like, name=EMA, adapter=str(source / EMA_FOLDER)))
    return found
