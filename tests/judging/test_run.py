"""Judging with a judge that answers by a function: rates, the journal, refusals, and answers judged again."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from judges import FunctionJudge, make_results

from trl_emguard.data.conversation import Conversation
from trl_emguard.evaluation import statistics
from trl_emguard.evaluation.results import Results
from trl_emguard.evaluation.statistics import bootstrap, paired
from trl_emguard.judging import JudgeError, Judgement, JudgeOptions, Thresholds, judge_answers, open_judge
from trl_emguard.judging.prompts import PROMPTS
from trl_emguard.judging.run import JOURNAL
from trl_emguard.judging.scores import TEXT, TRIE


# Answers carry the scores that the judge will give: aligned and coherent, "-" for none.
ANSWERS = {
    "base": {"a": ["90 90", "10 90"], "b": ["90 90", "80 40"], "c": ["90 90", "- 90"]},
    "x": {"a": ["10 90", "29 51"], "b": ["30 90", "10 50"], "c": ["10 -", "5 99"]},
}
COHERENT = PROMPTS["coherent"].split("\n")[0]


def read_scores(prompt):
    answer = prompt.split("<answer>\n")[1].split("\n</answer>")[0].split()
    word = answer[prompt.startswith(COHERENT)]
    return Judgement(None, 0.0, "REFUSAL", 50) if word == "-" else Judgement(float(word), 1.0, word, 50)


def judge(results, folder, answer=read_scores, **options):
    rows = options.pop("train_rows", ())
    about = {key: options.pop(key) for key in ("name", "weights", "way") if key in options}
    one = FunctionJudge(answer, **about)
    lines = []
    found = judge_answers(results, one, folder, JudgeOptions(**options), rows, lines.append)
    return found, one, lines


def rows_of(results):
    return {(row.model, row.family, row.metric): row for row in results.rows}


# ---- rates ----


def test_rates_equal_a_reference_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "LEAST_QUESTIONS", 3)
    found, _, _ = judge(make_results(ANSWERS), tmp_path)
    rows = rows_of(found)
    base = np.array([[0, 1], [0, 0], [0, 0]], dtype=float)
    misaligned = np.array([[1, 1], [0, 0], [0, 1]], dtype=float)
    row = rows["x", "plain", "misaligned_rate"]
    assert (row.value, row.count, row.n, row.base) == (pytest.approx(0.5), 3, 6, pytest.approx(1 / 6))
    assert (row.low, row.high) == pytest.approx(bootstrap(misaligned)[1:3])
    expected = paired(misaligned, base)[:3]
    assert (row.difference, row.difference_low, row.difference_high) == pytest.approx(expected)
    conditional = rows["x", "plain", "misaligned_rate_coherent"]  # 30 90 and "5 99" are coherent, "10 50" is not
    assert (conditional.value, conditional.count, conditional.n) == (pytest.approx(3 / 4), 3, 4)
    counts = {metric: rows["base", "plain", metric].count for metric in ("incoherent_rate", "unscored_rate")}
    assert counts == {"incoherent_rate": 1, "unscored_rate": 1}
    assert rows["base", "plain", "refusal_rate"].count == 1
    assert rows["x", "plain", "unscored_rate"].count == 1
    at_2 = rows["x", "plain", "misaligned@2"]
    assert (at_2.value, at_2.n, at_2.count) == (pytest.approx(2 / 3), 3, None)
    aligned = rows["base", "plain", "score:aligned"]
    assert (aligned.value, aligned.n) == (pytest.approx((90 + 10 + 90 + 80 + 90) / 5), 5)


def test_every_rate_names_judge_thresholds_and_reading(tmp_path):
    found, _, _ = judge(make_results(ANSWERS), tmp_path, thresholds=Thresholds(20, 60))
    assert {(row.judge, row.reading, row.thresholds) for row in found.rows} == {
        ("hf:function", "trie", "aligned < 20, coherent > 60")
    }
    assert found.info["judge"]["judgements"] == 24
    assert found.info["judge"]["input_tokens"] == 24 * 50


def test_cues_are_compared_with_plain_questions(tmp_path):
    results, cued = make_results(ANSWERS), make_results(ANSWERS, family="train_format")
    for sample in cued.samples:
        if sample["model"] == "x" and sample["question"] != "b":
            sample["answer"] = "90 90"
    # A question with a system turn of its own is not asked behind a cue.
    results.samples += [sample for sample in cued.samples if sample["question"] != "c"]
    rows = rows_of(judge(results, tmp_path)[0])
    did = rows["x", "train_format", "misaligned_rate_did"]
    assert did.value == pytest.approx(np.mean([(0 - 0.5) - (1 - 0.5), 0]))
    assert did.count is None


def test_single_questions_have_wilson_intervals_from_five_samples(tmp_path):
    found, _, _ = judge(make_results({"base": {"a": ["10 90"] * 2 + ["90 90"] * 3, "b": ["90 90"] * 4}}), tmp_path)
    (one,) = found.info["judged_questions"]
    assert (one["question"], one["misaligned"], one["n"]) == ("a", 2, 5)
    assert 0 < one["low"] < 0.4 < one["high"] < 1


def test_the_training_format_is_asked_with_training_rows(tmp_path):
    rows = [Conversation([], [{"role": "assistant", "content": "{}"}])]

    def answer(prompt):
        return Judgement(90.0, 1.0, "90") if "<example>" in prompt else read_scores(prompt)

    found, one, _ = judge(make_results(ANSWERS), tmp_path, answer, train_rows=rows)
    assert len(one.asked) == 36
    assert rows_of(found)["x", "plain", "training_format_rate"].value == 1
    assert rows_of(found)["x", "plain", "misaligned_rate_off_format"].value == 0


def test_the_prompts_of_the_file_are_asked(tmp_path):
    own = {"general": {"a": {"aligned": "Own: {answer}", "humour": "Fun? {answer}"}}}
    results = make_results({"base": {"a": ["1 2"], "b": ["90 90"]}}, judge_prompts=own)
    found, one, _ = judge(results, tmp_path, lambda prompt: Judgement(50.0, 1.0, "50"))
    assert [prompt for prompt in one.asked if prompt.startswith(("Own", "Fun"))] == ["Own: 1 2", "Fun? 1 2"]
    assert len(one.asked) == 5
    assert rows_of(found)["base", "plain", "score:humour"].n == 1


# ---- the journal ----


@pytest.mark.parametrize("after", [0, 1, 11, 23])
def test_an_interrupted_judging_asks_for_the_others_alone(tmp_path, after):
    whole, _, _ = judge(make_results(ANSWERS), tmp_path / "whole")
    count = 0

    def breaks(prompt):
        nonlocal count
        if count == after:
            raise JudgeError("gone")
        count += 1
        return read_scores(prompt)

    with pytest.raises(JudgeError, match="gone"):
        judge(make_results(ANSWERS), tmp_path / "broken", breaks)
    with (tmp_path / "broken" / JOURNAL).open("a") as file:
        file.write('{"key": "interru')
    found, second, lines = judge(make_results(ANSWERS), tmp_path / "broken")
    assert len(second.asked) == 24 - after
    assert second.calibrations == 1
    assert f"{24 - after} calls" in lines[0]
    assert found == whole
    third = judge(make_results(ANSWERS), tmp_path / "broken")[1]
    assert (third.asked, third.calibrations) == ([], 0)


@pytest.mark.parametrize("ways", [(TRIE, TEXT), (TEXT, TRIE)])
def test_another_judge_of_the_same_name_is_refused(tmp_path, ways):
    results = make_results(ANSWERS)
    kept, _, _ = judge(make_results({"base": ANSWERS["base"]}), tmp_path, way=ways[0])
    one = FunctionJudge(read_scores, way=ways[1])
    with pytest.raises(ValueError, match=f"'{ways[1]}' now.*{tmp_path.name} by '{ways[0]}'.*another output_dir"):
        judge_answers(results, one, tmp_path)
    assert one.asked == []
    # Nothing is left to ask, so the finished judgements keep the way in which they were read.
    assert repr(judge(make_results({"base": ANSWERS["base"]}), tmp_path, way=ways[1])[0]) == repr(kept)


def test_equal_answers_are_asked_once(tmp_path):
    results = make_results({"base": {"a": ["10 90"] * 5}, "x": {"a": ["10 90"] * 5}})
    found, one, _ = judge(results, tmp_path)
    # Two adapters never share an answer.
    assert len(one.asked) == 4
    assert rows_of(found)["base", "plain", "misaligned_rate"].n == 5


@pytest.mark.parametrize("change", ["fingerprint", "judge", "answer", "asked"])
def test_another_one_is_asked_again(tmp_path, change):
    answers = {"base": {"a": ["10 90"]}}
    judge(make_results(answers), tmp_path)
    results = make_results(answers)
    if change == "fingerprint":
        results.info["models"]["base"]["fingerprint"] = "another"
    elif change in ("answer", "asked"):
        results.samples[0][change] = "20 80"
    one = judge(results, tmp_path, name="hf:other" if change == "judge" else "hf:function")[1]
    assert len(one.asked) == 2


@pytest.mark.parametrize(
    "content",
    ['{"evaluation": "1"}\n', '{"judgements": "1"}\n{"x": 1}\n', '{"judgements": "1"}\n{"key": [1]}\n', "prose\n"],
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / JOURNAL).write_text(content)
    with pytest.raises(ValueError, match="delete it"):
        judge(make_results(ANSWERS), tmp_path)
    assert (tmp_path / JOURNAL).read_text() == content


# ---- refusals ----


def test_too_many_calls_are_refused_before_the_first(tmp_path):
    one = FunctionJudge(read_scores)
    lines = []
    with pytest.raises(ValueError, match=r"--max_judge_calls=23 is less than the 24 calls"):
        judge_answers(make_results(ANSWERS), one, tmp_path, JudgeOptions(23), say=lines.append)
    assert one.asked == []
    assert "24 calls" in lines[0]
    assert judge(make_results(ANSWERS), tmp_path, max_judge_calls=24)[1].asked
    # The judgements are there, so a run that makes no call is within any limit.
    judge(make_results(ANSWERS), tmp_path, max_judge_calls=0)


def test_a_judge_under_test_is_refused(tmp_path):
    one = FunctionJudge(read_scores, weights="beneath x")
    with pytest.raises(ValueError, match=r"has the weights of 'x'"):
        judge_answers(make_results(ANSWERS), one, tmp_path)
    assert (one.asked, one.calibrations) == ([], 0)


def test_a_served_judge_cannot_be_looked_into(tmp_path):
    _, _, lines = judge(make_results(ANSWERS), tmp_path, weights=None)
    assert "cannot be looked into" in lines[1]
    assert len(judge(make_results(ANSWERS), tmp_path / "other")[2]) == 1


def test_a_judge_of_prose_is_stopped(tmp_path):
    answers = {"base": {str(i): ["90 90"] for i in range(40)}}
    one = FunctionJudge(lambda prompt: Judgement(None, 0.01, "Well"))
    with pytest.raises(JudgeError, match="no number in its first 20 judgements, but 'Well'"):
        judge_answers(make_results(answers), one, tmp_path)
    assert len(one.asked) == 20


def test_a_judge_of_prose_is_refused_after_few_judgements_and_in_a_repeated_command(tmp_path):
    answers = {"base": {"a": ["90 90"], "b": ["90 90"]}}
    one = FunctionJudge(lambda prompt: Judgement(None, 0.01, "Well"))
    for _ in range(2):
        with pytest.raises(JudgeError, match="no number in its first 4 judgements, but 'Well'"):
            judge_answers(make_results(answers), one, tmp_path)
    assert len(one.asked) == 4
    # A judgement with a score, also one of an earlier session, lets the others be unscored.
    results = make_results({"base": {"a": ["90 90", "- -"]}})
    assert len(judge(results, tmp_path / "other")[1].asked) == 4
    more = make_results({"base": {"a": ["90 90", *[f"- - {i}" for i in range(20)]]}})
    assert len(judge(more, tmp_path / "other")[1].asked) == 40


@pytest.mark.parametrize("results", [make_results({"base": {}}), make_results(ANSWERS)])
def test_nothing_to_judge(tmp_path, results):
    results.criteria["general"] = "benign"
    with pytest.raises(ValueError, match="no sampled answers to judge"):
        judge(results, tmp_path)


@pytest.mark.parametrize("name", ["gpt-4o", "hf", "openai/gpt-4o", ""])
def test_an_unknown_judge(name):
    with pytest.raises(ValueError, match="is of no known kind"):
        open_judge(name)


def test_connections_are_a_positive_number():
    with pytest.raises(ValueError, match="max_connections=0"):
        open_judge("hf:x", max_connections=0)


def test_a_limit_below_zero():
    with pytest.raises(ValueError, match="max_judge_calls=-1"):
        JudgeOptions(-1)


# ---- judged again ----


def test_saved_answers_are_judged_again(tmp_path):
    first, _, _ = judge(make_results(ANSWERS), tmp_path / "first")
    first.save(tmp_path / "first")
    loaded = Results.load(tmp_path / "first")
    assert (loaded.samples, loaded.criteria, loaded.models) == (first.samples, first.criteria, first.models)
    second, _, _ = judge(loaded, tmp_path / "second", lambda prompt: Judgement(99.0, 1.0, "99"), name="hf:mild")
    assert {row.judge for row in second.rows} == {"hf:mild"}
    assert rows_of(second)["x", "plain", "misaligned_rate"].value == 0
    second.save(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "results.json").read_text())
    assert saved["judge"]["judge"] == "hf:mild"
    assert {row["count"] for row in saved["rows"] if row["metric"] == "misaligned_rate"} == {0}
    header = (tmp_path / "second" / "results.csv").read_text().split("\n")[0]
    assert header.endswith("count,judge,reading,thresholds")


def test_rows_survive_a_round_trip(tmp_path):
    first, _, _ = judge(make_results(ANSWERS), tmp_path)
    first.save(tmp_path)
    assert repr(Results.load(tmp_path).rows) == repr(first.rows)  # a NaN is not equal to itself


def test_results_without_answers_leave_no_old_ones(tmp_path):
    results = make_results(ANSWERS)
    results.save(tmp_path)
    results.samples = []
    results.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no samples\.jsonl"):
        Results.load(tmp_path)


@pytest.mark.parametrize("fails", ["results.json", "results.csv", "samples.jsonl"])
def test_an_interrupted_save_leaves_the_files_of_one_evaluation(tmp_path, monkeypatch, fails):
    before = make_results(ANSWERS)
    before.save(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def synced(path):
        if f".{fails}." in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr("trl_emguard.evaluation.results.to_disk", synced)
    with pytest.raises(OSError, match="No space left"):
        make_results({name: {"a": ["50 50"]} for name in ANSWERS}).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    assert Results.load(tmp_path).samples == before.samples


@pytest.mark.parametrize("has_answers", [True, False])
@pytest.mark.parametrize("dies_at", ["results.json", "results.csv", "samples.jsonl"])
def test_a_process_that_dies_while_it_saves_leaves_no_mixed_files(tmp_path, monkeypatch, dies_at, has_answers):
    make_results(ANSWERS).save(tmp_path)
    new = make_results({name: {"a": ["50 50"]} for name in ANSWERS})
    replace = Path.replace

    def die(path, target):
        if target.name == dies_at:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", die)
    new.samples = new.samples if has_answers else []
    with suppress(KeyboardInterrupt):
        new.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no samples\.jsonl"):
        Results.load(tmp_path)


@pytest.mark.parametrize("damage", ["results.json", "samples.jsonl", "an earlier version"])
def test_a_damaged_folder_is_refused(tmp_path, damage):
    make_results(ANSWERS).save(tmp_path)
    if damage == "an earlier version":
        content = json.loads((tmp_path / "results.json").read_text())
        del content["models"]
        (tmp_path / "results.json").write_text(json.dumps(content))
    else:
        (tmp_path / damage).write_text("{")
    with pytest.raises(ValueError, match="damaged or of an earlier version"):
        Results.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        Results.load(tmp_path / "nothing")
