"""`trl-emguard recipes`: print the folder of the shipped YAML recipes, in a checkout or after `pip install`."""

import argparse
import sys

from ..io.recipes import find_recipe, recipes_dir


__all__ = ["find_recipe", "main", "recipes_dir"]


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="trl-emguard recipes", description=__doc__, allow_abbrev=False).parse_args(argv)
    print(recipes_dir())
    return 0


if __name__ == "__main__":
    sys.exit(main())
