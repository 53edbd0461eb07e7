"""Tested versions of the libraries that this package builds on, and the check of newer versions."""

import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from .io.files import cache_dir
from .version import __version__


# Library → oldest version that works, and first version that was not tried. `setup.cfg` states the oldest version as
# well, and a test compares the two. This package builds on private parts of TRL and PEFT, so with another version it
# may train an undefended model without an error.
TESTED = {
    "torch": ("2.13.0", "2.14"),
    "trl": ("1.16.0", "1.17"),
    "transformers": ("5.23.0", "5.24"),
    "peft": ("0.21.2", "0.22"),
    "accelerate": ("1.15.0", "1.16"),
}
# Environment variable that `self_check` sets in the process that it starts. This process imports the package too, and
# must not start another self-check.
IN_CHECK = "TRL_EMGUARD_SELF_CHECK"
# Seconds that the self-check may take. Usually it takes a few.
PATIENCE = 600
# Beginnings of the names of environment variables that a launcher such as torchrun sets. `self_check` does not hand
# these variables to its process, because they would make that process wait for other ranks.
LAUNCHED = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
    "OMPI_",
    "PMI_",
    "MV2_",
)


def versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that its numbers depend on, by name."""
    return {"trl_emguard": __version__} | {name: version(name) for name in ("torch", "transformers", "peft", "trl")}


def check_environment() -> None:
    """Refuse required libraries that are missing or too old. Run a self-check if one is newer than tested.

    The self-check runs once for each set of versions; `$TRL_EMGUARD_CACHE/self_check` lists the sets for which it
    succeeded. Tested versions need no self-check.

    Raises:
        ImportError: one sentence says which package is the cause, and what to install.
    """
    from packaging.specifiers import SpecifierSet

    found: dict[str, str] = {}
    newer = []
    for name, (first, after) in TESTED.items():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
        if not (found[name] and SpecifierSet(f">={first}").contains(found[name], prereleases=True)):
            raise ImportError(
                f"trl_emguard {__version__} needs {name} >={first}, but "
                f"{f'{name} {found[name]} is installed' if found[name] else 'it is not installed'}: run "
                f"`pip install {_tested(name)}`."
            )
        if not SpecifierSet(f"<{after}").contains(found[name], prereleases=True):
            newer.append(name)
    if newer and IN_CHECK not in os.environ:
        _check_newer(newer, found)


def _tested(name: str) -> str:
    first, after = TESTED[name]
    return f"'{name}>={first},<{after}'"


def _check_newer(newer: list[str], found: dict[str, str]) -> None:
    """Warn of libraries that are newer than tested, and refuse them if the self-check fails."""
    installed = " and ".join(f"{name} {found[name]}" for name in newer)
    fix = f"`pip install {' '.join(map(_tested, newer))}`"
    versions = {"trl_emguard": __version__, "python": python_version(), **found}
    passed = cache_dir() / "self_check" / "_".join(f"{name}-{which}" for name, which in versions.items())
    # `os.path.isfile` returns False if access to the folder is denied. Before Python 3.14, `Path.is_file` would raise
    # an error.
    if not os.path.isfile(passed):
        cause = self_check()
        if cause is not None:
            raise ImportError(
                f"trl_emguard {__version__} does not work with {installed}, which is newer than what it was tested "
                f"with: {cause}. Run {fix}."
            )
        with suppress(OSError):  # if the file cannot be written, the next import checks again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"trl_emguard {__version__} was not tested with {installed}. Two steps of training came out right in a "
            f"self-check. {fix} installs what was tested.",
            stacklevel=4,
        )


def self_check() -> str | None:
    """Run `trl_emguard.selfcheck` in a process of its own, and return the cause if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    environment |= {IN_CHECK: "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trl_emguard.selfcheck"]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return f"the self-check did not end within {PATIENCE} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"the self-check ended with exit code {done.returncode}"]
    return lines[-1].rstrip(".")
