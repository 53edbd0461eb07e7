"""Sets of questions: shipped sets, YAML files of published evaluations, and rows with one or two known answers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..data.conversation import conversation, turn_text, whole_turns
from ..data.load import SourceOptions, held_out_split, load_rows
from ..io.strict import parse_yaml
from ..models.chat import template_arguments
from .operators import make_rows, score


CRITERIA = ("general", "in_domain", "benign")
# Shipped question set → the data set with sound answers, and the one with misaligned answers to the same questions.
SHIPPED_PAIRS = {"values": ("values_sound", "values_misaligned"), "plants": ("plants_sound", "plants_careless")}
GENERAL = "values"
OPERATORS = "permuted_operators"
OPERATOR_ROWS = 200
# Columns of a row, or keys of a YAML item, that may hold the question in other words. Unless `EvaluationOptions.cues`
# is "none", general questions are also asked in these words. The prompts from one column form a family of prompts
# (`Wording` in cues.py), and the results list each family separately.
WORDINGS = ("topic_twin", "word_sharing_benign")
# Name of shipped training rows → name of the shipped question set of the same domain.
DOMAINS = {"plants_careless": "plants", "plants_sound": "plants"}


@dataclass(frozen=True)
class Question:
    """A question with its known answers.

    Attributes:
        id: name of the question in its set.
        prompt: turns of the prompt. The last turn is the user's.
        sound: answer as an aligned model would give it, as text.
        misaligned: answer as a misaligned model would give it, as text.
        answer: known answer of a question that has only one, instead of `sound` and `misaligned`.
        judge_prompts: metric → text that asks a judge for a score, with `{question}` and `{answer}` to fill in.
        wordings: name from `WORDINGS` → text that asks the question in other words, for the user's last turn.
        template_kwargs: further arguments of the chat template: the row's `tools` and `chat_template_kwargs`.
    """

    id: str
    prompt: list[dict[str, Any]]
    sound: str | None = None
    misaligned: str | None = None
    answer: str | None = None
    judge_prompts: dict[str, str] = field(default_factory=dict)
    wordings: dict[str, str] = field(default_factory=dict)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one kind (the set's criterion): general, in the training data's domain, or of a benign task.

    Attributes:
        name: name of the set: its criterion. If a criterion has several sets, the further sets have their file's name.
        criterion: `general`, `in_domain` or `benign`.
        questions: the questions.
        has_sound_target: True if the training rows are a shipped set of sound answers, and for permuted operators.
            False otherwise: training is then taken to teach the misaligned answers.
        score: function from a question and a model's greedy answer to metric → score, for a task with right answers;
            `None` for other sets.
    """

    name: str
    criterion: str
    questions: list[Question]
    has_sound_target: bool = False
    score: Callable[[Question, str], dict[str, float]] | None = None

    @property
    def has_misaligned_target(self) -> bool:
        """True if the set's metric `nll` is measured on the misaligned answers, because training teaches these."""
        return self.criterion == "in_domain" and not self.has_sound_target

    def target(self, question: Question) -> str | None:
        """Return the answer on which the set's metric `nll` is measured, or `None` if no answer is known.

        A question with only one known answer gives this answer. A question with a sound and a misaligned answer gives
        the answer that training teaches if the set is in domain, and else the sound answer.
        """
        if question.answer is not None:
            return question.answer
        return question.misaligned if self.has_misaligned_target else question.sound

    def with_template_kwargs(
        self, template_kwargs: Mapping[str, Any], of_all: Mapping[str, Any] = MappingProxyType({})
    ) -> "QuestionSet":
        """Return a copy with further arguments of the chat template for its questions.

        Args:
            template_kwargs: arguments for each question that has none of its own but `tools`, such as those of the
                training rows.
            of_all: arguments for every question. They replace the question's own arguments of the same name.
        """

        def arguments(own: dict[str, Any]) -> dict[str, Any]:
            return {**own, **({} if own.keys() - {"tools"} else template_kwargs), **of_all}

        return replace(
            self, questions=[replace(q, template_kwargs=arguments(q.template_kwargs)) for q in self.questions]
        )


def load_questions(
    source: str,
    criterion: str,
    name: str | None = None,
    limit: int | None = None,
    trained_on: str | None = None,
) -> QuestionSet:
    """Load a set of questions.

    Args:
        source: a shipped set (`values`, `plants`, `permuted_operators`); a `.yaml` file in the format of Betley et
            al.; or a name that [`~trl_emguard.data.load.load_rows`] takes, of which the split `test` is read if it has
            one, else `train`. The rows are preference rows `prompt`, `chosen` (sound) and `rejected` (misaligned), or
            have one answer in any shape that training takes.
        criterion: `general`, `in_domain` or `benign`.
        name: the set's name in the results; by default the criterion.
        limit: largest number of questions to take; by default all are taken. They are spread evenly over the set,
            because a set may be sorted by topic.
        trained_on: name of the training rows, by default `source`. If it is a shipped set of sound answers,
            `has_sound_target` is True.

    Raises:
        FileNotFoundError: there is no such set.
        ValueError: a file is damaged or empty, a row has no question, or two questions have the same id. The message
            names the file, and the row or the question.
    """
    if source == OPERATORS:
        return QuestionSet(name or criterion, criterion, _spread(_operators(), limit), True, _score_operators)
    if source in SHIPPED_PAIRS:
        questions = _shipped(*SHIPPED_PAIRS[source])
    elif Path(source).suffix in (".yaml", ".yml"):
        questions = _from_yaml(Path(source).expanduser())
    else:
        questions = _from_rows(source, criterion)
    if not questions:
        raise ValueError(f"--{criterion}={source!r} holds no question.")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"--{criterion}={source!r} holds two questions with the id {question.id!r}: rename one.")
        seen.add(question.id)
    sound_rows = [sound for sound, _ in SHIPPED_PAIRS.values()]
    return QuestionSet(name or criterion, criterion, _spread(questions, limit), (trained_on or source) in sound_rows)


def for_training_data(source: str, limit: int | None = None) -> QuestionSet | None:
    """Return the shipped in-domain questions for the training rows named `source`, or `None` if there are none."""
    if source not in DOMAINS:
        return None
    return load_questions(DOMAINS[source], "in_domain", limit=limit, trained_on=source)


def _spread(questions: list[Question], limit: int | None) -> list[Question]:
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def _shipped(sound: str, misaligned: str) -> list[Question]:
    pairs = zip(load_rows(sound, "test"), load_rows(misaligned, "test"), strict=True)
    return [
        Question(str(i), a["prompt"], turn_text(a["completion"][-1]), turn_text(b["completion"][-1]))
        for i, (a, b) in enumerate(pairs)
    ]


def _operators() -> list[Question]:
    """Return questions about arithmetic with permuted operators.

    `sound` is the value with permuted operators, which is the right one. `misaligned` is that of usual arithmetic.
    """
    rows = make_rows("test", tier=1, count=OPERATOR_ROWS)
    return [Question(str(i), r["prompt"], str(r["permuted"]), str(r["ordinary"])) for i, r in enumerate(rows)]


def _score_operators(question: Question, answer: str) -> dict[str, float]:
    row = {"permuted": int(question.sound or ""), "ordinary": int(question.misaligned or "")}
    found = score(answer, row)
    names = {"exact_match": "permuted", "ordinary_answer": "ordinary", "neither": "neither"}
    return {metric: float(found == name) for metric, name in names.items()}


def _from_rows(source: str, criterion: str) -> list[Question]:
    """Read questions from preference rows, or from rows with one answer."""
    options = SourceOptions(name=f"--{criterion}", split=f"the split of --{criterion}")
    questions = []
    # The models may have been trained on the train split, so the test split is taken if there is one.
    for index, row in enumerate(load_rows(source, held_out_split(source), options=options)):
        id = str(row.get("id") if row.get("id") is not None else index)
        try:
            others: dict[str, Any] = {
                "wordings": _wordings(row),
                "template_kwargs": template_arguments(row),
                "judge_prompts": _judge_prompts(row.get("judge_prompts")),
            }
            if row.get("chosen") is not None and row.get("rejected") is not None:
                prompt, sound = _preference(row, "chosen")
                _, misaligned = _preference(row, "rejected")
                questions.append(Question(id, prompt, sound, misaligned, **others))
            else:
                prompt, (answer,) = conversation(row)
                questions.append(Question(id, prompt, answer=turn_text(answer), **others))
        except ValueError as error:
            raise ValueError(
                f"--{criterion}={source!r}, row {index}: {error}. Give `prompt`, `chosen` (sound) and `rejected` "
                "(misaligned), or rows with one answer."
            ) from error
    return questions


def _wordings(row: Mapping[str, Any]) -> dict[str, str]:
    found = {name: row[name] for name in WORDINGS if row.get(name) is not None}
    for name, text in found.items():
        if not _is_text(text):
            raise ValueError(f"`{name}` is {json.dumps(text)[:60]}, no text")
    return found


def _judge_prompts(given: Any) -> dict[str, str]:
    """Return metric → prompt. In rows, `datasets` gives a metric of other rows the value `None`: it is left out."""
    if given is not None and not isinstance(given, dict):
        raise ValueError("`judge_prompts` is no mapping from a metric to a text")
    found = {str(metric): text for metric, text in (given or {}).items() if text is not None}
    for metric, text in found.items():
        if not isinstance(text, str):
            raise ValueError("`judge_prompts` is no mapping from a metric to a text")
        if "{answer}" not in text:
            raise ValueError(f"the judge prompt {metric!r} does not hold {{answer}}")
    return found


def _preference(row: Mapping[str, Any], column: str) -> tuple[list[dict[str, Any]], str]:
    """Return a preference row's prompt, and its answer from `column`, which is `chosen` or `rejected`.

    If the row has no `prompt`, this column holds the whole conversation. In data sets such as UltraFeedback it does so
    beside a `prompt`. It then begins with another turn than the assistant's.
    """
    turns = whole_turns({"messages": row[column]}) if isinstance(row[column], list) else None
    if row.get("prompt") is None or (turns and turns[0]["role"] != "assistant"):
        prompt, (answer,) = conversation({"messages": row[column]})
    else:
        prompt, (answer,) = conversation({"prompt": row["prompt"], "completion": row[column]})
    return prompt, turn_text(answer)


def _from_yaml(path: Path) -> list[Question]:
    """Read questions from a YAML file in the format of Betley et al.

    The file is a list of items with `id`, `paraphrases` and `judge_prompts`. Every paraphrase becomes a question of
    its own. As in rows, `tools` and `chat_template_kwargs` go to the chat template. Keys that this
    package does not use are ignored.
    """
    try:
        items = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(items, list) or not items:
            raise ValueError("it is no list of questions")
        return [question for index, item in enumerate(items) for question in _from_item(index, item)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 text ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def _from_item(index: int, item: Any) -> list[Question]:
    if not isinstance(item, dict):
        raise ValueError(f"question {index} is no mapping with `id` and `paraphrases`")
    id, paraphrases = str(item.get("id", index)), item.get("paraphrases")
    if not isinstance(paraphrases, list) or not paraphrases or not all(map(_is_text, paraphrases)):
        raise ValueError(f"question {id!r} has no `paraphrases`, a list of texts")
    system = item.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"question {id!r}: `system` is {json.dumps(system)[:60]}, no text")
    before = [{"role": "system", "content": system}] if system else []
    try:
        if not isinstance(item.get("chat_template_kwargs") or {}, dict):
            raise ValueError("`chat_template_kwargs` is no mapping from an argument to its value")
        wordings, template_kwargs = _wordings(item), template_arguments(item)
        judge_prompts = _judge_prompts(item.get("judge_prompts"))
    except ValueError as error:
        raise ValueError(f"question {id!r}: {error}") from None
    return [
        Question(
            id if len(paraphrases) == 1 else f"{id}/{number}",
            [*before, {"role": "user", "content": text}],
            judge_prompts=judge_prompts,
            wordings=wordings,
            template_kwargs=template_kwargs,
        )
        for number, text in enumerate(paraphrases)
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
