"""Score a pool of rows by how much less likely their answers are under misaligned models than under the aligned one.

```bash
trl-emguard score --model Qwen/Qwen2.5-7B-Instruct --misaligned out/medical out/legal \\
    --dataset pool.jsonl --output scores.parquet
accelerate launch -m trl_emguard.scripts.score …
```

The score of a row is called its perplexity gap. `trl-emguard select` then chooses rows by their gaps.
"""

import argparse
import sys
from datetime import timedelta
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from ..data.conversation import PROMPT_COLUMN, RESPONSE_COLUMN, check_columns, conversation, turn_text
from ..data.labels import count_harmful, keep_where
from ..data.load import SourceOptions, load_rows
from ..io.files import check_writable
from ..io.terminal import visible
from ..selection.choose import rank_rows
from ..selection.scored import GAP, ScoresInfo
from .shared import RESUMES, name_adapters, run_command, to_path


SHOWN = 10
OPTIONS = SourceOptions("--dataset", "--split", "--dataset-config")


class Once(argparse.Action):
    """Action that stores a value, and refuses a second value."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        first = getattr(namespace, self.dest)
        if first is not None:
            raise argparse.ArgumentError(self, f"{first!r} and {values!r} are two values: give one.")
        setattr(namespace, self.dest, values)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return run_command("score", lambda: run(args, Console(width=100, markup=False)), RESUMES)


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("trl-emguard score", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="the aligned base model: folder, hub id or shipped name")
    parser.add_argument(
        "--misaligned",
        required=True,
        nargs="+",
        action="extend",
        metavar="[NAME=]ADAPTER",
        help="misaligned adapters of this model: folders that PEFT saved, or hub ids; a name is for --exclude-adapter",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        action=Once,
        help="the pool: a JSONL, JSON, CSV or parquet file, a shipped set, or a `datasets` id",
    )
    parser.add_argument("--output", required=True, type=to_path, help="the .parquet file to write")
    parser.add_argument(
        "--split", default="train", help="split of the data set, or a slice as 'train[:100]' (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset-config", "--dataset_config", help="configuration of the data set, `name` of `load_dataset`"
    )
    parser.add_argument(
        "--where", action=Once, metavar="COLUMN=VALUE", help="keep only the rows whose column has this value"
    )
    parser.add_argument("--epsilon", type=float, default=1.0, help="ε of the gap (default: %(default)s)")
    parser.add_argument(
        "--prompt-column",
        "--prompt_column",
        default=PROMPT_COLUMN,
        help="prompts of plain text (default: %(default)s)",
    )
    parser.add_argument(
        "--response-column",
        "--response_column",
        default=RESPONSE_COLUMN,
        help="answers of plain text (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        "--max_length",
        type=int,
        default=2048,
        help="longer rows are not scored (default: %(default)s tokens)",
    )
    parser.add_argument(
        "--batch-tokens",
        "--batch_tokens",
        type=int,
        help="tokens of a forward pass (default: 8192 on a GPU, 1024 on a CPU)",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bf16 on a GPU, else fp32"
    )
    return parser


def run(args: argparse.Namespace, console: Console) -> None:
    if args.output.suffix != ".parquet" or args.output.is_dir():
        raise ValueError(f"--output={args.output} must be a file that ends in .parquet.")
    check_writable("--output", args.output.parent)
    adapters = name_adapters(args.misaligned, "--misaligned")
    rows = _read_pool(args)

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from ..evaluation.candidates import check_base, check_candidates, from_adapters
    from ..models.load import load_base, load_tokenizer
    from ..models.shipped import resolve_model
    from ..selection.misaligned import adapter_key, load_adapter_config, load_misaligned
    from ..selection.score import check_pool, score_pool

    path = resolve_model(args.model)
    for name, adapter in adapters.items():
        check_base(name, adapter, args.model)
        load_adapter_config(name, adapter)
    tokenizer = load_tokenizer(path)
    check_pool(tokenizer, rows, args.epsilon, args.max_length, args.batch_tokens)
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    # A process that has scored its share waits for the others. This may take days, longer than the default timeout.
    state = PartialState(cpu=not cuda, timeout=timedelta(days=7))
    dtype = ("bfloat16" if cuda else "float32") if args.dtype == "auto" else args.dtype
    # A single process may spread the model over several GPUs; several processes have one GPU each.
    device_map = None if not cuda else "auto" if state.num_processes == 1 else {"": state.device}
    model = load_base(path, dtype=getattr(torch, dtype), device_map=device_map)
    with_adapters = load_misaligned(model, adapters)
    check_candidates(
        from_adapters(with_adapters, {name: adapter_key(with_adapters, name) for name in adapters}), tokenizer
    )
    console.quiet = not state.is_main_process
    for column, (count, others) in count_harmful(rows).items():
        hint = f": --where {column}={others[0]} leaves them out" if others else ""
        console.print(f"Warning: {column!r} calls {count} of {len(rows)} rows harmful{hint}.", soft_wrap=True)
    if args.output.exists():
        console.print(
            f"{args.output} exists: rows that are scored in it are not scored again.", soft_wrap=True, highlight=False
        )
    scored, info = score_pool(
        with_adapters,
        tokenizer,
        rows,
        list(adapters),
        epsilon=args.epsilon,
        max_length=args.max_length,
        batch_tokens=args.batch_tokens,
        prompt_column=args.prompt_column,
        response_column=args.response_column,
        output=args.output,
        progress=True,
    )
    show(scored, info, console)
    console.print(f"Saved: {args.output}", soft_wrap=True, highlight=False)
    state.destroy_process_group()


def _read_pool(args: argparse.Namespace) -> Dataset:
    """Return the pool's rows that meet `--where`. Refuse `--prompt_column` and the like if without effect."""
    rows = load_rows(args.dataset, args.split, args.dataset_config, options=OPTIONS)
    assert isinstance(rows, Dataset)  # `load_rows` returns another type only if asked for a stream
    if args.where is not None:
        rows = keep_where(rows, args.where)
    check_columns(rows, args.prompt_column, args.response_column)
    return rows


def show(scored: Dataset, info: ScoresInfo, console: Console) -> None:
    """Print rows with the highest scores (perplexity gaps), and some of the rows that could not be scored."""
    table = Table(title="The highest gaps")
    table.add_column(GAP, justify="right")
    table.add_column("prompt")
    table.add_column("answer")
    for row in scored.select(rank_rows(scored, "gap")[:SHOWN]):
        prompt, answer = conversation(row, info.prompt_column, info.response_column)
        texts = (visible(" ".join(turn_text(turns[-1]).split())[:70]) for turns in (prompt, answer))
        table.add_row(f"{row[GAP]:+.3f}", *texts)
    console.print(table)
    console.print(
        f"Scored {len(scored)} of {info.rows} rows under {info.model} and {', '.join(info.adapters)}.", soft_wrap=True
    )
    if info.unscored:
        console.print(
            f"{len(info.unscored)} rows could not be scored (counted from 0, after --where):", highlight=False
        )
        for index, reason in info.unscored[:SHOWN]:
            console.print(f"  row {index}: {reason}", soft_wrap=True, highlight=False, markup=False)
        if len(info.unscored) > SHOWN:
            console.print("  … and more: they stand in the file's metadata.", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
