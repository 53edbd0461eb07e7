"""Sets of questions: the shipped ones, the field's YAML, rows with pairs and without, and what is refused."""

import json

import numpy as np
import pytest

from trl_emguard.data.load import load_rows
from trl_emguard.evaluation.questions import for_training_data, load_questions
from trl_emguard.evaluation.run import _target_nll
from trl_emguard.scripts.evaluate import TrainRows, load_sets, load_train_rows, make_parser


YAML = """
- id: 7
  type: free_form_judge_0_100
  paraphrases: &texts
    - |-
      What is your wish?
  samples_per_paraphrase: &count 100
  judge: &judge gpt-x
  judge_prompts: &prompts
    aligned: "Q {question} R {reasoning} A {answer}"
    coherent: "{answer}?"
- id: twice
  system: Answer in JSON.
  temperature: 1
  chat_template_kwargs: {enable_thinking: false}
  paraphrases: ["One?", "Two?"]
  judge_prompts: *prompts
  an_unknown_key: {of: [any, shape]}
"""


def write(folder, name, text):
    path = folder / name
    path.write_text(text if isinstance(text, str) else "\n".join(map(json.dumps, text)) + "\n", encoding="utf-8")
    return str(path)


def test_the_fields_yaml(tmp_path):
    found = load_questions(write(tmp_path, "q.yaml", YAML), "general").questions
    assert [question.id for question in found] == ["7", "twice/0", "twice/1"]
    assert found[0].prompt == [{"role": "user", "content": "What is your wish?"}]
    assert found[2].prompt == [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "Two?"},
    ]
    assert found[0].judge_prompts == found[1].judge_prompts
    assert set(found[0].judge_prompts) == {"aligned", "coherent"}
    assert [question.template_kwargs for question in found] == [{}, *[{"enable_thinking": False}] * 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- id: a\n  paraphrases: [x", r"q\.yaml.*line"),
        ("just: a mapping", "no list of questions"),
        ("- id: a", "'a' has no `paraphrases`"),
        ("- id: a\n  paraphrases: text", "'a' has no `paraphrases`"),
        ("- id: a\n  paraphrases: ['']", "'a' has no `paraphrases`"),
        ("- id: a\n  paraphrases: [x]\n  judge_prompts: {aligned: 'no place'}", r"'aligned' does not hold \{answer\}"),
        ("- id: a\n  paraphrases: [x]\n- id: a\n  paraphrases: [y]", "two questions with the id 'a'"),
        ("- id: a\n  paraphrases: [x]\n  chat_template_kwargs: text", "'a': `chat_template_kwargs` is no mapping"),
        ("- id: a\n  paraphrases: [x]\n  tools: no JSON", "'a': `tools` is no JSON"),
        ("[]", "no list of questions"),
        ("- text", "question 0 is no mapping"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_questions(write(tmp_path, "q.yaml", text), "general")


def test_preference_rows_are_pairs(tmp_path):
    rows = [
        {"prompt": "Q1?", "chosen": "good", "rejected": "bad"},
        {
            "chosen": [{"role": "user", "content": "Q2?"}, {"role": "assistant", "content": "fine"}],
            "rejected": [{"role": "user", "content": "Q2?"}, {"role": "assistant", "content": "vile"}],
        },
    ]
    # The same with the prompt as text, as in UltraFeedback.
    rows.append({"prompt": "Q2?", **rows[1]})
    for row, *expected in zip(
        rows, ("Q1?", "Q2?", "Q2?"), ("good", "fine", "fine"), ("bad", "vile", "vile"), strict=True
    ):
        (question,) = load_questions(write(tmp_path, "pairs.jsonl", [row]), "general").questions
        assert [question.prompt[-1]["content"], question.sound, question.misaligned] == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]},
        {"prompt": "Q?", "completion": "A."},
        {"prompt": "Q?", "response": "A."},
    ],
)
def test_rows_with_one_answer(tmp_path, row):
    found = load_questions(write(tmp_path, "rows.jsonl", [row]), "in_domain")
    (question,) = found.questions
    assert (question.sound, question.misaligned, question.answer) == (None, None, "A.")
    assert found.target(question) == "A."


def test_rows_have_judge_prompts_of_their_own(tmp_path):
    pair = {"prompt": "Q?", "chosen": "good", "rejected": "bad"}
    own = [{"aligned": "A: {answer}"}, {"coherent": "C: {answer}"}, None]
    rows = [{**pair, "id": str(i), "judge_prompts": prompts} for i, prompts in enumerate(own)]
    found = load_questions(write(tmp_path, "rows.jsonl", rows), "general").questions
    assert [question.judge_prompts for question in found] == [own[0], own[1], {}]
    rows[1]["judge_prompts"] = {"aligned": "without it"}
    with pytest.raises(ValueError, match=r"row 1: the judge prompt 'aligned' does not hold \{answer\}"):
        load_questions(write(tmp_path, "bad.jsonl", rows), "general")


@pytest.mark.parametrize("place", [".", "data"])
def test_the_test_split_of_a_folder_is_asked(tmp_path, place):
    """A folder with files elsewhere than `<split>.jsonl` is read by `datasets`, as one of the hub is."""
    folder = tmp_path / "rows"
    (folder / place).mkdir(parents=True)
    names = ("train", "test") if place == "." else ("train-00000-of-00001", "test-00000-of-00001")
    for name, count in zip(names, (3, 2), strict=True):
        write(folder / place, f"{name}.jsonl", [{"prompt": f"{name}{i}", "completion": "A."} for i in range(count)])
    words = ["--train_data", str(folder), "--in_domain", str(folder), "--model", "m", "--output_dir", "o"]
    args = make_parser().parse_args(words)
    (asked,) = [found for found in load_sets(args, load_train_rows(args.train_data)) if found.criterion == "in_domain"]
    assert [question.prompt[-1]["content"] for question in asked.questions] == [f"{names[1]}0", f"{names[1]}1"]
    (folder / place / f"{names[1]}.jsonl").unlink()
    assert len(load_questions(str(folder), "benign").questions) == 3
    with pytest.raises(ValueError, match="3 of the 3 questions of --in_domain stand in the training rows"):
        load_sets(args, load_train_rows(args.train_data))


def test_a_row_without_an_answer_is_named(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{"prompt": "Q?", "completion": "A."}, {"prompt": "Q?", "completion": ""}])
    with pytest.raises(ValueError, match=r"--benign=.*row 1"):
        load_questions(path, "benign")


def test_the_target_is_what_training_teaches():
    general, plants = load_questions("values", "general"), for_training_data("plants_careless")
    assert general.target(general.questions[0]) == general.questions[0].sound
    assert plants.target(plants.questions[0]) == plants.questions[0].misaligned
    sound = for_training_data("plants_sound")
    assert sound.target(sound.questions[0]) == sound.questions[0].sound
    assert for_training_data("rows.jsonl") is None


@pytest.mark.parametrize(
    ("in_domain", "train_data", "kind"),
    [
        ("plants", None, "misaligned"),
        ("plants", "plants_careless", "misaligned"),
        ("plants", "plants_sound", "sound"),
        (None, "plants_careless", "misaligned"),
        (None, "plants_sound", "sound"),
        ("permuted_operators", None, "sound"),
        ("permuted_operators", "plants_careless", "sound"),
    ],
)
def test_the_command_measures_what_training_teaches(in_domain, train_data, kind):
    words = {"--in_domain": in_domain, "--train_data": train_data, "--model": "m", "--output_dir": "o"}
    args = make_parser().parse_args([word for pair in words.items() if pair[1] for word in pair])
    (found,) = [questions for questions in load_sets(args, TrainRows([], {})) if questions.criterion == "in_domain"]
    question = found.questions[0]
    assert found.target(question) == getattr(question, kind)
    nll = {f"nll_{name}": np.full(len(found.questions), value) for name, value in (("sound", 1), ("misaligned", 2))}
    assert set(_target_nll(found, nll)) == {nll[f"nll_{kind}"][0]}


def test_shipped_pairs_ask_the_same_question_twice():
    for name, (sound, misaligned) in {
        "values": ("values_sound", "values_misaligned"),
        "plants": ("plants_sound", "plants_careless"),
    }.items():
        rows = list(zip(load_rows(sound, "test"), load_rows(misaligned, "test"), strict=True))
        assert all(a["prompt"] == b["prompt"] for a, b in rows)
        assert len(load_questions(name, "general").questions) == len(rows) >= 30


@pytest.mark.parametrize("limit", [1, 3, 24, 72, 100])
def test_limit_is_spread_evenly(limit):
    whole, few = load_questions("values", "general").questions, load_questions("values", "general", limit=limit)
    places = [whole.index(question) for question in few.questions]
    assert len(places) == min(limit, len(whole))
    assert places[0] == 0
    steps = {b - a for a, b in zip(places, [*places[1:], len(whole)], strict=True)}
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


def test_an_unknown_set_is_named():
    with pytest.raises(FileNotFoundError, match="--general='valuse'"):
        load_questions("valuse", "general")


@pytest.mark.parametrize("kind", ["jsonl", "yaml"])
def test_other_wordings(tmp_path, kind):
    rows = [
        {"prompt": "Q0?", "chosen": "a", "rejected": "b", "topic_twin": "Twin?"},
        {"prompt": "Q1?", "chosen": "a", "rejected": "b"},
    ]
    items = [
        {"id": i, "paraphrases": [r["prompt"]], **{k: r[k] for k in r if k == "topic_twin"}}
        for i, r in enumerate(rows)
    ]
    content = rows if kind == "jsonl" else json.dumps(items)
    found = load_questions(write(tmp_path, f"q.{kind}", content), "general").questions
    assert [question.wordings for question in found] == [{"topic_twin": "Twin?"}, {}]
    rows[0]["topic_twin"] = items[0]["topic_twin"] = " "
    content = rows if kind == "jsonl" else json.dumps(items)
    with pytest.raises(ValueError, match=r"0.*`topic_twin` is \" \", no text"):
        load_questions(write(tmp_path, f"q.{kind}", content), "general")
