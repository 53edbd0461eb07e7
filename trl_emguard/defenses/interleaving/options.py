"""Options of `interleave`, `interleave+` and `interleave++`."""

from dataclasses import dataclass

from ..options import option


@dataclass
class InterleavingOptions:
    """Options of `interleave`, `interleave+` and `interleave++`: general instruct rows mixed in."""

    interleave_dataset: str | None = option(
        None,
        "Pool of general instruct rows: a JSONL or parquet file, a shipped set or a `datasets` id, with rows of "
        "`messages`, of `prompt` and `completion`, or of `prompt` and `response`. 'interleave+' and 'interleave++' "
        "want one that `trl-emguard score` has scored. The trainer also takes a `Dataset`.",
    )
    interleave_config: str | None = option(None, "Configuration of that data set, `name` of `load_dataset`.")
    interleave_split: str = option("train", "Split of that data set, or a slice of it.")
    interleave_where: str | None = option(
        None, "Condition COLUMN=VALUE that a row of the pool must meet, as 'response_harm_label=unharmful'."
    )
    interleave_fraction: float = option(
        0.05, "Share of the pool's rows in the mix, so 0.05 is one in twenty. 0 switches the defense off."
    )
    interleave_redraw: bool = option(
        False,
        "Whether every epoch continues in the (ordered) pool where the last one stopped, instead of taking the same "
        "rows again.",
    )
