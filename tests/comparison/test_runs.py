"""Training of a comparison's runs: why it begins anew, goes on or stops. A stub replaces each training."""

import json
import os
import re

import pytest
from figures import INFO, plan, report, save_weights
from rich.console import Console

from trl_emguard.comparison import runs as training
from trl_emguard.comparison.page import write_page
from trl_emguard.comparison.runs import KEPT_NOTHING, RUNS, other_versions, train_all, train_benign
from trl_emguard.scripts.compare import show_plan, unfinished


TEXT = "recipe: RECIPE\nruns: [{defense: kl}, {defense: ldifs}]\n"
STATUS = {"error": None, "step": 3, "seconds_per_step": 0.5, "peak_memory": 1}


def silent(line):
    pass


@pytest.fixture
def trained(monkeypatch):
    """Return the names of the runs that were trained, and a list of functions to call in each training."""
    names, calls = [], []

    def run(run, recipe, folder):
        names.append(run.name)
        save_weights(folder)
        for call in calls:
            call()
        return STATUS

    monkeypatch.setattr(training, "run_process", run)
    return names, calls


@pytest.mark.parametrize("name", ["sft.yaml", "rows.jsonl"])
def test_inputs_that_change_while_a_comparison_runs_end_it(tmp_path, trained, name):
    """Later runs would be trained on the changed inputs, under keys of the old inputs."""
    names, calls = trained
    (tmp_path / "rows.jsonl").write_text("a")
    made = plan(tmp_path, TEXT, f"dataset_name: {tmp_path / 'rows.jsonl'}\n")
    path = tmp_path / name
    before = path.read_text()
    calls.append(lambda: path.write_text(f"{before}\n# another"))
    with pytest.raises(ValueError, match="has changed since this comparison began; start it again"):
        train_all(made, tmp_path / "out", silent)
    with pytest.raises(ValueError, match="start it again"):  # before the training
        train_all(made, tmp_path / "out", silent)
    assert names == ["none"]
    assert not list((tmp_path / "out").rglob("run.json"))
    path.write_text(before)
    calls.clear()
    train_all(made, tmp_path / "out", silent)
    assert names == ["none", "none", "kl", "ldifs"]


def test_folders_that_a_run_fills_are_no_inputs(tmp_path, trained):
    names, calls = trained
    cache = tmp_path / "cache"
    cache.mkdir()
    made = plan(tmp_path, TEXT, f"model_init_kwargs: {{cache_dir: {cache}}}\n")
    calls.append(lambda: (cache / "file").write_text("x"))
    train_all(made, tmp_path / "out", silent)
    assert names == ["none", "kl", "ldifs"]


@pytest.mark.parametrize("damage", ["gone", "empty", "cut off", "average"])
def test_a_run_whose_adapter_is_lost_is_trained_again(tmp_path, trained, damage):
    names, _ = trained
    made, out = plan(tmp_path, TEXT), tmp_path / "out"
    train_all(made, out, silent)
    train_all(made, out, silent)
    assert names == ["none", "kl", "ldifs"]
    folder = out / "runs" / made.runs[1].folder
    if damage == "average":
        (folder / "ema").mkdir()
    elif damage == "gone":
        (folder / "adapter_model.safetensors").unlink()
    else:
        os.truncate(folder / "adapter_model.safetensors", 0 if damage == "empty" else 40)
    console = Console(record=True)
    show_plan(made, out, console)
    assert re.search(r"kl, seed 0: to train\b", console.export_text())
    train_all(made, out, silent)
    assert names[3:] == ["kl"]


def test_a_run_that_kept_nothing_is_not_trained_again(tmp_path, trained, monkeypatch):
    """It would end in the same way: its first measured drift is above its budget."""
    made, said = plan(tmp_path, f"{TEXT}benign_task: permuted_operators\n"), []
    train = training.run_process

    def keep_nothing(run, *args):
        status = train(run, *args)
        return {"error": KEPT_NOTHING, "step": None} if run.name == "kl" else status

    monkeypatch.setattr(training, "run_process", keep_nothing)
    for _ in range(2):
        kl = train_all(made, tmp_path / "out", said.append)[1]
        assert (kl.error, kl.adapter) == (KEPT_NOTHING, None)
        assert kl.folder == str(tmp_path / "out" / "runs" / made.runs[1].folder)
    assert trained[0] == ["none", "kl", "ldifs"]
    assert said.count(f"  failed: {KEPT_NOTHING}") == 2
    console = Console(record=True, width=200)
    show_plan(made, tmp_path / "out", console)
    text = console.export_text()
    assert f"kl, seed 0: failed: {KEPT_NOTHING}" in text
    assert "0 runs to train, and 2 on the benign task" in text
    assert [(place, run.name) for place, run in unfinished(made, tmp_path / "out")] == [
        ("benign", "none"),
        ("benign", "ldifs"),
    ]


def test_the_benign_task_has_all_steps_of_a_run_that_kept_an_earlier_one(tmp_path, monkeypatch):
    """A run that `stop_on_drift` ended would otherwise have too few steps there to be measured before the last."""
    made, steps = plan(tmp_path, f"{TEXT}benign_task: permuted_operators\n"), {}

    def run(run, recipe, folder):
        steps[folder.parent.name, run.name] = run.options.get("max_steps")
        save_weights(folder)
        if run.name == "kl" and folder.parent.name == RUNS:
            (folder / "drift.json").write_text(json.dumps({"step": 3, "trained_to": 6}))
        return STATUS

    monkeypatch.setattr(training, "run_process", run)
    train_benign(made, train_all(made, tmp_path / "out", silent), tmp_path / "out", silent)
    assert [steps["benign", name] for name in ("none", "kl", "ldifs")] == [3, 6, 3]


def test_the_status_reaches_the_disk_last(tmp_path, trained, monkeypatch):
    """A power loss could otherwise leave a status without its adapter."""
    made, synced = plan(tmp_path, TEXT), []
    monkeypatch.setattr(
        training, "to_disk", lambda path: synced.append((path.name, (path.parent / "run.json").exists()))
    )
    train_all(made, tmp_path / "out", silent)
    assert synced == [("adapter_model.safetensors", False)] * 3


def test_trainings_of_other_versions_are_told(tmp_path, trained, monkeypatch):
    made, out = plan(tmp_path, TEXT), tmp_path / "out"
    old, new = {"torch": "1.0", "trl": "0.9"}, {"torch": "2.0", "trl": "0.9"}
    monkeypatch.setattr(training, "versions", lambda: old)
    train_all(made, out, silent)
    (out / "runs" / made.runs[0].folder / "run.json").unlink()
    without = out / "runs" / made.runs[1].folder / "run.json"  # earlier versions of this package stored no versions
    without.write_text(json.dumps(STATUS))
    monkeypatch.setattr(training, "versions", lambda: new)
    found = train_all(made, out, silent)
    assert [run.versions for run in found] == [new, None, old]
    told = other_versions(found, new)
    assert told == ["Number of trainings made with torch 1.0: 1."]
    page = write_page(report({"none": (-1.0, -1.0)}), tmp_path, INFO | {"other_versions": told})
    assert told[0] in page.read_text(encoding="utf-8")
