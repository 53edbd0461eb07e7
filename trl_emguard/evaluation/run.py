"""Evaluation of a base model, and of models fine-tuned from it, on sets of questions.

Known answers, which come with the questions, are measured by their likelihood. Sampled answers are scored.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..compat import versions
from ..data.conversation import Conversation
from ..io.files import check_writable
from ..io.journal import Journal, record_key
from ..models.adapters import bare_model
from ..models.chat import end_tokens, prompt_problem
from ..models.identity import weights_digest
from ..models.sampler import SampledAnswer, split_thoughts
from ..models.shipped import public_name
from ..persona.shift import check_layer
from ..persona.vectors import PersonaVector
from . import answers as sampled
from .candidates import Candidate, check_candidates, in_eval_mode
from .cues import Family, check_cues, families
from .probes import Row, encode_rows, margin, probe, projections, prompt_ids
from .questions import QuestionSet
from .results import Results, make_rows
from .rules import Rule


# Default number of answers that are sampled at once.
SAMPLED_ON_CPU, SAMPLED_ON_GPU = 32, 64
# Limit on an answer's tokens in a set with right answers (`permuted_operators`). Right answers are short numbers.
TASK_TOKENS = 16
PROGRESS_FILE = "progress.jsonl"

Arrays = dict[str, dict[str, np.ndarray]]  # candidate's name → metric → `(questions,)` or `(questions, answers)`


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        cues: families of prompts in which general questions are asked: "auto", "none" or "all" ([`families`]).
        inoculation_prompt: system prompt that training used for inoculation. If it is given, general questions are
            also asked with this prompt, and with its negation, as system prompt.
        rules: name → rule that scores sampled answers.
        persona_vector: persona vector of the base model, to measure the shift of the states along this vector.
        samples_per_question: number of answers to sample for each question in each family of prompts; 0 samples none.
            A task with right answers always takes one greedy answer instead.
        max_new_tokens: limit on the tokens of a sampled answer.
        temperature: temperature of the sampling; 0 takes the most probable token each time.
        seed: seed of the sampling.
        batch_tokens: limit on the tokens of a forward pass that measures the likelihood of answers, padding included;
            by default 8192 on a GPU, 1024 on a CPU.
        batch_size: number of answers that are sampled at once; by default 64 on a GPU, 32 on a CPU.
    """

    cues: str = "auto"
    inoculation_prompt: str | None = None
    rules: dict[str, Rule] = field(default_factory=dict)
    persona_vector: PersonaVector | None = None
    samples_per_question: int = 0
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    batch_tokens: int | None = None
    batch_size: int | None = None

    def __post_init__(self):
        check_cues(self.cues, self.inoculation_prompt)
        lowest_values = {"samples_per_question": 0, "max_new_tokens": 1, "batch_tokens": 1, "batch_size": 1}
        for name, lowest in lowest_values.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}={value} must be {lowest} or more.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more.")
        if self.rules and not self.samples_per_question:
            raise ValueError("rules score sampled answers, and samples_per_question=0 samples none: set it to 1.")
        if self.persona_vector is not None:
            check_layer(self.persona_vector, None)


def evaluate(
    candidates: Sequence[Candidate],
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[QuestionSet],
    options: EvaluationOptions = EvaluationOptions(),
    train_rows: Sequence[Conversation] = (),
    output_dir: str | os.PathLike | None = None,
    progress: bool = False,
    command: str | None = None,
) -> Results:
    """Measure a base model and models tuned from it: misalignment, coherence, in-domain and benign-task learning.

    ```python
    >>> candidates = from_adapters(peft_model, ["default"])
    >>> results = evaluate(candidates, tokenizer, [load_questions("values", "general")])
    >>> results.row("default", "general", "margin").difference
    ```

    Args:
        candidates: the models to evaluate, the base model first ([`from_adapters`], [`load_candidates`]).
        tokenizer: the candidates' tokenizer, with a chat template.
        sets: sets of questions, no two with the same name.
        options: options of the evaluation.
        train_rows: rows that the candidates were trained on, to derive cues from.
        output_dir: folder for `results.json`, `results.csv` and `samples.jsonl`; by default no file is written.
            Finished work is kept in this folder, so that the same call resumes after an interruption.
        progress: True shows progress bars.
        command: command line to record in `results.json`.

    Raises:
        ValueError: two candidates or two sets have the same name, a candidate's weights change nothing, a set cannot
            be measured, or the persona vector belongs to another model.
        OSError: `output_dir` cannot be written to.
    """
    _check_names("candidates", [candidate.name for candidate in candidates])
    if output_dir is not None:
        check_writable("output_dir", output_dir)
    base = bare_model(candidates[0].model)
    if options.persona_vector is not None:
        options.persona_vector.check_model(base)
    check_sets(sets, tokenizer, options)
    run = _Run(candidates, tokenizer, options, _Kept(output_dir), progress)
    results = Results(
        info=_info(command, public_name(base.config._name_or_path), candidates, sets),
        models=[candidate.name for candidate in candidates],
        criteria={questions.name: questions.criterion for questions in sets},
    )
    cues = {"mode": options.cues, "train_rows": train_rows, "inoculation_prompt": options.inoculation_prompt}
    with in_eval_mode(candidates):
        check_candidates(candidates, tokenizer)
        for questions in sets:
            of_set: Any = cues if questions.criterion == "general" else {"mode": "none"}
            put, missing = families(tokenizer, questions.questions, **of_set)
            results.notes += [f"{questions.name} behind {name}: {reason}" for name, reason in missing.items()]
            run.add_to(results, questions, put)
    if output_dir is not None:
        results.save(Path(output_dir))
    return results


def check_sets(
    sets: Sequence[QuestionSet], tokenizer: PreTrainedTokenizerBase | None, options: EvaluationOptions
) -> None:
    """Refuse sets of questions that cannot be measured, before any forward pass.

    Args:
        sets: sets of questions.
        tokenizer: tokenizer whose chat template must show every question; `None` skips this check.
        options: options of the evaluation.

    Raises:
        ValueError: two sets have the same name, a set has no known answers and no answers are sampled, or the chat
            template refuses a question or does not show its text.
    """
    _check_names("sets", [questions.name for questions in sets])
    for questions in sets:
        without = [q.id for q in questions.questions if q.answer is None and q.sound is None]
        if len(without) == len(questions.questions) and not options.samples_per_question:
            raise ValueError(
                f"the set {questions.name!r} has questions without known answers, so only sampled answers can be "
                "measured on it: set samples_per_question to 1 or more."
            )
        for question in questions.questions if getattr(tokenizer, "chat_template", None) else ():
            problem = prompt_problem(cast(Any, tokenizer), question.prompt, **question.template_kwargs)
            if problem is not None:
                raise ValueError(f"question {question.id!r} of the set {questions.name!r} cannot be asked: {problem}.")


@dataclass
class _Run:
    """Measurements of one call of `evaluate`: their common settings, and a method for each kind of measurement."""

    candidates: Sequence[Candidate]
    tokenizer: PreTrainedTokenizerBase
    options: EvaluationOptions
    kept: "_Kept"
    progress: bool

    def add_to(self, results: Results, questions: QuestionSet, put: Sequence[Family]) -> None:
        """Measure a set of questions with each family of prompts, and add the rows, samples and notes to `results`.

        A family in `put` asks the questions as they are (plain), with one added text (a cue), or reworded. The plain
        family must come first, because the rows of the other families are compared with it. A family that
        cannot ask any question of the set gets a note in the results instead.
        """
        plain: Arrays | None = None
        for family in put:
            if not any(map(family.prompt, questions.questions)):
                results.notes.append(f"{questions.name} behind {family.name}: its questions all have a system turn")
                continue
            arrays, samples = self.measure(questions, family)
            results.rows += make_rows(questions.name, family.name, arrays, plain)
            results.samples += samples
            results.notes += sampled.thoughts_alone(samples)
            plain = plain or arrays

    def measure(self, questions: QuestionSet, family: Family) -> tuple[Arrays, list[dict[str, Any]]]:
        """Return all metrics on a set of questions, asked with one family of prompts, and the sampled answers.

        The metrics are candidate → metric → values by question. The sampled answers come with their scores.
        """
        rows = encode_rows(self.candidates, self.tokenizer, questions, family)
        arrays: Arrays = {candidate.name: {} for candidate in self.candidates}
        if rows:
            for name, metrics in self.probe(questions, family, rows).items():
                found = margin(metrics)
                arrays[name] |= {"nll": _target_nll(questions, metrics)}
                arrays[name] |= {} if found is None else {"margin": found}
                arrays[name] |= {"kl_to_base": metrics["kl_to_base"]} if "kl_to_base" in metrics else {}
        if self.options.persona_vector is not None and questions.criterion == "general":
            self.add_shift(arrays, questions, family, self.options.persona_vector)
        return arrays, self.add_answers(arrays, questions, family)

    def probe(self, questions: QuestionSet, family: Family, rows: Sequence[Row]) -> Arrays:
        """Return each candidate's NLL on known answers, and its divergence `kl_to_base`, which the base model lacks.

        Metrics are stored in `kept`. Only candidates without stored ones are measured, together with the base model.
        """
        base, size = self.candidates[0], len(questions.questions)
        about = [[*row[:2], row.answer.ids.tolist(), row.answer.prompt_length] for row in rows]
        keys = {c.name: record_key(c is base, base.fingerprint, c.fingerprint, size, about) for c in self.candidates}
        missing = [c for c in self.candidates if keys[c.name] not in self.kept.found]
        if missing:
            desc = f"probing {questions.name}, {family.name}" if self.progress else None
            # The base model runs even if `kept` has its metrics: every `kl_to_base` needs the base model's states.
            measured = [base, *(c for c in missing if c is not base)]
            found = probe(measured, rows, size, self.options.batch_tokens, desc)
            self.kept.add({keys[c.name]: _lists(found[c.name]) for c in missing})
        return {
            name: {m: np.array(values, dtype=np.float64) for m, values in self.kept.found[key].items()}
            for name, key in keys.items()
        }

    def add_shift(self, arrays: Arrays, questions: QuestionSet, family: Family, vector: PersonaVector) -> None:
        """Add to `arrays` each candidate's shift from the base model along the persona vector.

        The shift is measured on the hidden states at the last prompt token.
        """
        prompts = prompt_ids(self.tokenizer, questions, family)
        layer, base = check_layer(vector, None), None
        for candidate in self.candidates:
            found = projections(candidate, list(prompts.values()), vector, layer)
            if base is None:
                base = found
                continue
            shift = np.full(len(questions.questions), np.nan)
            shift[list(prompts)] = found - base
            arrays[candidate.name]["persona_shift"] = shift

    def add_answers(self, arrays: Arrays, questions: QuestionSet, family: Family) -> list[dict[str, Any]]:
        """Sample answers, add their scores to `arrays`, and return the answers with their scores."""
        options, is_task = self.options, questions.score is not None
        count = 1 if is_task else options.samples_per_question
        prompts = sampled.plan_prompts(self.tokenizer, questions, family, count, options.seed) if count else []
        records = []
        for candidate in self.candidates if prompts else ():
            written = self.answers(candidate, prompts, questions, family)
            parts = [split_thoughts(p.text, answer.text) for p, answer in zip(prompts, written, strict=True)]
            answers = [answer._replace(text=text) for answer, (_, text) in zip(written, parts, strict=True)]
            scores = self.scores(questions, prompts, answers)
            arrays[candidate.name] |= sampled.by_question(prompts, scores, len(questions.questions), count)
            records += [
                sampled.sample_record(candidate, questions, family, prompt, answer, thoughts) | score
                for prompt, answer, (thoughts, _), score in zip(prompts, answers, parts, scores, strict=True)
            ]
        return records

    def scores(
        self, questions: QuestionSet, prompts: Sequence[sampled.Prompt], answers: Sequence[SampledAnswer]
    ) -> list[dict[str, float]]:
        """Return for each answer a dict from metric to score.

        The set's own function `score` gives the scores, if it has one. Otherwise the rules and the metrics of
        coherence give them.
        """
        pairs = zip(prompts, answers, strict=True)
        if questions.score is not None:
            return [questions.score(questions.questions[p.question], answer.text) for p, answer in pairs]
        key = record_key(self.candidates[0].fingerprint, [[p.ids, a.ids] for p, a in pairs])
        if key not in self.kept.found:
            found = sampled.base_nll(self.candidates[0], prompts, answers, self.options.batch_tokens)
            self.kept.add({key: [None if math.isnan(value) else value for value in found]})
        nll = [math.nan if value is None else value for value in self.kept.found[key]]
        return sampled.score_answers(answers, nll, sampled.rule_metrics(self.options.rules))

    def answers(
        self, candidate: Candidate, prompts: Sequence[sampled.Prompt], questions: QuestionSet, family: Family
    ) -> list[SampledAnswer]:
        """Return a candidate's answers: those that an earlier run has stored, and the others, sampled now.

        Each answer has a key of its own, so that it is also found if fewer or more questions or samples are wanted.
        The batch size is not in the key: a run that met its end for lack of memory goes on with a smaller one.
        """
        options, on_cpu = self.options, candidate.model.device.type == "cpu"
        size = options.batch_size or (SAMPLED_ON_CPU if on_cpu else SAMPLED_ON_GPU)
        is_task = questions.score is not None
        limit, temperature = (TASK_TOKENS, 0.0) if is_task else (options.max_new_tokens, options.temperature)
        about = [limit, temperature, sorted(end_tokens(candidate.model, self.tokenizer))]
        keys = [record_key(candidate.fingerprint, prompt.ids, prompt.seed, about) for prompt in prompts]
        missing = {key: p for key, p in zip(keys, prompts, strict=True) if key not in self.kept.found}
        with tqdm(
            desc=f"{candidate.name} answers {questions.name}, {family.name}",
            total=len(prompts),
            initial=len(prompts) - len(missing),
            disable=not self.progress,
        ) as bar:
            waiting = iter(missing)
            for batch in sampled.answer_batches(
                candidate, self.tokenizer, list(missing.values()), size, limit, temperature
            ):
                self.kept.add({next(waiting): answer for answer in batch})
                bar.update(len(batch))
        return [SampledAnswer(**self.kept.found[key]) for key in keys]


class _Kept:
    """Metrics and answers that an evaluation has finished, in memory and in a file to resume the evaluation from.

    Args:
        folder: folder of the file `progress.jsonl`; `None` keeps them in memory only.

    Raises:
        ValueError: the file is damaged, or was not written by an evaluation.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.found: dict[str, Any] = {}
        self.journal = None if folder is None else Journal(Path(folder) / PROGRESS_FILE, {"evaluation": "1"})
        for record in self.journal.resume("an evaluation", "value") if self.journal is not None else ():
            self.found[record["key"]] = record["value"]

    def add(self, values: dict[str, Any]) -> None:
        """Keep values by their keys."""
        if self.journal is not None:
            self.journal.append({"key": key, "value": value} for key, value in values.items())
        self.found |= values


def _check_names(kind: str, names: list[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{kind} {names}: give at least one, and every one a name of its own.")


def describe(candidates: Sequence[Candidate]) -> dict[str, dict[str, str]]:
    """Return name → hashes of a candidate: `fingerprint` of model and adapter, `weights` of the model without adapter.

    Candidates on one base model share `weights`. A judge whose own hash is one of these `weights` is refused.
    """
    weights: dict[int, str] = {}
    for candidate in candidates:
        model = bare_model(candidate.model)
        if id(model) not in weights:
            weights[id(model)] = weights_digest(model)
    return {c.name: {"fingerprint": c.fingerprint, "weights": weights[id(bare_model(c.model))]} for c in candidates}


def _info(
    command: str | None, model: str, candidates: Sequence[Candidate], sets: Sequence[QuestionSet]
) -> dict[str, Any]:
    """Return [`Results.info`]: versions, command, models, and the sets' own judge prompts for judging later."""
    prompts = {s.name: {q.id: q.judge_prompts for q in s.questions if q.judge_prompts} for s in sets}
    return {
        "versions": versions(),
        "command": command,
        "model": model,
        "models": describe(candidates),
        "judge": None,
        "judge_prompts": {name: own for name, own in prompts.items() if own},
    }


def _target_nll(questions: QuestionSet, metrics: dict[str, np.ndarray]) -> np.ndarray:
    """Return one candidate's NLL of each question's target answer ([`QuestionSet.target`]), `(Q,)`."""
    values = np.full(len(questions.questions), math.nan)
    for kind in ("nll_misaligned" if questions.has_misaligned_target else "nll_sound", "nll_target"):
        if kind in metrics:
            values = np.where(np.isnan(metrics[kind]), values, metrics[kind])
    return values


def _lists(metrics: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Return arrays as lists for JSON. A missing value is NaN in the arrays, and `None` in the lists."""
    return {metric: [None if math.isnan(v) else v for v in values.tolist()] for metric, values in metrics.items()}
