"""Test the installed package, and the versions of its neighbours."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import trl_emguard
from trl_emguard.compat import TESTED, check_versions
from trl_emguard.data.load import SHIPPED
from trl_emguard.io import recipes
from trl_emguard.persona import SHIPPED_TRAITS, SHIPPED_VECTORS
from trl_emguard.scripts import main as commands


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_cfg():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["options"]


def lines(text):
    return [line for line in text.split("\n") if line and not line.startswith("#")]


# ---- setup.cfg ----


def test_every_folder_with_python_files_is_a_package(setup_cfg):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "trl_emguard").rglob("*.py")}
    assert sorted(lines(setup_cfg["packages"])) == sorted(
        [".".join(f.parts) for f in folders] + ["trl_emguard.recipes"]
    )


def test_ranges_are_those_that_are_checked(setup_cfg):
    required = {r.name: r.specifier for r in map(Requirement, lines(setup_cfg["install_requires"]))}
    for name, (first, after) in TESTED.items():
        assert required[name] == SpecifierSet(f">={first},<{after}")


def test_the_installed_version_is_the_package_s():
    assert version("trl_emguard") == trl_emguard.__version__


def test_the_console_command_is_main():
    (command,) = entry_points(group="console_scripts", name="trl-emguard")
    assert command.load() is commands.main


# ---- versions ----


def installed(monkeypatch, **versions):
    def find(name):
        if versions.get(name, "") is None:
            raise PackageNotFoundError(name)
        return versions.get(name) or TESTED[name][0]

    monkeypatch.setattr("trl_emguard.compat.version", find)


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("which", ["first", "last patch"])
def test_tested_versions_pass(monkeypatch, name, which):
    first = Version(TESTED[name][0])
    found = str(first) if which == "first" else f"{first.major}.{first.minor}.99"
    installed(monkeypatch, **{name: found})
    check_versions()


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("which", ["older", "first untried", "next major"])
def test_other_versions_are_refused_in_one_sentence(monkeypatch, name, which):
    first, after = TESTED[name]
    found = {"older": f"{first}.dev1", "first untried": f"{after}.0", "next major": "99.0"}[which]
    installed(monkeypatch, **{name: found})
    with pytest.raises(ImportError) as error:
        check_versions()
    message = str(error.value)
    assert f"{name} {found} is installed" in message
    assert f"pip install '{name}>={first},<{after}'" in message
    assert message.count("\n") == 0
    assert len(re.findall(r"\.(\s|$)", message)) == 1


def test_a_missing_neighbour_is_refused(monkeypatch):
    installed(monkeypatch, peft=None)
    with pytest.raises(ImportError, match=r"not installed: run `pip install 'peft>="):
        check_versions()


# ---- a plain install ----


def test_a_plain_install_holds_everything(tmp_path):
    """Build the package as `pip install .` does, unpack it, and ask it for its recipes."""
    skipped = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=skipped)
    try:
        isolated = [] if Version(version("setuptools")) < Version("77") else ["--no-build-isolation"]
    except PackageNotFoundError:
        isolated = []
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        *isolated,
        "--wheel-dir",
        "wheels",
        "./tree",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    found = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}

    expected = {"trl_emguard/py.typed", "trl_emguard/selection/refusals.yaml"}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "trl_emguard").rglob("*.py")}
    expected |= {
        str(path.relative_to(ROOT))
        for name in SHIPPED
        for path in (ROOT / "trl_emguard/data/shipped" / name).iterdir()
    }
    expected |= {f"trl_emguard/persona/shipped/{name}.yaml" for name in SHIPPED_TRAITS}
    expected |= {f"trl_emguard/persona/shipped/{name}.safetensors" for name in SHIPPED_VECTORS}
    shipped_recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {"recipes/accelerate_configs/cpu.yaml", "recipes/smollm2-135m-instruct/sft.yaml"} <= shipped_recipes
    expected |= {f"trl_emguard/{path}" for path in shipped_recipes}
    assert expected - found == set()

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "trl_emguard.scripts.main", "recipes"]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert answer.stdout == f"{tmp_path.resolve() / 'site' / 'trl_emguard' / 'recipes'}\n"


# ---- commands that need no training ----


def test_recipes_command_prints_the_folder(capsys):
    assert commands.main(["recipes"]) == 0
    assert capsys.readouterr().out == f"{ROOT / 'recipes'}\n"


def test_missing_recipes_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "a" / "b" / "recipes.py"))
    with pytest.raises(FileNotFoundError, match="reinstall"):
        recipes.recipes_dir()


@pytest.mark.parametrize("argv", [[], ["sff"], ["--sft"]])
def test_unknown_commands_are_refused(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        commands.main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_its_own_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        commands.main([name, "--help"])
    assert stop.value.code == 0
    assert f"trl-emguard {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", trl_emguard.__all__)
def test_every_public_name_is_there(name):
    assert getattr(trl_emguard, name) is not None


def test_unknown_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'KlTrainer'"):
        trl_emguard.KlTrainer  # noqa: B018
