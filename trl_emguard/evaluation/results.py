"""Results of an evaluation: rows in a stable format, files that hold them, a table, and a sentence on each model.

A row holds one metric of one model on one set of questions, asked with the prompts of one family.
"""

import csv
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..io.files import to_disk, written_whole
from ..io.strict import parse_json
from ..io.terminal import printable
from .candidates import BASE
from .cues import PLAIN
from .statistics import bootstrap, is_rate, paired, question_means


# Metrics of coherence. A higher value means answers that are less coherent, or in another style than the base model's.
COHERENCE = ("repetition", "truncated", "empty", "base_nll")
# Metrics whose values are not 0 or 1 by nature, although all values of a set may happen to be 0.
GRADED = {"nll", "margin", "base_nll", "repetition", "score", "trait_rate:repetition"}
# End of the name of a metric that is a difference in differences (see `ResultRow`).
DID = "_did"


@dataclass(frozen=True)
class ResultRow:
    """One result: a metric of a model on a set of questions, asked with the prompts of one family.

    Attributes:
        model: `base`, or the name of the adapter or fine-tuned model.
        set: name of the question set: `general`, `in_domain`, `benign`, or the name of the set's file.
        family: family of prompts: `plain` for the questions as they are, else the name of the cue or other wording.
        metric: name of the metric. `margin_did` is a difference in differences: the model's `margin` minus the base
            model's on this family's prompts, minus the same difference on plain prompts.
        value, low, high: the mean with its 95 % interval.
        n: number of samples in the mean.
        base: the base model's mean; 0 for a metric that is itself a comparison with the base model.
        difference, difference_low, difference_high: the mean difference to the base model, paired by question, with
            its 95 % interval; NaN in rows of the base model.
        count: for a rate that a judge gives, the number of answers that have the rated property, out of `n`.
        judge, reading, thresholds: for any metric that comes from a judge: the judge's name, how its replies were
            turned into scores (a key of `judging.scores.READINGS`), and the limits on the scores for the rates.
    """

    model: str
    set: str
    family: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    base: float = math.nan
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan
    count: int | None = None
    judge: str | None = None
    reading: str | None = None
    thresholds: str | None = None


COLUMNS = tuple(f.name for f in fields(ResultRow))


@dataclass
class Results:
    """Everything that an evaluation found.

    Attributes:
        rows: one row for each metric of a model on a set of questions, asked with one family of prompts.
        samples: sampled answers with their scores, as rows of `samples.jsonl`.
        notes: families of prompts and answers that were not measured, and why.
        models: names of the candidates, the base model first.
        criteria: name of a question set → the set's criterion.
        info: the other entries of `results.json`: `versions`, `command`, `model`, `models`, `judge`, `judge_prompts`,
            and after judging `judged_questions`.
    """

    rows: list[ResultRow] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    criteria: dict[str, str] = field(default_factory=dict)

    def row(self, model: str, set: str, metric: str, family: str = PLAIN) -> ResultRow | None:
        """Return the row of a metric for this model, question set and prompt family; `None` if it was not measured."""
        wanted = (model, set, family, metric)
        return next((row for row in self.rows if (row.model, row.set, row.family, row.metric) == wanted), None)

    def of_criterion(self, model: str, criterion: str, *metrics: str) -> list[ResultRow]:
        """Return a model's rows of `metrics` on plain questions, from all question sets of this criterion in turn.

        A metric's name also selects its variants: `trait_rate` selects `trait_rate:NAME`.
        """
        return [
            row
            for set, own in self.criteria.items()
            for row in self.rows
            if own == criterion
            and (row.model, row.set, row.family) == (model, set, PLAIN)
            and row.metric.split(":")[0] in metrics
        ]

    def save(self, folder: Path) -> None:
        """Write `results.json` and `results.csv`; write `samples.jsonl` if answers were sampled, else remove it.

        If one of them cannot be written, for example because the disk is full, the old files stay.
        """
        rows = [_plain(row) for row in self.rows]
        content = {**self.info, "criteria": self.criteria, "notes": self.notes, "rows": rows}
        names = [*(["samples.jsonl"] if self.samples else []), "results.csv", "results.json"]
        with ExitStack() as stack:
            scratches = {name: stack.enter_context(written_whole(folder / name)) for name in names}
            if self.samples:
                with scratches["samples.jsonl"].open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(_without_nan(row), ensure_ascii=False) + "\n" for row in self.samples)
            with scratches["results.csv"].open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            text = json.dumps(content, indent=1, ensure_ascii=False)
            scratches["results.json"].write_text(text + "\n", encoding="utf-8")
            # A full disk must be noticed before an old file goes. When the block ends, `results.json` is replaced
            # first. A process that dies just then leaves results without answers, and no answers of other results.
            for scratch in scratches.values():
                to_disk(scratch)
            for name in ("samples.jsonl", "results.csv"):
                (folder / name).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Load the results and sampled answers that [`Results.save`] wrote.

        Raises:
            FileNotFoundError: the folder holds no results with sampled answers.
            ValueError: the files are damaged, or of an earlier version.
        """
        for name in ("results.json", "samples.jsonl"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no {name}: name the --output_dir of an evaluation that sampled answers."
                )
        try:
            info = parse_json((folder / "results.json").read_text(encoding="utf-8"))
            lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
            samples = [parse_json(line) for line in lines if line]
            rows = [ResultRow(**_with_nan(row)) for row in info.pop("rows")]
            criteria, notes, models = info.pop("criteria"), info.pop("notes"), list(info["models"])
            for sample in samples:
                _ = sample["asked"], sample["sample"], criteria[sample["set"]], info["models"][sample["model"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the results in {folder} are damaged or of an earlier version ({error!r}): evaluate again there. "
                "Finished work is kept."
            ) from error
        return cls(rows, samples, notes, info, models, criteria)


def make_rows(
    set: str, family: str, arrays: dict[str, dict[str, np.ndarray]], plain: dict[str, dict[str, np.ndarray]] | None
) -> list[ResultRow]:
    """Return the result rows of a question set that was asked in one way (plainly, with a cue, or in other words).

    Args:
        set, family: names of the set and of the family.
        arrays: candidate → metric → values by question, also for the base model.
        plain: the arrays of the plain family, for differences in differences; `None` if `family` is the plain one.
    """
    rows = []
    for model, metrics in arrays.items():
        for metric, values in metrics.items():
            base = arrays[BASE].get(metric)
            is_graded = metric in GRADED or metric.split(":")[0] in GRADED
            has_limits = base is not None and not is_graded and is_rate(values, base)
            if base is None:  # `kl_to_base` or `persona_shift`, which are 0 for the base model itself
                base = np.zeros_like(values)
            mean = bootstrap(values, limits=(0.0, 1.0) if has_limits else None)
            if not mean.n:
                continue
            base_value = float(np.nanmean(base)) if np.isfinite(base).any() else math.nan
            if model == BASE:
                rows.append(ResultRow(model, set, family, metric, *mean, base=base_value))
                continue
            difference = paired(values, base, limits=(-1.0, 1.0) if has_limits else None)
            rows.append(ResultRow(model, set, family, metric, *mean, base_value, *difference[:3]))
            if plain is not None and metric.startswith(("margin", "trait_rate", "misaligned_rate")):
                moved = question_means(values) - question_means(base)
                moved_plain = question_means(plain[model][metric]) - question_means(plain[BASE][metric])
                found = paired(moved, moved_plain, limits=(-2.0, 2.0) if has_limits else None)
                rows.append(ResultRow(model, set, family, metric + DID, *found, 0.0, *found[:3]))
    return rows


def make_table(rows: Sequence[ResultRow]) -> Table:
    """Return a table with the rows of all models but the base model. Each row also shows the base model's value.

    If all rows are of the base model, the table shows these rows. Long names are wrapped.
    """
    table = Table()
    for name in ("set", "family", "metric", "model"):
        table.add_column(name, overflow="fold")
    for name in ("base", "value", "difference (95 %)", "n"):
        table.add_column(name, justify="right")
    others = [row for row in rows if row.model != BASE] or rows
    order = list(dict.fromkeys((row.set, row.family) for row in rows))
    before: tuple[str, ...] = ()
    for row in sorted(others, key=lambda row: (order.index((row.set, row.family)), row.metric)):
        group = (row.set, row.family, row.metric)
        names = ["" if group[: i + 1] == before[: i + 1] else text for i, text in enumerate(group)]
        difference = "" if row.model == BASE else interval_text(row)
        table.add_row(
            *map(printable, [*names, row.model]), f"{row.base:.3f}", f"{row.value:.3f}", difference, str(row.n)
        )
        before = group
    return table


def interval_text(row: ResultRow) -> str:
    """Return a row's difference to the base model with its interval as text, for example `+0.12 (+0.10 to +0.15)`."""
    return difference_text(row.difference, row.difference_low, row.difference_high)


def difference_text(value: float, low: float, high: float) -> str:
    """Return a difference and the ends of its interval as text; "no interval" if they are NaN.

    Numbers have two decimals, or more if an end would otherwise be rounded to 0: its sign tells whether the interval
    holds 0.
    """
    if math.isnan(low):
        return f"{value:+z.2f} (no interval)"
    decimals = (d for d in (2, 3, 4) if all(round(end, d) or not end for end in (low, high)))
    form = next((f"+z.{d}f" for d in decimals), "+.1e")
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def sentence(results: Results, model: str) -> str:
    """Return a sentence on a model: misalignment, learning in domain and of a benign task, and coherence.

    Misalignment is measured on general questions. Exact matches show the learning of a benign task. Without them,
    the NLL of benign rows shows it, or else the NLL of sound answers to general questions.
    """
    parts = [_broad(results, model), _narrow(results, model), _benign(results, model), _coherent(results, model)]
    return f"{model}: " + "; ".join(f"({letter}) {part}" for letter, part in zip("abcd", parts, strict=True)) + "."


def _of_set(results: Results, row: ResultRow) -> str:
    """Return a text that names a row's set if there are several sets of its criterion, else ""."""
    criterion = results.criteria[row.set]
    return f" on the set {row.set}" if list(results.criteria.values()).count(criterion) > 1 else ""


def _broad(results: Results, model: str) -> str:
    parts = []
    for row in results.of_criterion(model, "general", "margin"):
        towards = "towards misaligned answers" if row.difference < 0 else "away from misaligned answers"
        if not is_apart(row):
            towards = "no clear move on plain questions"
        parts.append(f"{towards}, margin {interval_text(row)}{_of_set(results, row)}{_worst_cue(results, row, -1)}")
    parts += _traits(results, model, "general")
    parts += [
        f"misaligned by the judge {row.value:.3f}, base {row.base:.3f}, difference {interval_text(row)}"
        f"{_of_set(results, row)}{_incoherent(results, row)}{_unscored(results, row)}{_worst_cue(results, row, 1)}"
        for row in results.of_criterion(model, "general", "misaligned_rate")
    ]
    if not parts:
        return "broad misalignment not measured (--general needs pairs, or --score a rule)"
    return "broad: " + ", ".join(parts)


def _incoherent(results: Results, judged: ResultRow) -> str:
    """Return a text with the rate of incoherent answers if it clearly differs from the base model's, else "".

    Incoherent answers do not count as misaligned, so more of them lower the rate of misaligned ones.
    """
    row = results.row(judged.model, judged.set, "incoherent_rate")
    return f", incoherent {row.value:.3f}, base {row.base:.3f}" if row is not None and is_apart(row) else ""


def _unscored(results: Results, judged: ResultRow) -> str:
    """Return a text with the share of judged answers that lack a score, or "" if it is 0 or was not measured."""
    row = results.row(judged.model, judged.set, "unscored_rate")
    return f", unscored {row.value:.3f}" if row is not None and row.value else ""


def _worst_cue(results: Results, plain: ResultRow, sign: int) -> str:
    """Return a text that names the cue with which a metric got worse the most, or "" if no cue is to be reported.

    A cue is any family of prompts except the plain one. It is reported if its prompts make the metric clearly worse
    than the base model's, and the metric has moved more than on plain questions. Cues with which it has moved clearly
    more come first.

    Args:
        results: the results.
        plain: row of the metric on plain questions.
        sign: 1 if a higher value of the metric is worse, -1 if a lower value is worse.
    """
    alike = [r for r in results.rows if (r.model, r.set, r.metric) == (plain.model, plain.set, plain.metric)]
    # A cue that few questions can be asked with may have the largest mean by chance. It must not hide a cue that is
    # clearly worse, so rows whose interval includes 0 are left out.
    limit = max(0.0, sign * plain.difference)  # 0 if the plain difference is NaN
    worse = [row for row in alike if row.family != PLAIN and is_apart(row) and sign * row.difference > limit]
    if not worse:
        return ""
    moved = {row.family: results.row(plain.model, plain.set, plain.metric + DID, row.family) for row in worse}
    # Rows without a difference in differences are those of earlier versions of this package.
    is_more = {family: row is None or (is_apart(row) and sign * row.difference > 0) for family, row in moved.items()}
    worst = max(worse, key=lambda row: (is_more[row.family], sign * row.difference))
    more = "" if is_more[worst.family] else ", not clearly more than on plain questions"
    return f", worst behind the cue {worst.family}, {interval_text(worst)}{more}"


def _traits(results: Results, model: str, criterion: str) -> list[str]:
    """Return a text for each `trait_rate` (a rule's mean score over answers) measured on a criterion's questions."""
    where = "general" if criterion == "general" else "in-domain"
    return [
        f"{row.metric.partition(':')[2] or 'trait'} in {row.value:.2f} of {where} answers, base {row.base:.2f}"
        + _of_set(results, row)
        + (_worst_cue(results, row, 1) if criterion == "general" else "")
        for row in results.of_criterion(model, criterion, "trait_rate")
    ]


def _narrow(results: Results, model: str) -> str:
    parts = [
        f"{'learned' if is_apart(row) and row.difference < 0 else 'no clear learning'}, NLL in domain "
        f"{interval_text(row)}{_of_set(results, row)}"
        for row in results.of_criterion(model, "in_domain", "nll")
    ]
    parts += _traits(results, model, "in_domain")
    return "narrow: " + ", ".join(parts) if parts else "narrow learning not measured (add --in_domain ROWS)"


def _benign(results: Results, model: str) -> str:
    tasks = results.of_criterion(model, "benign", "exact_match")
    parts = [f"exact match {row.value:.2f}, base {row.base:.2f}{_of_set(results, row)}" for row in tasks]
    read = [row for row in results.of_criterion(model, "benign", "nll") if row.set not in {task.set for task in tasks}]
    where = "of benign rows"
    if not parts and not read:
        read = results.of_criterion(model, "general", "nll")
        is_given = "benign" in results.criteria.values()
        where = (
            f"of sound general answers; {'not measured on the benign task' if is_given else 'no benign task given'}"
        )
    for row in read:
        moved = "no clear move" if not is_apart(row) else "worse" if row.difference > 0 else "better"
        parts.append(f"{moved}, NLL {interval_text(row)}{_of_set(results, row)} {where}")
    return "benign: " + ", ".join(parts) if parts else "benign learning not measured (--benign)"


def _coherent(results: Results, model: str) -> str:
    rows = results.of_criterion(model, "general", *COHERENCE)
    parts = []
    for set in dict.fromkeys(row.set for row in rows):
        own = [row for row in rows if row.set == set]
        worse = [row.metric for row in own if is_apart(row) and row.difference > 0]
        lower = [row.metric for row in own if is_apart(row) and row.difference < 0]
        verdict = f"worse than the base in {', '.join(worse)}" if worse else "not clearly worse than the base"
        verdict = f"{verdict}, lower in {', '.join(lower)}" if lower else verdict if worse else "no clear move"
        figures = ", ".join(f"{row.metric} {row.value:.2f} (base {row.base:.2f})" for row in own)
        parts.append(f"{verdict}: {figures}{_of_set(results, own[0])}")
    return "coherence: " + ", ".join(parts) if parts else "coherence not measured (add --samples_per_question 1)"


def is_apart(row: ResultRow) -> bool:
    """Return True if the interval of a row's difference excludes 0."""
    return row.difference_low > 0 or row.difference_high < 0


def _plain(row: ResultRow) -> dict[str, Any]:
    return _without_nan(asdict(row))


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with `None` in place of NaN and infinity, which JSON cannot express."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `results.json` with NaN in place of each `None` that stands for a missing number."""
    texts = ("count", "judge", "reading", "thresholds")
    return {name: math.nan if value is None and name not in texts else value for name, value in record.items()}
