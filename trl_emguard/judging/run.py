"""Judging of sampled answers: one call to the judge per answer and metric, a file of the judgements, and rates."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..data.conversation import Conversation
from ..evaluation.cues import PLAIN
from ..evaluation.results import Results, make_rows
from ..io.files import check_writable
from ..io.journal import Journal, record_key
from .judge import Judge
from .metrics import ANSWERS_AT, LEAST_SAMPLES, MISALIGNED, Thresholds, misaligned_at, outcomes, wilson
from .prompts import ALIGNED, fill, prompts_for
from .scores import READINGS, Judgement
from .served import JudgeError


Records = dict[str, dict[str, Any]]  # key → record of a journal (file of judgements)
JOURNAL, HEADER = "judgements.jsonl", {"judgements": "1"}
# Criteria (kinds of question sets) whose answers are judged. `benign` is left out: a benign task has right answers, so
# it needs no judge.
JUDGED = ("general", "in_domain")
# Characters per token, for the estimate of the cost; English text has about four.
TOKEN_CHARACTERS = 4
# Judging stops with an error if none of the first `ALL_UNSCORED` judgements of an evaluation has a score, or if an
# evaluation has fewer judgements, and none of them has a score.
ALL_UNSCORED = 20
# Endings of the names of rates. The result row of a rate also has a `count`: the number of answers that have the rated
# property, for example of being misaligned.
_RATES = ("_rate", "_rate_coherent", "_rate_off_format")


@dataclass(frozen=True)
class JudgeOptions:
    """Options of judging.

    Attributes:
        max_judge_calls: limit on the calls that a run may make for missing judgements; `None` for no limit.
        thresholds: limits on the scores.
    """

    max_judge_calls: int | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self):
        if self.max_judge_calls is not None and self.max_judge_calls < 0:
            raise ValueError(f"max_judge_calls={self.max_judge_calls} must be 0 or more.")


def prepare_judge(judge: Judge, output_dir: str | os.PathLike, models: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a judge that has the weights of an evaluated model, and find out how to read the judge's scores.

    Call this before any answer is sampled for the judge, so that a judge that cannot be used is refused early.

    Args:
        judge: the judge. The weights of a served judge are not accessible, so they are not compared.
        output_dir: folder of the judgements. The judge's reading (see [`Judge`]) is stored there as well.
        models: result of [`~trl_emguard.evaluation.run.describe`] for the models under test.

    Raises:
        ValueError: the judge's weights are those of one of the models.
        JudgeError: the judge does not answer, or its scores cannot be read.
    """
    check_writable("output_dir", output_dir)
    same = [name for name, about in models.items() if judge.weights and about["weights"] == judge.weights]
    if same:
        raise ValueError(
            f"--judge {judge.name!r} has the weights of {same[0]!r}, which it would judge: take a judge of another "
            "model family."
        )
    _reading(judge, *_open_journal(output_dir), is_asked=False)


class _Call(NamedTuple):
    """One request to the judge, on one answer and one metric.

    Attributes:
        key: key of the judgement in the journal.
        sample: index of the sampled answer in the results.
        metric: name of the metric.
        prompt: text for the judge.
    """

    key: str
    sample: int
    metric: str
    prompt: str


def judge_answers(
    results: Results,
    judge: Judge,
    output_dir: str | os.PathLike,
    options: JudgeOptions = JudgeOptions(),
    train_rows: Sequence[Conversation] = (),
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Results:
    """Judge sampled answers, and return the results with rates added, for example the rate of misaligned answers.

    Every judgement is written to `judgements.jsonl` as soon as it arrives. If an interrupted run is repeated, only
    missing judgements are asked for. The judge is calibrated again first, because another model may by then answer
    under the judge's name.

    Args:
        results: results with sampled answers, from [`~trl_emguard.evaluation.evaluate`] or
            [`~trl_emguard.evaluation.Results.load`]. Rates of an earlier judge are replaced.
        judge: the judge, from [`open_judge`].
        output_dir: folder for the judgements and the results.
        options: limit on the calls, and thresholds.
        train_rows: training rows. If any are given, the judge is also asked if answers have the format of these rows.
        say: function that gets each line of the report.
        progress: True shows a progress bar.

    Raises:
        ValueError: no sampled answers, a judge that is itself under test, a judge whose reading differs from that of
            earlier judgements, or more calls than `max_judge_calls`.
        JudgeError: the judge does not answer, or its scores cannot be read.
    """
    calls = plan_calls(results, judge, train_rows)
    prepare_judge(judge, output_dir, results.info["models"])
    journal, kept = _open_journal(output_dir)
    waiting = {call.key: call for call in calls if call.key not in kept}
    reading = _reading(judge, journal, kept, is_asked=bool(waiting))
    _check_cost(judge, reading, calls, waiting, options, say)
    _ask(judge, calls, journal, kept, progress)
    return add_rates(results, judge, reading, calls, kept, options.thresholds)


def plan_calls(results: Results, judge: Judge, train_rows: Sequence[Conversation] = ()) -> list[_Call]:
    """Return a call to the judge for each metric of each answer to a question that is not of a benign task.

    If a model gives equal answers to a question, their calls for a metric share a key, and only one of them is made.

    Raises:
        ValueError: there is no answer to judge.
    """
    calls = []
    for index, sample in enumerate(results.samples):
        if results.criteria[sample["set"]] not in JUDGED:
            continue
        own = results.info.get("judge_prompts", {}).get(sample["set"], {}).get(sample["question"], {})
        about = results.info["models"][sample["model"]]["fingerprint"]
        for metric, prompt in prompts_for(own, train_rows).items():
            text = fill(prompt, {"question": sample["asked"], "answer": sample["answer"]})
            parts = [about, sample["asked"], sample["answer"], judge.identity, metric, text]
            calls.append(_Call(record_key(*parts), index, metric, text))
    if not calls:
        raise ValueError(
            "there are no sampled answers to judge: give --samples_per_question 1 or more, and a set of --general or "
            "--in_domain."
        )
    return calls


def _open_journal(output_dir: str | os.PathLike) -> tuple[Journal, Records]:
    """Return a folder's journal (`judgements.jsonl`, begun if it is missing), and the journal's records by their keys.

    A record is a finished judgement, or the reading (see [`Judge`]) that a judge had when it was first used.
    """
    journal = Journal(Path(output_dir) / JOURNAL, HEADER)
    return journal, {record["key"]: record for record in journal.resume("judgements")}


def _reading(judge: Judge, journal: Journal, kept: Records, is_asked: bool) -> str:
    """Return the judge's reading: the method of reading its scores, as a key of `READINGS`.

    The reading is the one in the journal. If the journal has none, the judge's own reading (found by a calibration if
    it is still empty) is added to the journal and to `kept`. Before a judge is asked for judgements (`is_asked`), its
    own reading is compared with the stored one.

    Raises:
        ValueError: the judge's reading now differs from the stored one.
    """
    key = record_key("calibration", judge.identity)
    if is_asked or key not in kept:
        found = judge.reading or judge.calibrate()
        if key not in kept:
            kept[key] = {"key": key, "judge": judge.name, "reading": found}
            journal.append([kept[key]])
        elif found != kept[key]["reading"]:
            raise ValueError(
                f"judge {judge.name!r} is read by {found!r} now, and the judgements in {journal.path.parent} by "
                f"{kept[key]['reading']!r}: another model or server answers under this name. Name another output_dir; "
                "--rejudge takes sampled answers there."
            )
    return str(kept[key]["reading"])


def _check_cost(
    judge: Judge,
    reading: str,
    calls: Sequence[_Call],
    waiting: dict[str, _Call],
    options: JudgeOptions,
    say: Callable[[str], None],
) -> None:
    """Report the number of calls and tokens to come, and refuse more calls than `max_judge_calls`."""
    tokens = sum(len(call.prompt) for call in waiting.values()) // TOKEN_CHARACTERS
    done = len({call.key for call in calls}) - len(waiting)
    say(
        f"Judge {judge.name}: {len(waiting):,} calls with about {tokens:,} tokens to come, {done:,} judgements are "
        f"there already. It reads: {READINGS[reading]}."
    )
    if judge.weights is None:
        say("Its weights cannot be looked into: make sure that it is none of the models under test.")
    if options.max_judge_calls is not None and len(waiting) > options.max_judge_calls:
        raise ValueError(
            f"--max_judge_calls={options.max_judge_calls} is less than the {len(waiting)} calls to come: raise it, "
            "or give fewer questions (--limit), families (--cues none) or samples. Sampled answers are kept."
        )


def _ask(judge: Judge, calls: Sequence[_Call], journal: Journal, kept: Records, progress: bool) -> None:
    """Ask for each judgement that the journal lacks and write it there; stop if none of the first ones has a score."""
    of_key = {call.key: call for call in calls}
    known = [kept[key] for key in of_key if key in kept]
    waiting = [call for key, call in of_key.items() if key not in kept]
    least = min(ALL_UNSCORED, len(of_key))

    def check_scores() -> None:
        if len(known) >= least and all(record["score"] is None for record in known):
            raise JudgeError(
                f"judge {judge.name!r} gave no number in its first {len(known)} judgements, but "
                f"{known[-1]['said'][:60]!r}: take a judge that follows the request for a number alone. Delete its "
                f"lines in {journal.path.name} to ask it again."
            )

    check_scores()
    with tqdm(desc=f"judging by {judge.name}", total=len(waiting), disable=not progress) as bar:

        def keep(index: int, found: Judgement) -> None:
            call = waiting[index]
            known.append({"key": call.key, "judge": judge.name, "metric": call.metric, **found._asdict()})
            kept[call.key] = known[-1]
            journal.append(known[-1:])
            bar.update()
            check_scores()

        judge.ask([call.prompt for call in waiting], keep)


def add_rates(
    results: Results, judge: Judge, reading: str, calls: Sequence[_Call], kept: Records, thresholds: Thresholds
) -> Results:
    """Return the results with the rates of this judge, which replace the rates of an earlier judge."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for call in calls:
        found.setdefault(call.sample, {})[call.metric] = kept[call.key]
    samples = list(results.samples)
    values: dict[int, dict[str, float]] = {}
    for index, records in found.items():
        scores = {metric: record["score"] for metric, record in records.items()}
        values[index] = outcomes(scores, records[ALIGNED]["said"], thresholds)
        samples[index] = samples[index] | {"judged": scores, "judge_said": records[ALIGNED]["said"]}
    rows = [row for row in results.rows if row.judge is None]
    about: dict[str, Any] = {"judge": judge.name, "reading": reading, "thresholds": str(thresholds)}
    questions: list[dict[str, Any]] = []
    plain: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for (set, family), (ids, arrays) in _arrays(results, values).items():
        counts = {(m, name): int(np.nansum(one)) for m, of in arrays.items() for name, one in of.items()}
        made = make_rows(set, family, arrays, None if family == PLAIN else plain.get(set))
        if family == PLAIN:
            plain[set] = arrays
        # Only rows of rates have a `count`. Rows of mean scores, of Misalign@k and of differences in differences have
        # none. A difference in differences is a model's rate minus the base model's rate in this family of prompts,
        # minus the same difference in the family `PLAIN`, which asks the questions unchanged.
        rows += [
            replace(row, **about, count=counts[row.model, row.metric] if row.metric.endswith(_RATES) else None)
            for row in made
        ]
        questions += _single_questions(set, family, ids, arrays)
    counted = [kept[key] for key in {call.key: None for call in calls}]
    spent = {f"{name}_tokens": sum(record[f"{name}_tokens"] for record in counted) for name in ("input", "output")}
    info = {**about, "misaligned_below": thresholds.misaligned_below, "coherent_above": thresholds.coherent_above}
    info |= {"judgements": len(counted), **spent, "weights_compared": judge.weights is not None}
    return replace(
        results, rows=rows, samples=samples, info=results.info | {"judge": info, "judged_questions": questions}
    )


def _arrays(
    results: Results, values: dict[int, dict[str, float]]
) -> dict[tuple[str, str], tuple[list[str], dict[str, dict[str, np.ndarray]]]]:
    """Arrange the metric values of judged answers in arrays, by question set, family of prompts, model and metric.

    A family asks the questions as they are, with an added text (a cue), or reworded (see `evaluation/cues.py`).

    Returns:
        For each (set, family) the questions' ids, and the answers' metric values by model and metric. The values are
        `(Q, S)` for Q questions and S answers to each, or `(Q,)` for Misalign@k.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index in values:
        groups.setdefault((results.samples[index]["set"], results.samples[index]["family"]), []).append(index)
    found = {}
    for group, indices in groups.items():
        rows = [results.samples[index] for index in indices]
        # An array has a row for each question and a column for each sample number. All families of a set get the same
        # rows and columns, so that a question reworded or with a cue can be compared with the same question unchanged.
        of_set = [results.samples[index] for index in values if results.samples[index]["set"] == group[0]]
        ids = sorted({row["question"] for row in of_set})
        shape = (len(ids), 1 + max(row["sample"] for row in of_set))
        metrics = dict.fromkeys(metric for index in indices for metric in values[index])
        models = [name for name in results.models if any(row["model"] == name for row in rows)]
        arrays = {model: {metric: np.full(shape, math.nan) for metric in metrics} for model in models}
        place = {id: at for at, id in enumerate(ids)}
        for index, row in zip(indices, rows, strict=True):
            for metric, value in values[index].items():
                arrays[row["model"]][metric][place[row["question"]], row["sample"]] = value
        for of_model in arrays.values():
            at_k = {k: misaligned_at(of_model[MISALIGNED], k) for k in ANSWERS_AT if k <= shape[1]}
            of_model |= {f"misaligned@{k}": one for k, one in at_k.items()}
        found[group] = (ids, arrays)
    return found


def _single_questions(
    set: str, family: str, ids: Sequence[str], arrays: dict[str, dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Return each model's misaligned rate and Wilson interval per question with at least `LEAST_SAMPLES` answers."""
    found = []
    for model, metrics in arrays.items():
        for id, row in zip(ids, metrics[MISALIGNED], strict=True):
            n = int((~np.isnan(row)).sum())
            if n >= LEAST_SAMPLES:
                count = int(np.nansum(row))
                low, high = wilson(count, n)
                about = {"model": model, "set": set, "family": family, "question": id}
                found.append(about | {"misaligned": count, "n": n, "rate": count / n, "low": low, "high": high})
    return found
