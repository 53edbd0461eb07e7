"""Versions of the package's neighbours: tested ones are taken, newer ones checked, older ones refused."""

import configparser
import re
import warnings
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import Trainer
from trl import SFTTrainer

from trl_emguard import compat
from trl_emguard.compat import TESTED, check_environment
from trl_emguard.evidence import InactiveDefenseError
from trl_emguard.guard.loss import LossGuard
from trl_emguard.models.adapters import AdapterSwitch
from trl_emguard.selfcheck import SelfCheckError, check_names, check_steps


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Returns a function that sets the versions that seem to be installed; the others are the first tested ones."""
    monkeypatch.setenv("TRL_EMGUARD_CACHE", str(tmp_path / "cache"))

    def install(**versions):
        def find(name):
            if versions.get(name, "") is None:
                raise PackageNotFoundError(name)
            return versions.get(name) or TESTED[name][0]

        monkeypatch.setattr(compat, "version", find)

    return install


@pytest.fixture
def checks(monkeypatch):
    """Returns the list of self-checks that were made. Each has the result that `answer` of the list says."""

    class Checks(list):
        answer = None

        def check(self):
            self.append(self.answer)
            return self.answer

    made = Checks()
    monkeypatch.setattr(compat, "self_check", made.check)
    return made


def refused():
    with pytest.raises(ImportError) as error:
        check_environment()
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_setup_cfg_has_the_lower_bounds_and_no_upper_ones():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line for line in config["options"]["install_requires"].split("\n") if line and not line.startswith("#")]
    required = {r.name: r.specifier for r in map(Requirement, lines)}
    for name, (first, _) in TESTED.items():
        assert required[name] == SpecifierSet(f">={first}")
    assert not [name for name, specifier in required.items() if any(part.operator != ">=" for part in specifier)]


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("which", ["first", "last patch", "local"])
def test_tested_versions_pass_without_a_check(install, checks, name, which):
    first = Version(TESTED[name][0])
    found = {"first": f"{first}", "last patch": f"{first.major}.{first.minor}.99", "local": f"{first}+cpu"}[which]
    install(**{name: found})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_environment()
    assert checks == []


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("found", ["0.1", "first.dev1", None])
def test_older_and_missing_ones_are_refused_without_a_check(install, checks, name, found):
    first, after = TESTED[name]
    found = found and found.replace("first", first)
    install(**{name: found})
    message = refused()
    assert f"needs {name} >={first}" in message
    assert (f"{name} {found} is installed" if found else "not installed") in message
    assert f"`pip install '{name}>={first},<{after}'`" in message
    assert len(re.findall(r"\.(\s|$)", message)) == 1
    assert checks == []


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("form", ["{}.0", "{}.dev1", "99.0"])
def test_newer_ones_are_checked_once_and_warned_of(install, checks, name, form):
    found = form.format(TESTED[name][1])
    install(**{name: found})
    for _ in range(2):
        with pytest.warns(UserWarning, match=rf"not tested with {name} {re.escape(found)}") as heard:
            check_environment()
        assert len(heard) == 1
        assert f"pip install '{name}>={TESTED[name][0]},<{TESTED[name][1]}'" in str(heard[0].message)
    assert checks == [None]


def test_another_set_of_versions_is_checked_again(install, checks):
    for versions in ({"trl": "99.0"}, {"trl": "99.1"}, {"trl": "99.1", "peft": "99.0"}, {"trl": "99.0"}):
        install(**versions)
        with pytest.warns(UserWarning, match="not tested"):
            check_environment()
    assert len(checks) == 3


def test_a_failing_check_is_told_and_made_again(install, checks):
    install(trl="99.0", torch="98.0")
    checks.answer = "SFTTrainer._gone is gone"
    for _ in range(2):
        message = refused()
        assert "does not work with torch 98.0 and trl 99.0" in message
        assert "SFTTrainer._gone is gone" in message
        tested = " ".join("'{}>={},<{}'".format(name, *TESTED[name]) for name in ("torch", "trl"))
        assert message.endswith(f"Run `pip install {tested}`.")
    checks.answer = None
    with pytest.warns(UserWarning, match="not tested"):
        check_environment()
    assert len(checks) == 3


def test_a_cache_that_cannot_be_written_costs_a_check_each_time(install, checks, tmp_path):
    (tmp_path / "cache").write_text("a file")
    install(trl="99.0")
    for _ in range(2):
        with pytest.warns(UserWarning, match="not tested"):
            check_environment()
    assert len(checks) == 2


@pytest.mark.parametrize("rank", ["0", "3"])
def test_the_first_rank_alone_warns(install, checks, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    install(trl="99.0")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        check_environment()
    assert len(heard) == (rank == "0")


# ---- the self-check itself ----


def test_the_check_passes_in_a_process_of_its_own(install, monkeypatch):
    """With the variables of a launcher around it."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    assert compat.self_check() is None


@pytest.mark.long
def test_the_process_tells_why_it_fails(monkeypatch, tmp_path):
    # Python runs this file at its start.
    (tmp_path / "sitecustomize.py").write_text(
        "from transformers import Trainer\ndel Trainer._run_epoch\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.self_check() == "SFTTrainer._run_epoch is gone"


def test_tested_versions_have_the_names_and_parameters():
    check_names()


@pytest.mark.parametrize(
    "damage",
    [
        lambda patch: patch.delattr(Trainer, "_run_epoch"),
        lambda patch: patch.setattr(SFTTrainer, "_save_checkpoint", lambda self, model, trial, new: None),
    ],
    ids=["gone", "other parameters"],
)
def test_a_private_method_that_is_gone_or_other_is_told(monkeypatch, damage):
    damage(monkeypatch)
    with pytest.raises(SelfCheckError, match=r"_run_epoch is gone|_save_checkpoint takes"):
        check_names()


def test_two_steps_are_those_of_the_loss(tmp_path):
    check_steps(tmp_path)


def scaled(monkeypatch):
    """Divide the loss of a micro-batch, as a version that counts accumulation another way would."""
    call = LossGuard.__call__

    def half(self, *args):
        outputs = call(self, *args)
        outputs.total = outputs.total / 2
        return outputs

    monkeypatch.setattr(LossGuard, "__call__", half)


def same(monkeypatch):
    """Let the reference be the policy, as a version whose adapters are switched another way would."""
    monkeypatch.setattr(AdapterSwitch, "only", lambda self, adapter: nullcontext())


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [(scaled, SelfCheckError, "gradient of"), (same, InactiveDefenseError, "reference has moved")],
)
def test_two_steps_find_a_change_that_raises_nothing(monkeypatch, tmp_path, damage, error, message):
    damage(monkeypatch)
    with pytest.raises(error, match=message):
        check_steps(tmp_path)
