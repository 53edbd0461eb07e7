"""Test the installed package: its metadata, its wheel, and commands that need no training."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest
from packaging.version import Version

import trl_emguard
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


def test_the_installed_version_is_the_package_s():
    assert version("trl_emguard") == trl_emguard.__version__


def test_the_console_command_is_main():
    (command,) = entry_points(group="console_scripts", name="trl-emguard")
    assert command.load() is commands.main


# Names of commit f95102f, in modules that its docs name, whose definitions have moved since.
@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("memory", "Engine Run Shape Weights count_weights memory_per_rank peak network_per_step placed"),
        ("memory", "optimizer_states block_activations saved_activations working_bytes head_bytes compared_states"),
        ("selection.choose", "METADATA_KEY ScoresInfo misaligned_column perplexity_gap read_scores write_scores"),
        ("selection.score", "load_misaligned score_pool encode_rows plan_batches"),
    ],
)
def test_earlier_import_paths(module, names):
    found = vars(import_module(f"trl_emguard.{module}"))
    assert [name for name in names.split() if name not in found] == []


# ---- make ----


def test_an_old_python_is_refused_before_an_environment_is_made(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); $2"\n')
    python.chmod(0o755)
    for target in ("setup", "test-latest"):
        done = subprocess.run(
            ["make", target, f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "Python 3.9 is too old: install 3.11 to 3.13, or name one by make PYTHON=" in done.stderr
        assert not list(tmp_path.glob(".venv*"))


# ---- a plain install ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns the wheel that `pip install .` would build."""
    home = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, home / "tree", ignore=skipped)
    try:
        isolated = [] if Version(version("setuptools")) < Version("77") else ["--no-build-isolation"]
    except PackageNotFoundError:
        isolated = []
    pip("wheel", "--no-deps", *isolated, "--wheel-dir", "wheels", "./tree", cwd=home)
    (built,) = (home / "wheels").glob("*.whl")
    return built


def pip(*words, **how):
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], check=True, **how)


def test_the_wheel_holds_everything(wheel):
    found = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "trl_emguard").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {
        "trl_emguard/py.typed",
        "trl_emguard/selection/refusals.yaml",
        *(f"trl_emguard/persona/shipped/{name}.yaml" for name in SHIPPED_TRAITS),
        *(f"trl_emguard/persona/shipped/{name}.safetensors" for name in SHIPPED_VECTORS),
    } <= expected
    assert all(any(name.startswith(f"trl_emguard/data/shipped/{rows}/") for name in expected) for rows in SHIPPED)
    shipped_recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert {"recipes/accelerate_configs/cpu.yaml", "recipes/smollm2-135m-instruct/sft.yaml"} <= shipped_recipes
    expected |= {f"trl_emguard/{path}" for path in shipped_recipes}
    assert expected - found == set()
    # Nothing beside the package is installed.
    top = {name.split("/")[0] for name in found}
    assert top == {"trl_emguard", f"trl_emguard-{trl_emguard.__version__}.dist-info"}


@pytest.mark.long
def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    """Run the commands in a fresh environment that sees the neighbours of this one, from an empty folder."""
    venv.create(tmp_path / "venv", symlinks=True)
    binaries = tmp_path / "venv" / "bin"
    python = str(binaries / "python")
    pip("--python", python, "install", "--no-deps", "--no-index", str(wheel))
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # A folder that is named there is only looked into: the editable install in it is not followed.
    neighbours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "neighbours.pth").write_text("".join(f"{folder}\n" for folder in neighbours), encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words):
        done = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    ask = "import sys, trl_emguard; print(trl_emguard.__file__, *sys.path, sep='\\n')"
    home, *path = run(python, "-c", ask).splitlines()
    assert Path(home).is_relative_to(site)
    assert str(ROOT) not in path
    command = str(binaries / "trl-emguard")
    assert run(command, "recipes") == f"{site.resolve() / 'trl_emguard' / 'recipes'}\n"
    assert "trl-emguard demo" in run(command, "demo", "--help")
    # Rows and pool are those that the wheel has.
    report = run(command, "sft", "--config", "smollm2-135m-instruct/interleaving-kl.yaml", "--dry_run")
    assert "dry run: nothing is trained or written" in report
    assert "defense 'interleave++' acts (interleave_dataset=" in report
    assert list(empty.iterdir()) == []


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
