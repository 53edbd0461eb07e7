"""Choose rows to mix into the training data (interleaving), from a pool that `trl-emguard score` has scored.

```bash
trl-emguard select --scores scores.parquet --by gap --drop-refusals --count 5000 --output safe.jsonl
trl-emguard select --scores scores.parquet --by gap --exclude-adapter medical --fraction 0.05 --output safe.jsonl
```

The rows are written in order of preference. A histogram of the perplexity gaps, of all rows and of the chosen ones, is
saved beside them as a .png file if matplotlib is installed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from rich.console import Console

from ..data.conversation import conversation, turn_text
from ..io.files import written_whole
from ..selection.choose import rank_rows, refusal_filter, without_adapter
from ..selection.scored import GAP, read_scores, with_usual_names
from .shared import run_command, to_path


SHOWN = 10


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return run_command("select", lambda: run(args, Console(width=100, markup=False)))


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "trl-emguard select", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--scores", required=True, type=to_path, help="the file that `trl-emguard score` wrote")
    parser.add_argument(
        "--by", required=True, choices=["gap", "random"], help="the highest gaps first, or a random order"
    )
    parser.add_argument("--drop-refusals", "--drop_refusals", action="store_true", help="leave refusals out")
    parser.add_argument(
        "--refusals", type=to_path, help="a YAML file of your own that says what a refusal is (default: the shipped)"
    )
    share = parser.add_mutually_exclusive_group(required=True)
    share.add_argument("--count", type=int, help="number of rows")
    share.add_argument("--fraction", type=float, help="share of all scored rows, refusals included")
    parser.add_argument(
        "--exclude-adapter",
        "--exclude_adapter",
        metavar="NAME",
        help="held-out mode: leave this adapter out of the scores",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the random order, and of rows with equal gaps (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, type=to_path, help="the .jsonl file to write")
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    if args.output.suffix != ".jsonl" or args.output.is_dir():
        raise ValueError(f"--output={args.output} must be a file that ends in .jsonl.")
    if args.refusals is not None and not args.drop_refusals:
        raise ValueError(
            f"--refusals={args.refusals} says what a refusal is, but nothing drops them: add --drop-refusals."
        )
    rows, info = read_scores(args.scores)
    if args.exclude_adapter is not None:
        rows = without_adapter(rows, info, args.exclude_adapter)
    columns = (info.prompt_column, info.response_column)
    everything = rank_rows(rows, args.by, seed=args.seed)
    order = everything
    if args.drop_refusals:
        order = rank_rows(rows, args.by, True, args.seed, refusal_filter(args.refusals), *columns)
        kept = set(order)
        dropped = [i for i in everything if i not in kept]
        console.print(
            f"{len(dropped)} of {len(rows)} rows are refusals and left out{':' if dropped else '.'}", highlight=False
        )
        for row in rows.select(dropped[:SHOWN]):
            answer = " ".join(turn_text(conversation(row, *columns).completion[0]).split())
            console.print(f"  {row[GAP]:+.3f}  {answer[:80]}", highlight=False, markup=False)

    count = count_of(args, len(rows))
    if count > len(order):
        raise ValueError(
            f"{count} rows are asked for, and {len(order)} are there: lower --count or --fraction, or score more."
        )
    chosen = rows.select(order[:count])
    # Metadata of a scored pool names its prompt and response columns. JSONL has no metadata, so these columns get the
    # names that readers expect by default: `prompt` and `response`.
    write_jsonl(with_usual_names(chosen, *columns), args.output)
    console.print(f"Saved: {args.output} ({count} of {len(rows)} rows)", soft_wrap=True, highlight=False)
    picture = args.output.with_suffix(".png")
    try:
        draw(np.array(rows[GAP]), np.array(chosen[GAP]), picture)
    except ImportError:
        console.print("No picture: it needs matplotlib (`pip install matplotlib`).")
    else:
        console.print(f"Picture: {picture}", soft_wrap=True, highlight=False)


def count_of(args: argparse.Namespace, total: int) -> int:
    """Return the number of rows that `--count` or `--fraction` ask for, 1 or more."""
    if args.count is not None:
        if args.count < 1:
            raise ValueError(f"--count={args.count} must be 1 or more.")
        return args.count
    if not 0 < args.fraction <= 1:
        raise ValueError(f"--fraction={args.fraction} must lie above 0, and 1 at most.")
    return max(1, round(args.fraction * total))


def write_jsonl(rows: Dataset, path: Path) -> None:
    """Write rows as JSONL, in one atomic step."""
    try:
        with written_whole(path) as scratch, scratch.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise ValueError(
            f"the rows do not go into a JSONL file ({error}): remove that column from the pool."
        ) from error


def draw(gap: np.ndarray, chosen: np.ndarray, path: Path) -> None:
    """Draw a histogram of the scores (perplexity gaps) of all rows, and of the chosen rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    bins = np.histogram_bin_edges(gap, bins=60).tolist()
    axis.hist(gap, bins, color="#9aa0a6", label=f"all {len(gap)} rows")
    axis.hist(chosen, bins, color="#2e86ab", label=f"the {len(chosen)} chosen")
    axis.set_yscale("log")
    axis.set_xlabel("perplexity gap")
    axis.set_ylabel("rows")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
