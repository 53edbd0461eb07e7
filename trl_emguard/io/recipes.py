"""Paths of the recipes folder and of single recipes."""

import os
from pathlib import Path


def recipes_dir() -> Path:
    """Return the folder with the recipes and accelerate configs.

    Raises:
        FileNotFoundError: no recipes lie in the package or beside it, so the installation is broken.
    """
    package = Path(__file__).resolve().parents[1]
    # An installed wheel has the recipes inside the package. A git checkout has them beside the package.
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "accelerate_configs").is_dir():
            return folder
    raise FileNotFoundError(f"no recipes beside {package}: reinstall trl_emguard.")


def find_recipe(path: str) -> Path:
    """Find a recipe by its path, or by its path inside the recipes folder.

    Raises:
        FileNotFoundError: neither path is a file.
    """
    for candidate in (Path(os.path.expanduser(path)), recipes_dir() / path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"config {path!r} is not a file, here or in {recipes_dir()}.")
