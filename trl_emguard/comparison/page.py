"""Page of a comparison's report: one HTML file that opens without network or scripts, in light and dark colours."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from ..evaluation.candidates import BASE
from ..evaluation.cues import PLAIN
from ..evaluation.results import interval_text, sentence
from ..io.files import written_whole
from .plan import BENIGN_TASK, RANDOM
from .report import (
    BROAD,
    Entry,
    Figure,
    Report,
    defended_text,
    drift_curves,
    exact_match_text,
    figure_text,
    is_task_learned,
    turned,
)
from .runs import Trained


# Colour of a chart's text and axes, on a light and on a dark page.
THEMES = {"light": "#1b1b1b", "dark": "#e8e8e8"}
# Matplotlib markers of runs and of baselines. Each comes in ten colours, so 50 runs and 50 baselines look different.
MARKS, BASELINE_MARKS = "o^v<>", "sDPX*"
# Metrics of drift that runs may log while they train, each with the label of its axis in a chart. Drift is how far
# training has moved the model from the base model.
DRIFT = {
    "drift_kl": "KL to the base, nats a token",
    "drift_margin": "move of the margin (up is better)",
    "drift_persona": "move along the persona vector",
}
SAMPLES_PER_RUN = 3
# The page shows at most this number of characters of a sampled answer. The evaluation's file samples.jsonl has the
# whole answer.
SHOWN = 600


def write_page(report: Report, folder: Path, info: dict[str, Any]) -> Path:
    """Write `report.html`, and return its path.

    Args:
        report: the report.
        folder: folder of the page.
        info: entries of `report.json` about the evaluation, and about the comparison's `plan` if there is one.
    """
    environment = Environment(
        loader=PackageLoader("trl_emguard.comparison"),
        autoescape=select_autoescape(default=True, default_for_string=True),
    )
    page = environment.get_template("report.html.j2").render(
        info=info,
        plan=yaml.safe_dump(info["plan"], sort_keys=False, allow_unicode=True) if "plan" in info else "",
        sentence=report.sentence,
        metrics=report.metrics,
        entries=[_line(report, entry) for entry in report.entries],
        criteria=[sentence(report.results, run.key) for run in report.trained if run.adapter is not None],
        benign=[_benign_line(report, entry) for entry in report.entries if entry.benign],
        is_task_learned=is_task_learned(report),
        cues=_cues(report),
        charts=_charts(report),
        samples=_samples(report),
        notes=report.results.notes,
    )
    path = folder / "report.html"
    with written_whole(path) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return path


def _line(report: Report, entry: Entry) -> dict[str, Any]:
    errors = [run.error for run in entry.trained if run.error]
    seconds = [run.seconds_per_step for run in entry.trained if run.seconds_per_step is not None]
    memory = [run.peak_memory for run in entry.trained if run.peak_memory is not None]

    def shown(criterion: str, metric: str) -> list[str]:
        # `benign_task` is left out. Its results come from other adapters, trained on the benign task, but are stored
        # under the keys of the runs in `entry.trained`, so they would be shown as results of these runs.
        sets = [set for set, own in report.results.criteria.items() if own == criterion and set != BENIGN_TASK]
        return next(filter(None, (_shown(report, entry.trained, set, metric) for set in sets)), [])

    return {
        "name": entry.name,
        "baseline": entry.is_baseline or entry.is_random,
        "free": entry.is_baseline,
        "error": errors[0] if errors else None,
        "broad": figure_text(entry.broad),
        "narrow": figure_text(entry.narrow),
        "benign": shown("benign", "nll") or shown("general", "nll") or ["–"],
        "exact_match": exact_match_text(report, entry),
        "coherent": shown("general", "base_nll") or ["–"],
        "seconds": f"{sum(seconds) / len(seconds):.2f}" if seconds else "–",
        "memory": f"{max(memory) / 2**30:.1f}" if memory else "–",
        "defended": defended_text(entry.trained),
        "seeds": len(entry.trained),
    }


def _benign_line(report: Report, entry: Entry) -> dict[str, Any]:
    errors = [run.error for run in entry.benign if run.error]
    metrics = ("exact_match", "ordinary_answer", "nll")
    return {
        "name": entry.name,
        "error": errors[0] if errors else None,
        "figures": [_shown(report, entry.benign, BENIGN_TASK, metric) or ["–"] for metric in metrics],
        "defended": defended_text(entry.benign),
    }


def _shown(report: Report, runs: Sequence[Trained], set: str, metric: str) -> list[str]:
    """Return a metric's differences to the base model as texts, one for each run on which it was measured."""
    rows = [report.results.row(run.key, set, metric) for run in runs]
    return [interval_text(row) for row in rows if row is not None]


def _cues(report: Report) -> dict[str, Any]:
    """Return a table of broad misalignment by run and family of prompts; {} for fewer than two families.

    A family is one way to ask the general questions: as they are, with a cue, or in other words. The table has the
    keys `families` (the families' names) and `lines` (run → family → difference to the base model as text, with the
    sign that makes higher better).
    """
    wanted = (report.sets[0], report.metrics[0])
    rows = [row for row in report.results.rows if (row.set, row.metric) == wanted and row.model != BASE]
    families = list(dict.fromkeys(row.family for row in rows))
    if len(families) < 2:
        return {}
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row.model, {})[row.family] = figure_text(turned(row, BROAD))
    return {"families": families, "lines": lines}


def _samples(report: Report) -> list[dict[str, Any]]:
    shown: dict[str, int] = {}
    found = []
    for sample in report.results.samples:
        # Answers to `benign_task` are left out, because they are of another adapter, which was trained on that task.
        is_own = sample["set"] != BENIGN_TASK
        if is_own and sample["family"] == PLAIN and shown.setdefault(sample["model"], 0) < SAMPLES_PER_RUN:
            shown[sample["model"]] += 1
            scores = {k: v for k, v in sample.items() if isinstance(v, float) and math.isfinite(v)}
            answer = sample["answer"]
            found.append(
                {
                    "model": sample["model"],
                    "question": sample["question"],
                    "answer": answer[:SHOWN] + (" …" if len(answer) > SHOWN else ""),
                    "scores": ", ".join(f"{name} {value:.2f}" for name, value in scores.items()),
                }
            )
    return found


def _charts(report: Report) -> list[dict[str, Any]]:
    compared = [entry for entry in report.entries if entry.is_comparable]
    charts = []
    if compared:
        title = f"Narrow learning ({report.metrics[1]}) against broad misalignment ({report.metrics[0]})"
        charts.append({"title": title, "svg": {theme: _pareto(compared, theme) for theme in THEMES}})
    sweeps = _sweeps(compared)
    if sweeps:
        charts.append({"title": "By coefficient", "svg": {theme: _curves(sweeps, theme) for theme in THEMES}})
    for metric, text in DRIFT.items():
        curves = drift_curves(report, metric)
        if curves:
            svg = {theme: _steps(curves, text, theme) for theme in THEMES}
            charts.append({"title": f"Drift while training ({metric})", "svg": svg})
    return charts


def _sweeps(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the sweeps over a coefficient: name → entries, sorted by coefficient.

    A sweep has at least two entries whose names differ in the value of one `…_coef` alone, a number. A schedule is no
    number. Entries with names of the user's own are a sweep if they have the same defense. The baselines `alpha X` are
    a sweep too, and so are the runs with a random vector.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        run = entry.trained[0]
        if isinstance(run.coefficient, float):
            name = re.sub(r"(_coef)=\S+", r"\1", run.name)
            if name == run.name:
                name = "alpha" if run.is_baseline else run.defense + (RANDOM if run.is_random else "")
            found.setdefault(name, []).append(entry)
    return {
        name: sorted(group, key=lambda entry: entry.trained[0].coefficient or 0.0)
        for name, group in found.items()
        if len(group) > 1
    }


def _pareto(entries: Sequence[Entry], theme: str) -> Markup:
    figure, axis = _figure(theme)
    for index, entry in enumerate(entries):
        broad, narrow = entry.broad, entry.narrow
        assert broad is not None  # `_charts` passes only comparable entries, which have both figures
        assert narrow is not None
        axis.errorbar(
            broad.value,
            narrow.value,
            xerr=whiskers(broad),
            yerr=whiskers(narrow),
            fmt=(BASELINE_MARKS if entry.is_baseline or entry.is_random else MARKS)[index // 10 % len(MARKS)],
            color=f"C{index % 10}",
            capsize=2,
            label=_label(entry.name),
        )
    axis.set(
        xlabel="broad, difference to the base (right is better)",
        ylabel="narrow, difference to the base (up is better)",
    )
    _add_legend(axis, theme, is_beside=True)
    return _svg(figure)


def whiskers(figure: Figure) -> list[list[float]]:
    """Return how far the interval reaches below and above the value, `(2, 1)`; NaN without an interval.

    Where rounding put the value outside of the interval, the reach is 0.
    """
    # `max` keeps a NaN that comes first, and matplotlib draws no whisker for it.
    return [[max(figure.value - figure.low, 0.0)], [max(figure.high - figure.value, 0.0)]]


def _curves(sweeps: dict[str, list[Entry]], theme: str) -> Markup:
    figure, axis = _figure(theme)
    for index, (name, entries) in enumerate(sweeps.items()):
        x = [entry.trained[0].coefficient for entry in entries]
        for attribute, style in (("broad", "-o"), ("narrow", "--s")):
            values = [getattr(entry, attribute).value for entry in entries]
            axis.plot(x, values, style, color=f"C{index % 10}", label=_label(f"{name}, {attribute}"))
    axis.set(xlabel="coefficient", ylabel="difference to the base (up is better)", xscale="log")
    # A logarithmic axis cannot show 0, so 0 gets no tick.
    ticks = {float(entry.trained[0].coefficient or 0) for entries in sweeps.values() for entry in entries} - {0.0}
    axis.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axis.minorticks_off()
    _add_legend(axis, theme)
    return _svg(figure)


def _steps(curves: dict[str, list[tuple[int, float]]], text: str, theme: str) -> Markup:
    figure, axis = _figure(theme)
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), "-o", markersize=3, label=_label(name))
    axis.set(xlabel="step", ylabel=text)
    _add_legend(axis, theme, is_beside=True)
    return _svg(figure)


def _add_legend(axis: Any, theme: str, is_beside: bool = False) -> None:
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if is_beside else {}
    legend = axis.legend(fontsize=8, frameon=False, **place)
    for text in legend.get_texts():
        text.set_color(THEMES[theme])


def _label(name: str) -> str:
    """Return a name with `$` escaped, because matplotlib would read text between two `$` as a formula."""
    return name.replace("$", r"\$")


def _figure(theme: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    color = THEMES[theme]
    axis.tick_params(colors=color)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(color)
    for name, spine in axis.spines.items():
        spine.set_color(color)
        spine.set_visible(name in ("left", "bottom"))
    return figure, axis


def _svg(figure: Any) -> Markup:
    """Return a chart as SVG text to put into a page."""
    import matplotlib
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    # A fixed salt makes the ids inside the SVG the same every time, so equal charts give equal files.
    settings: Any = {"svg.hashsalt": "trl_emguard", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A character that matplotlib's font lacks becomes a box in the chart. The page's table shows it. matplotlib
        # would warn several times for each.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font", UserWarning)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
