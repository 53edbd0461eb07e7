"""Multiply the change that a LoRA adapter makes to the base weights by a factor.

The result costs no further training. It is a baseline that every defense should beat.

```bash
trl-emguard rescale --adapter out/none --alpha 0.5 --output out/half
```
"""

import argparse
import sys

from ..models.rescale import rescale_adapter
from .shared import run_command


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "trl-emguard rescale", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--adapter", required=True, help="folder of a LoRA adapter that PEFT saved")
    parser.add_argument("--alpha", required=True, type=float, help="factor; 0 is the base model, 1 the adapter itself")
    parser.add_argument("--output", required=True, help="folder to write")
    args = parser.parse_args(argv)
    return run_command("rescale", lambda: print(rescale_adapter(args.adapter, args.alpha, args.output)))


if __name__ == "__main__":
    sys.exit(main())
