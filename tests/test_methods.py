"""Test the list of methods: it has every defense of the package, and each behaves as listed."""

from importlib import import_module
from pathlib import Path

import pytest
from methods import COVERING, EVERYTHING, KINDS, METHODS, merged, run_options, split
from tiny import logged, lora, make_trainer, record

from trl_emguard.defenses import DEFENSES, ReferenceDefense
from trl_emguard.scripts import demo


def test_every_defense_is_in_the_list():
    assert list(METHODS) == ["none", *DEFENSES]
    for name, defense in DEFENSES.items():
        assert METHODS[name].is_compared == issubclass(defense, ReferenceDefense)


NO_DEMO = "a newcomer waits while the demo trains, so it has few runs"
BY_MAIN = "made by `main`, since its request, vector or adapter belongs to the testbed or to the other domain"
# Script → kinds of defense that its list of runs leaves out, each with the reason.
LEFT_OUT = {
    "demo": dict.fromkeys(("treft", "steering", "inoculation", "inoculation_adapter"), NO_DEMO),
    "em": {"none": "added by every comparison", "inoculation_adapter": BY_MAIN},
    "testbed": {
        "none": "added by every comparison",
        **dict.fromkeys(("steering", "inoculation", "inoculation_adapter"), BY_MAIN),
    },
}


@pytest.mark.parametrize("script", LEFT_OUT)
def test_a_script_runs_every_kind_or_says_why_not(script, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    runs = [*demo.RUNS.values()] if script == "demo" else import_module(script).RUNS
    names = {name for run in runs for name in split(run.get("defense", "none"))}
    assert names <= METHODS.keys()
    assert names.isdisjoint(LEFT_OUT[script])
    assert names | LEFT_OUT[script].keys() == {*KINDS}


def test_no_kind_is_left_out_of_the_short_lists():
    def kinds(names):
        return {METHODS[name].logs + METHODS[name].counts + METHODS[name].inputs for name in names}

    assert kinds(KINDS) == kinds(METHODS)
    for runs in (COVERING, ["none", EVERYTHING]):
        assert kinds(name for defense in runs for name in split(defense)) == kinds(KINDS)


@pytest.mark.parametrize("defense", METHODS)
def test_a_run_logs_and_proves_what_the_list_says(tmp_path, defense):
    trainer = make_trainer(tmp_path, peft=lora(), **run_options(defense, tmp_path))
    trainer.train()
    method, evidence = METHODS[defense], record(trainer)["evidence"]
    assert all(len(logged(trainer, name)) == 5 for name in method.logs)
    assert list(evidence) == ([] if defense == "none" else [defense])
    assert all(evidence[defense][name] for name in method.counts)


@pytest.mark.parametrize("defense", [name for name, method in METHODS.items() if method.off])
def test_a_method_that_is_off_leaves_nothing_in_the_log(tmp_path, defense):
    trainer = make_trainer(tmp_path, peft=lora(), **{**run_options(defense, tmp_path), **merged(defense, "off")})
    trainer.train()
    assert not any(logged(trainer, name) for name in METHODS[defense].logs)
    assert record(trainer)["evidence"].keys() <= {defense}
