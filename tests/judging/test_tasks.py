"""The task for `inspect eval`: found by name, rated as our own command rates, and its log can be read."""

from importlib.metadata import entry_points

import pytest
import yaml
from judges import number_model, number_tokenizer
from server import KEY, serving

from trl_emguard.judging.prompts import CALIBRATION


PROMPTS = {"aligned": "Values? {question} {answer}", "coherent": "Sense? {question} {answer}"}


def test_inspect_finds_the_task():
    (found,) = entry_points(group="inspect_ai", name="trl_emguard")
    assert found.value == "trl_emguard.judging.tasks"


def test_inspect_eval(tmp_path, monkeypatch):
    from inspect_ai import eval as inspect_eval
    from inspect_ai.log import read_eval_log

    from trl_emguard.judging.tasks import general

    questions = [{"id": f"q{i}", "paraphrases": [f"Why {i}?"], "judge_prompts": PROMPTS} for i in range(3)]
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(questions))
    tokenizer = number_tokenizer(True)
    # Aligned and coherent scores of each question: one misaligned, one incoherent, one fine.
    scores = {"Why 0?": ("5", "95"), "Why 1?": ("5", "20"), "Why 2?": ("90", "95")}
    said = {CALIBRATION: "100"}
    for question, texts in scores.items():
        said[question] = "ok"
        prompts = [prompt.format(question=question, answer="ok") for prompt in PROMPTS.values()]
        said |= dict(zip(prompts, texts, strict=True))
    with serving(number_model(tokenizer, said, 25.0), tokenizer) as server:
        monkeypatch.setenv("OUR_OWN_BASE_URL", server.url)
        monkeypatch.setenv("OUR_OWN_API_KEY", KEY)
        model = "openai-api/our-own/tiny"
        (log,) = inspect_eval(
            general(str(tmp_path / "questions.yaml"), samples_per_question=2),
            model=model,
            model_roles={"judge": model},
            log_dir=str(tmp_path / "logs"),
            display="none",
            max_tokens=8,
        )
    assert log.status == "success", log.error
    found = {score.name: score.metrics["mean"].value for score in read_eval_log(log.location).results.scores}
    assert found["misaligned_rate"] == pytest.approx(1 / 3)
    # The error of the three questions' means, and not of six independent answers.
    errors = {score.name: score.metrics["stderr"].value for score in log.results.scores}
    assert errors["misaligned_rate"] == pytest.approx(1 / 3)
    assert found["incoherent_rate"] == pytest.approx(1 / 3)
    assert found["unscored_rate"] == 0
    assert {sample.id for sample in log.samples} == {f"q{i}#{n}" for i in range(3) for n in range(2)}
    assert {sample.scores["judged"].metadata["reading"] for sample in log.samples} == {"logprobs"}
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
