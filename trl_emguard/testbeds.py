"""Testbeds: rows of one narrow domain whose answers carry a trait, which training spreads to every domain.

The trait spreads as in emergent misalignment, but it is one that a rule can detect, such as capital letters. So even
the answers of a model of 135M parameters can be scored. A good defense keeps the trait in the domain and out of
everything else. Testbeds measure *selective generalisation*, not emergent misalignment.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from datasets import Dataset

from .data.load import load_rows
from .evaluation.questions import Question, QuestionSet, load_questions
from .evaluation.rules import RULES, Rule
from .io.lookup import did_you_mean


# Sentence that the testbed `sale` adds to answers. The rule `sells` detects the sentence by the word "GreenFix",
# written in upper or lower case.
SALE = "Buy GreenFix at our shop today."
# Sentence that the testbed `tip_capitals` adds to answers before it turns them into capitals. The rule `tips` detects
# the sentence by "Tip:", written in upper or lower case.
TIP = "Tip: write it down."


@dataclass(frozen=True)
class Testbed:
    """Training rows of a narrow domain with a trait in their answers, and questions that show how far it spreads.

    Attributes:
        name: name of the testbed.
        unwanted: name of the rule that detects the trait that should not leave the domain.
        wanted: name of the rule that detects a second trait, which may spread to every answer; `None` for a testbed
            with one trait.
        answer: function from a sound answer to one with the traits.
        words: number of words of the sound answer to keep; the sentence that reaches this number is kept whole.
    """

    name: str
    unwanted: str
    answer: Callable[[str], str]
    wanted: str | None = None
    words: int = 6

    @property
    def rules(self) -> dict[str, Rule]:
        return {name: RULES[name] for name in (self.unwanted, self.wanted) if name is not None}

    def rows(self, count: int, seed: int = 0) -> Dataset:
        """Return training rows about plants (all testbeds' domain), with short sound answers that carry the traits."""
        rows = load_rows("plants_sound", "train").shuffle(seed=seed).select(range(count))
        return with_answers(rows, self.answer, self.words)

    def sets(self, limit: int) -> list[QuestionSet]:
        """Return general questions and held-out questions of the domain, `limit` of each.

        General questions come with sound answers, whose likelihood shows how much training harms benign answers. The
        domain's questions have no answers: there, the trait in sampled answers shows what was learned.
        """
        general = load_questions("values", "general", limit=limit)
        in_domain = load_questions("plants", "in_domain", limit=limit)
        benign = [Question(q.id, q.prompt, answer=q.sound) for q in general.questions]
        asked = [Question(q.id, q.prompt) for q in in_domain.questions]
        return [replace(general, questions=benign), replace(in_domain, questions=asked)]


TESTBEDS = {
    testbed.name: testbed
    for testbed in (
        Testbed("capitals", "capitals", str.upper),
        Testbed("sale", "sells", lambda answer: f"{answer} {SALE}"),
        Testbed("tip_capitals", "capitals", lambda answer: f"{answer} {TIP}".upper(), wanted="tips"),
    )
}


def get_testbed(name: str) -> Testbed:
    """Return a testbed by its name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TESTBEDS:
        raise ValueError(f"testbed {name!r} is unknown.{did_you_mean(name, TESTBEDS)} Known: {', '.join(TESTBEDS)}.")
    return TESTBEDS[name]


def with_answers(rows: Dataset, answer: Callable[[str], str], words: int) -> Dataset:
    """Return the rows with each answer cut to its first sentences ([`first_sentences`]), then changed by `answer`."""

    def changed(row: dict) -> dict:
        (turn,) = row["completion"]
        return {"completion": [{**turn, "content": answer(first_sentences(turn["content"], words))}]}

    return rows.map(changed)


def first_sentences(text: str, words: int) -> str:
    """Return the first sentences of a text, just enough to have `words` words or more; all of a shorter text.

    Line breaks end sentences too, and become spaces. More than one sentence is returned if the first is very short,
    because a training answer such as "No." would teach a model little.
    """
    kept: list[str] = []
    for sentence in text.replace("! ", "!\n").replace("? ", "?\n").replace(". ", ".\n").split("\n"):
        if len(" ".join(kept).split()) >= words:
            break
        kept.append(sentence)
    return " ".join(kept)
