"""The report of a comparison: a table of all runs and baselines, and a text that names the best of them.

The best are those that no other run dominates ([`dominates`]). A run dominates another if it is clearly better in
broad misalignment or narrow learning, and clearly worse in neither. The files are `report.json` and `report.csv`; the
page `report.html` is made in `page.py`.
"""

import csv
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from ..evaluation.candidates import BASE
from ..evaluation.cues import PLAIN
from ..evaluation.results import COLUMNS, ResultRow, Results, difference_text, is_apart
from ..evaluation.statistics import LEAST_QUESTIONS
from ..io.files import written_whole
from ..io.strict import parse_json
from ..io.terminal import printable
from .plan import BENIGN_TASK, UNDEFENDED
from .runs import Trained


RUN_COLUMNS = ("run", "defense", "coefficient", "seed", "step", "seconds_per_step", "peak_memory")
# BROAD has the metrics of broad misalignment, NARROW those of narrow learning. The first metric that was measured is
# used. The number 1 says that a higher value is better, -1 that a lower value is better. With several scoring rules
# there is a `trait_rate` for each rule. BROAD then uses the first rule, because users list the rule for the unwanted
# trait first. NARROW uses the last rule, because they list the rule for the trait that training should teach last.
BROAD = {"trait_rate": -1, "margin": 1}
NARROW = {"trait_rate": 1, "nll": -1}


class Figure(NamedTuple):
    """A metric's difference to the base model, with its interval. Signs are changed if lower values are better."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """One line of the report: all seeds of a run, or of a free baseline (made from undefended runs, not trained).

    Attributes:
        name: name of the run.
        trained: the trainings of the run, one for each seed.
        broad, narrow: the figures of broad misalignment and narrow learning, by which runs are compared. Each is a
            mean over the seeds, with an interval that covers the interval of every seed.
        benign: the run's trainings on the benign task, one for each seed; empty without that task.
        lacks_seeds: True for a free baseline that was not made from the undefended run of every seed. An example is a
            checkpoint, `step N`, if this run failed with one of the seeds.
    """

    name: str
    trained: list[Trained]
    broad: Figure | None
    narrow: Figure | None
    benign: list[Trained] = field(default_factory=list)
    lacks_seeds: bool = False

    @property
    def is_baseline(self) -> bool:
        """True for a free baseline, which needs no training of its own."""
        return self.trained[0].is_baseline

    @property
    def is_random(self) -> bool:
        """True for a run that steers along a random vector."""
        return self.trained[0].is_random

    @property
    def is_comparable(self) -> bool:
        """True if `broad` and `narrow` were measured, and no seed is missing, failed or has `is_defended` False."""
        is_whole = all(run.error is None and run.is_defended is not False for run in self.trained)
        return is_whole and not self.lacks_seeds and self.broad is not None and self.narrow is not None


@dataclass(frozen=True)
class Report:
    """Everything that a comparison found.

    Attributes:
        trained: all runs and baselines.
        results: the evaluation of the runs and baselines that have an adapter.
        entries: lines of the report, one for each name of a run or baseline.
        metrics: names of the metrics for broad misalignment and for narrow learning; `None` if none was measured.
        sets: names of the question sets that have these metrics.
    """

    trained: list[Trained]
    results: Results
    entries: list[Entry]
    metrics: tuple[str | None, str | None]
    sets: tuple[str | None, str | None]

    @property
    def sentence(self) -> str:
        """Text that names the best runs, those that no other run dominates ([`dominates`]), and the runs left out."""
        if None in self.metrics:
            return "Broad misalignment and narrow learning were not both measured, so no run can be preferred."
        compared = [entry for entry in self.entries if entry.is_comparable]
        left_out = [entry.name for entry in self.entries if not entry.is_comparable]
        names = "; ".join(left_out)
        reason = " Left out, since a seed failed, is missing, was not measured, or gave no evidence of its defense"
        reason += f": {names}."
        if not compared:
            return f"Every run is left out, so no run can be preferred.{reason}"
        if any(figure is None or math.isnan(figure.low) for e in compared for figure in (e.broad, e.narrow)):
            few = f"fewer than {LEAST_QUESTIONS} questions"
            text = f"Some figures have no interval, since they are of {few}, so no run can be preferred."
            return text + reason if left_out else text
        best = [entry for entry in compared if not any(dominates(other, entry) for other in compared)]
        # Names may contain commas, so semicolons separate them.
        names = "; ".join(entry.name for entry in best)
        text = (
            "Not dominated (no other run is clearly better in one of broad and narrow, and not clearly worse in the "
            f"other): {names}."
        )
        if all(len(entry.trained) == 1 for entry in compared):
            text += " Each was trained once: the intervals do not hold the variation from training to training."
        free = [entry.name for entry in best if entry.trained[0].defense == UNDEFENDED]
        if free:
            text += f" Some of them need no defense ({'; '.join(free)}): no run is shown to be better than these."
        random = [entry.name for entry in best if entry.is_random]
        if random:
            text += (
                f" Some of them steer along a random vector ({'; '.join(random)}): the persona vector is not shown to "
                "matter."
            )
        return text + reason if left_out else text


def make_report(trained: Sequence[Trained], results: Results, benign: Sequence[Trained] = ()) -> Report:
    """Return the report on the runs of a comparison and their evaluation.

    Args:
        trained: runs and baselines; the adapter of each was evaluated under its `key`.
        results: the evaluation.
        benign: the runs' trainings on the benign task, evaluated on the set `benign_task` under the same keys.
    """
    broad_set, broad = _measured(results, "general", BROAD, 0)
    narrow_set, narrow = _measured(results, "in_domain", NARROW, -1)
    by_name: dict[str, list[Trained]] = {}
    for run in trained:
        by_name.setdefault(run.name, []).append(run)
    entries = [
        Entry(
            name,
            runs,
            _figure(results, runs, broad_set, broad, BROAD),
            _figure(results, runs, narrow_set, narrow, NARROW),
            [run for run in benign if run.name == name],
            runs[0].is_baseline and len(runs) < len(by_name.get(UNDEFENDED, [])),
        )
        for name, runs in by_name.items()
    ]
    return Report(list(trained), results, entries, (broad, narrow), (broad_set, narrow_set))


def dominates(one: Entry, other: Entry) -> bool:
    """Return True if `one` is clearly better than `other` in `broad` or `narrow`, and clearly worse in neither.

    "Clearly" means that the intervals do not overlap.
    """
    if one.broad is None or one.narrow is None or other.broad is None or other.narrow is None:
        return False
    pairs = ((one.broad, other.broad), (one.narrow, other.narrow))
    return any(a.low > b.high for a, b in pairs) and not any(a.high < b.low for a, b in pairs)


def save(report: Report, folder: Path, info: dict[str, Any]) -> None:
    """Write `report.json` and `report.csv`."""
    rows = list(report_rows(report))
    benign = [vars(run) for entry in report.entries for run in entry.benign]
    of_task = {"benign_runs": benign} if benign else {}
    runs = [vars(run) for run in report.trained]
    content = {**info, "sentence": report.sentence, "runs": runs, **of_task, "rows": rows}
    with written_whole(folder / "report.json") as scratch:
        scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with written_whole(folder / "report.csv") as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*RUN_COLUMNS, *COLUMNS])
        writer.writeheader()
        writer.writerows(rows)


def report_rows(report: Report) -> list[dict[str, Any]]:
    """Return the evaluation's rows, each together with the columns of its run (`RUN_COLUMNS`)."""
    runs = {run.key: run for run in report.trained}
    benign = {run.key: run for entry in report.entries for run in entry.benign}
    found = []
    for row in report.results.rows:
        run = (benign if row.set == BENIGN_TASK else runs).get(row.model)
        of_run = {
            "run": BASE if run is None else run.name,
            **{name: None if run is None else getattr(run, name) for name in RUN_COLUMNS[1:]},
        }
        found.append(of_run | {name: _number(getattr(row, name)) for name in COLUMNS})
    return found


def make_table(report: Report) -> Table:
    """Return the report as a table for the console."""
    legend = "broad and narrow: differences to the base model, turned so that higher is better"
    table = Table(caption=f"{legend} (NLL too)" if report.metrics[1] == "nll" else legend)
    table.add_column("run", overflow="fold")
    has_task = any(entry.benign for entry in report.entries)
    headings = [f"broad ↑: {report.metrics[0]}", f"narrow ↑: {report.metrics[1]}", *(["benign"] if has_task else [])]
    for heading in (*headings, "s/step", "defended"):
        table.add_column(heading, justify="right")
    for entry in report.entries:
        errors = [run.error for run in entry.trained if run.error]
        if errors:
            table.add_row(printable(entry.name), printable(f"failed: {errors[0]}"[:60]))
            continue
        seconds = [run.seconds_per_step for run in entry.trained if run.seconds_per_step is not None]
        table.add_row(
            printable(entry.name),
            figure_text(entry.broad),
            figure_text(entry.narrow),
            *([exact_match_text(report, entry)] if has_task else []),
            f"{sum(seconds) / len(seconds):.2f}" if seconds else "–",
            defended_text(entry.trained),
        )
    return table


def exact_match_text(report: Report, entry: Entry) -> str:
    """Return as text each seed's share of right answers to the benign task (arithmetic); "–" if none was measured."""
    rows = [report.results.row(run.key, BENIGN_TASK, "exact_match") for run in entry.benign]
    return ", ".join(f"{row.value:.2f}" for row in rows if row is not None) or "–"


def drift_curves(report: Report, metric: str) -> dict[str, list[tuple[int, float]]]:
    """Return a drift metric's curve for each run that logged the metric: the run's `key` → (step, value) pairs.

    [`DriftCallback`] logs drift metrics, which say how far training has moved the model from the base model.
    """
    found = {}
    for run in report.trained:
        path = Path(run.folder or "") / "trainer_state.json"
        if run.folder is not None and path.is_file():
            # An adapter from elsewhere may have a file of this name with other content. Such a run gets no curve.
            with suppress(ValueError, KeyError, TypeError):
                history = parse_json(path.read_text(encoding="utf-8"))["log_history"]
                found[run.key] = [(entry["step"], entry[metric]) for entry in history if metric in entry]
    return {key: points for key, points in found.items() if points}


def is_task_learned(report: Report) -> bool:
    """Return False if the undefended runs did not learn the benign task, which then says nothing about defenses.

    It is True if one learned the task, or if none could be measured, for example because they failed.
    """
    runs = [run for entry in report.entries if entry.name == UNDEFENDED for run in entry.benign]
    rows = [report.results.row(run.key, BENIGN_TASK, "exact_match") for run in runs]
    found = [row for row in rows if row is not None]
    return not found or any(row.difference > 0 and is_apart(row) for row in found)


def defended_text(trained: Sequence[Trained]) -> str:
    """Return "no" if a run's `is_defended` is False, "yes" if one is True and none False, "–" if all are `None`."""
    states = {run.is_defended for run in trained}
    return "no" if False in states else "yes" if True in states else "–"


def figure_text(figure: Figure | None) -> str:
    return "–" if figure is None else difference_text(figure.value, figure.low, figure.high)


def _measured(
    results: Results, criterion: str, metrics: Iterable[str], choice: int
) -> tuple[str, str] | tuple[None, None]:
    """Return the question set and the full name of the first of `metrics` that was measured for a criterion.

    If several sets of the criterion have this metric, the first set is returned. Several scoring rules give a metric
    several full names, such as `trait_rate:NAME`. `choice` is the index of the name to return.
    """
    plain = [row for row in results.rows if row.model != BASE and row.family == PLAIN]
    sets = [set for set, own in results.criteria.items() if own == criterion]
    for metric, set in itertools.product(metrics, sets):
        found = list(dict.fromkeys(r.metric for r in plain if r.set == set and r.metric.split(":")[0] == metric))
        if found:
            return set, found[choice]
    return None, None


def _figure(
    results: Results, runs: Sequence[Trained], set: str | None, metric: str | None, signs: Mapping[str, int]
) -> Figure | None:
    if set is None or metric is None:
        return None
    rows = [results.row(run.key, set, metric) for run in runs]
    found: list[ResultRow] = [row for row in rows if row is not None]
    if not found:
        return None
    figures = [turned(row, signs) for row in found]
    # A seed without an interval leaves the figure without one: its ends are NaN, which `min` of numpy keeps.
    return Figure(
        sum(figure.value for figure in figures) / len(figures),
        float(np.min([figure.low for figure in figures])),
        float(np.max([figure.high for figure in figures])),
    )


def turned(row: ResultRow, signs: Mapping[str, int]) -> Figure:
    """Return a row's difference to the base model, with signs changed if lower values of its metric are better."""
    if signs[row.metric.split(":")[0]] > 0:
        return Figure(row.difference, row.difference_low, row.difference_high)
    return Figure(-row.difference, -row.difference_high, -row.difference_low)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
