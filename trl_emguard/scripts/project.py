"""Project updates of a LoRA adapter onto the changes that alignment made to the weights of its model (SafeLoRA).

```bash
trl-emguard project --adapter out/none --base Qwen/Qwen2.5-7B --aligned Qwen/Qwen2.5-7B-Instruct --output out/safe
```

The command reads the model's weights from before and after its alignment. Both sets of weights must already be on
this machine, in a folder or in the hub's cache.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from ..io.terminal import visible
from ..models.safelora import RECORD, Projection, project_adapter
from .shared import run_command, to_path


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return run_command("project", lambda: run(args, Console(width=100, markup=False)))


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "trl-emguard project", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--adapter", required=True, type=to_path, help="folder of a LoRA adapter that PEFT saved")
    parser.add_argument("--base", required=True, help="weights before the alignment: folder, hub id or shipped name")
    parser.add_argument("--aligned", required=True, help="weights after it, which the adapter was trained on")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.3,
        help="a layer is projected if its cosine is at most this (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, type=to_path, help="folder to write")
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    is_copy = (args.adapter / RECORD).is_file()
    projection = project_adapter(args.adapter, args.base, args.aligned, args.output, args.threshold)
    console.print(make_table(projection))
    count = sum(layer.is_projected for layer in projection.layers)
    if is_copy:
        console.print("The adapter was projected already with these models and threshold: it is copied unchanged.")
    console.print(
        f"Projected: {count} of {len(projection.layers)} layers, with cosines up to {projection.threshold:g}"
    )
    console.print(f"Saved: {args.output}", soft_wrap=True, highlight=False)


def make_table(projection: Projection) -> Table:
    """Return a table of the results, one row per layer.

    The cosine and the ratio of norms compare a layer's update BA with its projection C·BA. The function
    [`~trl_emguard.models.safelora.project_adapter`] defines C. The last column says if C·BA replaced BA.
    """
    table = Table()
    table.add_column("layer", overflow="fold")
    for heading in ("cos(C·BA, BA)", "‖C·BA‖ / ‖BA‖", "projected"):
        table.add_column(heading, justify="right")
    for layer in projection.layers:
        numbers = ("–" if value is None else f"{value:.4f}" for value in (layer.cosine, layer.ratio))
        table.add_row(visible(layer.name), *numbers, "yes" if layer.is_projected else "no")
    return table


if __name__ == "__main__":
    sys.exit(main())
