"""Write the tables of docs/benchmarks.md and draw its pictures, from the CSVs in benchmarks/results.

python benchmarks/report.py
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

from harness import RESULTS, read_csv


DOCS = Path(__file__).parent.parent / "docs"
GPU_ABSENT = "not measured: no GPU was at hand"

Row = dict[str, str]
# Rows of one point or size: the name of a variant or operation → its row.
Rows = dict[str, Row]


@dataclass(frozen=True)
class Target:
    """A figure that must be reached.

    Attributes:
        device: device of the CSV.
        kind: name of the CSV without its device.
        where: column → value in the rows of its point.
        what: the figure, in words.
        value: function that computes the figure from the rows of its point.
        limit: upper limit, or lower limit with `at_least`.
        at_least: True if the figure must not fall below the limit.
    """

    device: str
    kind: str
    where: dict[str, str]
    what: str
    value: Callable[[Rows], float]
    limit: float
    at_least: bool = False


def over(name: str, *others: str) -> Callable[[Rows], float]:
    """Return a function that divides a variant's median time by the sum of others'."""
    return lambda rows: float(rows[name]["seconds"]) / sum(float(rows[other]["seconds"]) for other in others)


def more_memory(name: str, other: str) -> Callable[[Rows], float]:
    """Return a function that gives the GiB that a variant takes more at its peak than another."""
    return lambda rows: (peak_mib(rows[name]) - peak_mib(rows[other])) / 1024


def peak_mib(row: Row) -> float:
    """Return the memory held between steps plus the most that a step adds."""
    return float(row["held_mib"]) + float(row["step_mib"])


SMOLLM2 = {"model": "smollm2-135m-instruct", "tuning": "lora", "batch": "8", "length": "124"}
QWEN_7B = {"model": "qwen2.5-7b shape", "tuning": "lora"}
QWEN_05B = {"model": "qwen2.5-0.5b shape", "tuning": "lora", "batch": "4"}
FLOOR = ("stock", "reference forward")
HEAD, BARE = "head, CE + reverse KL", "three bare GEMMs"
HEAD_CPU, HEAD_7B = {"tokens": "1000", "vocab": "49152", "width": "576"}, {"width": "3584"}
MIXED, MIXED_KL = "interleave++", "interleave++,kl"
TARGETS = (
    Target("cpu", "steps", SMOLLM2, "`kl` step ÷ (stock step + reference forward)", over("kl", *FLOOR), 1.00),
    Target("cpu", "steps", SMOLLM2, "the paper's `kl` step ÷ `kl` step", over("paper kl", "kl"), 3, at_least=True),
    Target(
        "cpu", "steps", SMOLLM2, "`kl` step with a cached reference ÷ stock step", over("kl cached", "stock"), 1.05
    ),
    Target("cpu", "steps", SMOLLM2, "`ldifs` step ÷ (stock step + reference forward)", over("ldifs", *FLOOR), 1.10),
    Target(
        "cpu", "steps", SMOLLM2, "`kl,ldifs` step ÷ (stock step + reference forward)", over("kl+ldifs", *FLOOR), 1.12
    ),
    Target("cpu", "steps", SMOLLM2, "`treft` step ÷ stock step", over("treft", "stock"), 1.03),
    Target(
        "cpu",
        "mixed-kl",
        {},
        "`interleave++,kl` step ÷ `interleave++` step, 5 % mixed in",
        over(MIXED_KL, MIXED),
        1.05,
    ),
    Target(
        "cpu",
        "drift",
        {},
        "50 steps and a measurement of the drift ÷ 50 steps",
        over("50 steps and a measurement", "50 steps"),
        1.05,
    ),
    Target(
        "cpu",
        "evaluate",
        {"kind": "probes"},
        "probes of four models ÷ forward passes",
        over("probes", "forward passes"),
        1.15,
    ),
    Target(
        "cpu",
        "evaluate",
        {"kind": "sampling"},
        "tokens a second of the sampler ÷ those of `generate`",
        over("generate", "sampler"),
        0.95,
        at_least=True,
    ),
    Target(
        "cpu", "head", HEAD_CPU, "head with all its outputs ÷ its three bare matrix products", over(HEAD, BARE), 1.6
    ),
    Target(
        "cpu",
        "head",
        HEAD_CPU,
        "the head's peak memory ÷ its byte budget",
        lambda rows: float(rows[HEAD]["peak_mib"]) / float(rows[HEAD]["budget_mib"]),
        1.10,
    ),
    Target(
        "cuda", "steps", QWEN_7B, "Qwen2.5-7B shape, 8192 tokens: `kl` step ÷ stock step", over("kl", "stock"), 1.33
    ),
    Target("cuda", "steps", QWEN_7B, "the same: peak memory beyond stock, GiB", more_memory("kl", "stock"), 2),
    Target("cuda", "head", HEAD_7B, "the same: head ÷ its three bare matrix products", over(HEAD, BARE), 1.3),
    Target(
        "cuda", "steps", QWEN_05B, "Qwen2.5-0.5B shape, 8192 tokens: `kl` step ÷ stock step", over("kl", "stock"), 1.28
    ),
)


def pick(rows: Sequence[Row], where: dict[str, str]) -> Rows:
    """Return the rows with these values in these columns, by variant or operation."""
    found = [row for row in rows if all(row[key] == value for key, value in where.items())]
    return {row.get("variant") or row["operation"]: row for row in found}


def must_reach(results: Path) -> str:
    """Return the table of the figures that must be reached."""
    lines = ["| device | figure | must be | is | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        rows = pick(read_csv(results / f"{target.kind}-{target.device}.csv"), target.where)
        bound = f"{'≥' if target.at_least else '≤'} {target.limit:.2f}"
        if not rows:
            value, verdict = "–", GPU_ABSENT if target.device == "cuda" else "not measured"
        else:
            try:
                number = target.value(rows)
            except (KeyError, ValueError):  # the row of a variant that was left out says why
                why = "; ".join(sorted({row["note"] for row in rows.values() if row.get("note")}))
                value, verdict = "–", f"not measured ({why})" if why else "not measured"
            else:
                value = f"{number:.2f}"
                verdict = (
                    "reached"
                    if (number >= target.limit if target.at_least else number <= target.limit)
                    else "**not reached**"
                )
        device = {"cuda": "GPU", "cpu": "CPU"}[target.device]
        lines.append(f"| {device} | {target.what} | {bound} | {value} | {verdict} |")
    return "\n".join(lines)


def points(rows: Sequence[Row]) -> list[Rows]:
    """Return the rows of each point, in the order of the CSV."""
    columns = ("model", "layers", "tuning", "batch", "length")
    return [pick(rows, dict(key)) for key in dict.fromkeys(tuple((c, row[c]) for c in columns) for row in rows)]


def title(rows: Rows) -> str:
    row = next(iter(rows.values()))
    tuning = {"lora": "LoRA", "full": "full fine-tuning"}[row["tuning"]]
    return f"{row['model']}, {tuning}, {row['batch']} × {row['length']} tokens"


def measured_with(row: Row) -> str:
    packages = ", ".join(f"{name} {row[name]}" for name in ("torch", "trl", "transformers", "peft", "trl_emguard"))
    threads = f", {row['threads']} threads, malloc: {row['malloc']}" if row["device"] == "cpu" else ""
    return f"{row['processor']}{threads}; {row['date']}; {packages}; medians of {row['rounds']} rounds."


def steps_tables(rows: Sequence[Row]) -> str:
    parts = []
    for point in points(rows):
        stock = point["stock"]
        parts += [f"### {title(point)}", "", measured_with(stock), ""]
        parts.append(f"{stock['tokens']} tokens in a batch, {stock['labels']} of them carry labels.")
        parts += [
            "",
            "| | s a step (quartiles) | × stock | ratio (quartiles) | to | tokens/s | held, MiB | + in a step, MiB |",
        ]
        parts.append("|---|---|---|---|---|---|---|---|")
        for name, row in point.items():
            if not row["seconds"]:
                parts.append(f"| {name} | {row['note']} | | | | | | |")
                continue
            cells = [
                name,
                f"{float(row['seconds']):.3f} ({float(row['q1']):.3f}–{float(row['q3']):.3f})",
                f"{over(name, 'stock')(point):.2f}",
                f"{float(row['ratio']):.2f} ({float(row['ratio_q1']):.2f}–{float(row['ratio_q3']):.2f})",
                row["ratio_to"],
                f"{float(row['tokens_per_second']):.0f}",
                f"{float(row['held_mib']):.0f}",
                f"{float(row['step_mib']):.0f}",
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def head_tables(rows: Sequence[Row]) -> str:
    parts = []
    for size in dict.fromkeys((row["tokens"], row["vocab"], row["width"]) for row in rows):
        found = pick(rows, dict(zip(("tokens", "vocab", "width"), size, strict=True)))
        parts += [f"### {size[0]} tokens, vocabulary {size[1]}, width {size[2]}", "", measured_with(found[BARE]), ""]
        parts += ["| | s (quartiles) | ÷ bare products (quartiles) | peak, MiB |", "|---|---|---|---|"]
        for name, row in found.items():
            time = f"{float(row['seconds']):.3f} ({float(row['q1']):.3f}–{float(row['q3']):.3f})"
            ratio = f"{float(row['ratio']):.2f} ({float(row['ratio_q1']):.2f}–{float(row['ratio_q3']):.2f})"
            parts.append(f"| {name} | {time} | {ratio} | {float(row['peak_mib']):.0f} |")
        parts += ["", f"The head's byte budget is {found[BARE]['budget_mib']} MiB.", ""]
    return "\n".join(parts).rstrip()


def slopes(rows: Sequence[Row]) -> str:
    """Return the table of growth: the exponent between the last two values of each axis."""
    lines = ["| from … to | " + " | ".join(GROWTH_LINES) + " |", "|---|" + "---|" * len(GROWTH_LINES)]
    for axis, series in growth(rows).items():
        cells = []
        for name in GROWTH_LINES:
            (x0, y0), (x1, y1) = series[name][-2:]
            cells.append(f"{log(y1 / y0) / log(x1 / x0):.2f}")
        values = [str(x) for x, _ in series["stock"][-2:]]
        lines.append(f"| {axis} {' … '.join(values)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


GROWTH_LINES = ("stock", "kl", "paper kl")


def growth(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return axis → variant → (value, seconds), ascending, of points that differ from the middle there alone.

    The middle point has, on every axis, the value that most rows have.
    """
    axes = ("length", "batch", "layers")
    middle = {axis: max({row[axis] for row in rows}, key=[row[axis] for row in rows].count) for axis in axes}
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for axis in axes:
        others = {other: middle[other] for other in axes if other != axis}
        found = [row for row in rows if row["seconds"] and all(row[key] == value for key, value in others.items())]
        lines = {
            name: sorted((int(r[axis]), float(r["seconds"])) for r in found if r["variant"] == name)
            for name in GROWTH_LINES
        }
        if all(len(line) > 1 for line in lines.values()):
            series[axis] = lines
    return series


# ---- the page ----


def write_page(results: Path, docs: Path) -> None:
    """Fill in the tables between the markers of `docs/benchmarks.md`, and draw the pictures that have data."""
    parts = {"must reach": must_reach(results)}
    for device in ("cpu", "cuda"):
        absent = GPU_ABSENT[0].upper() + GPU_ABSENT[1:] + "." if device == "cuda" else "Not measured."
        for kind, table in (("steps", steps_tables), ("head", head_tables), ("scaling", slopes)):
            rows = read_csv(results / f"{kind}-{device}.csv")
            parts[f"{kind} {device}"] = table(rows) if rows else absent
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{page} has no {begin.strip()} … {end.strip()}")
        text = before + begin + part + end + after
    page.write_text(text, encoding="utf-8")
    if steps := read_csv(results / "steps-cpu.csv"):
        draw_ratios(steps, docs / "benchmarks.png")
    if scaling := read_csv(results / "scaling-cpu.csv"):
        draw_growth(scaling, docs / "benchmarks_scaling.png")


def draw_ratios(rows: Sequence[Row], path: Path) -> None:
    """Draw each variant's step over the stock step, a panel for each point."""
    plt = _pyplot()
    found = points(rows)
    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.6), constrained_layout=True, squeeze=False)
    for axis, point in zip(axes[0], found, strict=True):
        names = [name for name, row in point.items() if row["seconds"] and name != "reference forward"]
        values = [over(name, "stock")(point) for name in names]
        colors = ["#d1495b" if name in ("paper kl", "paper ldifs", "two kernels") else "#2e86ab" for name in names]
        bars = axis.barh(names, values, color=["#9aa0a6", *colors[1:]])
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the line goes behind a number
        axis.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3, bbox=white)
        floor = 1 + over("reference forward", "stock")(point)
        axis.axvline(
            floor, color="black", linewidth=0.8, linestyle="--", label=f"stock + reference forward: {floor:.2f}"
        )
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel("step time ÷ stock step")
        axis.set_title(title(point), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Draw seconds a step against length, batch and depth. Both axes are logarithmic, so a slope is an exponent."""
    from matplotlib.ticker import LogLocator

    plt = _pyplot()
    series = growth(rows)
    figure, axes = plt.subplots(
        1, len(series), figsize=(4.6 * len(series), 4.2), constrained_layout=True, squeeze=False, sharey=True
    )
    colors = dict(zip(GROWTH_LINES, ("#9aa0a6", "#2e86ab", "#d1495b"), strict=True))
    for axis, (name, lines) in zip(axes[0], series.items(), strict=True):
        for variant, line in lines.items():
            x, y = zip(*line, strict=True)
            axis.loglog(x, y, "o-", color=colors[variant], label=variant)
        axis.set_xticks(x, [str(value) for value in x])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel({"length": "tokens in a row", "batch": "rows in a batch", "layers": "blocks"}[name])
        axis.grid(which="both", linewidth=0.3)
    axes[0][0].set_ylabel("seconds a step")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    write_page(RESULTS, DOCS)
