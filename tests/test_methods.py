"""Test the list of methods: it has every defense of the package, and each behaves as listed."""

import pytest
from methods import COVERING, EVERYTHING, KINDS, METHODS, merged, run_options, split
from tiny import logged, lora, make_trainer, record

from trl_emguard.defenses import DEFENSES, ReferenceDefense
from trl_emguard.scripts.demo import RUNS


def test_every_defense_is_in_the_list():
    assert list(METHODS) == ["none", *DEFENSES]
    for name, defense in DEFENSES.items():
        assert METHODS[name].is_compared == issubclass(defense, ReferenceDefense)
    # The demo trains those that have what they need there.
    assert {name for options in RUNS.values() for name in split(options.get("defense", "none"))} <= METHODS.keys()


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
