"""`python -m trl_emguard.scripts.model NAME`: print the folder of a shipped model, which is made if it is missing.

The folder is made from weights in an installed Python package. The last line of the output is the folder's path.
"""

import argparse
import sys

from ..models.shipped import SHIPPED_MODELS, resolve_model
from .shared import run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trl-emguard model", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=SHIPPED_MODELS, help="the model's short name")
    args = parser.parse_args(argv)
    return run_command("model", lambda: print(resolve_model(args.name)))


if __name__ == "__main__":
    sys.exit(main())
