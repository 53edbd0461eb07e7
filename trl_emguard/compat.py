"""The versions of its neighbours that the package was tested with."""

from importlib.metadata import PackageNotFoundError, version

from .version import __version__


# First version that works and first one that was not tried. `setup.cfg` states the same ranges (a test compares them).
# The package builds on private parts of TRL and PEFT, so another version may train an undefended model in silence.
TESTED = {
    "trl": ("1.16.0", "1.17"),
    "transformers": ("5.23.0", "5.24"),
    "peft": ("0.21.2", "0.22"),
    "accelerate": ("1.15.0", "1.16"),
}


def check_versions() -> None:
    """Refuse neighbours outside the tested range.

    Raises:
        ImportError: one is missing, too old or too new; one sentence says which and what to install.
    """
    from packaging.specifiers import SpecifierSet

    for name, (first, after) in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not SpecifierSet(f">={first},<{after}").contains(installed, prereleases=True):
            raise ImportError(
                f"trl_emguard {__version__} was tested with {name} >={first},<{after} and builds on private parts of "
                f"it, but {'it is not installed' if installed is None else f'{name} {installed} is installed'}: run "
                f"`pip install '{name}>={first},<{after}'`."
            )
