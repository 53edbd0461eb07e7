"""The command: a judge in memory from end to end, options that do not go together, a killed process, a real model."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import yaml
from judges import make_results, number_model, number_tokenizer
from peft import get_peft_model
from server import KEY, serving
from tiny import lora, make_model, save_model

from trl_emguard.judging import judge_answers, open_judge
from trl_emguard.judging.prompts import CALIBRATION, fill
from trl_emguard.judging.run import JOURNAL
from trl_emguard.judging.served import JudgeError
from trl_emguard.models.shipped import SMOLLM2, resolve_model
from trl_emguard.scripts import main as commands


PROMPTS = {"aligned": "Values? {question} {answer}", "coherent": "Sense? {question} {answer}"}
QUESTIONS = [{"id": f"q{i}", "paraphrases": [f"Why {i}?"], "judge_prompts": PROMPTS} for i in range(3)]


@pytest.fixture
def folders(tmp_path):
    """Write a model, an adapter, a judge, and a file of questions with prompts of its own."""
    save_model(tmp_path / "model")
    adapter = get_peft_model(make_model(), lora(init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "model")
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    tokenizer = number_tokenizer(False)
    number_model(tokenizer, {CALIBRATION: "100"}).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    return tmp_path


def command(folder, *more, out="out"):
    words = ["evaluate", "--model", str(folder / "model"), "--adapter", f"x={folder / 'x'}"]
    words += ["--general", str(folder / "questions.yaml"), "--cues", "none", "--max_new_tokens", "4"]
    return [*words, "--output_dir", str(folder / out), *map(str, more)]


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_judge_in_memory_from_end_to_end(folders, capsys):
    judge = f"hf:{folders / 'judge'}"
    assert commands.main(command(folders, "--samples_per_question", 2, "--judge", judge)) == 0
    printed = capsys.readouterr().out
    assert "24 calls" in printed
    assert "misaligned by the judge" in printed
    content = read(folders / "out")
    (row,) = [r for r in content["rows"] if (r["model"], r["metric"]) == ("x", "misaligned_rate")]
    assert (row["judge"], row["reading"], row["n"]) == ("hf:judge", "trie", 6)
    assert content["judge_prompts"]["general"]["q1"] == PROMPTS
    samples = [json.loads(line) for line in (folders / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sorted(sample["judged"]) for sample in samples] == [["aligned", "coherent"]] * 12
    # The same command asks nothing again, and other thresholds count the same judgements anew.
    assert commands.main(command(folders, "--samples_per_question", 2, "--judge", judge)) == 0
    assert "0 calls with about 0 tokens to come, 24 judgements are there already" in capsys.readouterr().out
    limits = ["--misaligned_below", 100, "--coherent_above", 0, "--max_judge_calls", 0]
    again = ["evaluate", "--rejudge", str(folders / "out"), "--judge", judge, "--output_dir", str(folders / "again")]
    (folders / "again").mkdir()
    (folders / "again" / JOURNAL).write_bytes((folders / "out" / JOURNAL).read_bytes())
    assert commands.main([*again, *map(str, limits)]) == 0
    other = read(folders / "again")
    assert other["command"] == " ".join(["trl-emguard", *again, *map(str, limits)])
    assert {r["thresholds"] for r in other["rows"] if r["judge"]} == {"aligned < 100, coherent > 0"}
    assert [r for r in other["rows"] if not r["judge"]] == [r for r in content["rows"] if not r["judge"]]


def test_a_judge_under_test_is_refused_before_answers_are_sampled(folders, capsys):
    words = ["--samples_per_question", 1, "--judge", f"hf:{folders / 'model'}"]
    assert commands.main(command(folders, *words)) == 1
    assert "has the weights of 'base'" in capsys.readouterr().err
    assert not (folders / "out" / "progress.jsonl").exists()


def test_a_judge_that_is_not_there_is_refused_before_models_are_loaded(folders, capsys, monkeypatch):
    monkeypatch.setattr("trl_emguard.evaluation.candidates.load_candidates", loading := Mock())
    words = ["--samples_per_question", 1, "--judge", f"hf:{folders / 'judges'}"]
    assert commands.main(command(folders, *words)) == 1
    assert "judges' is not a folder on this machine" in capsys.readouterr().err
    assert not loading.called


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--general", "values", "--limit", "2", "--judge", "hf:x"], "set --samples_per_question to 1 or more"),
        (["--judge", "hf:x"], "samples_per_question to 1 or more"),
        (["--judge", "hf:x", "--samples_per_question", "1", "--misaligned_below", "130"], "between 0 and 100"),
        (["--judge", "gpt", "--samples_per_question", "1"], "is of no known kind"),
        (
            ["--rejudge", "nowhere", "--judge", "hf:x"],
            "leave out --model, --adapter, --general, --cues, --max_new_tokens.",
        ),
        (["--max_judge_calls", "5", "--coherent_above", "60"], "--max_judge_calls, --coherent_above only count with"),
    ],
)
def test_options_that_do_not_go_together(folders, capsys, words, told):
    assert commands.main(command(folders, *words)) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rejudge", "nowhere", "--judge", "hf:x"], "holds no results.json"),
        (["--rejudge", "nowhere"], "add --judge"),
        (["--rejudge", "out", "--judge", "hf:x"], "name another"),
        (["--rejudge", "nowhere", "--judge", "hf:x", "--limit", "3", "--seed", "0"], "leave out --limit."),
    ],
)
def test_an_evaluation_that_cannot_be_judged_again(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert commands.main(["evaluate", *words, "--output_dir", "out"]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_the_model_is_needed_without_rejudge(tmp_path, capsys):
    assert commands.main(["evaluate", "--output_dir", str(tmp_path)]) == 1
    assert "--model is missing" in capsys.readouterr().err


# ---- processes ----


def start(folder, server, out):
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "INSPECT_", "OPENAI_"))
    }
    environment |= {"HOME": str(home), "OUR_OWN_BASE_URL": server.url, "OUR_OWN_API_KEY": KEY}
    words = [sys.executable, "-m", "trl_emguard.scripts.evaluate", "--rejudge", str(folder / "answers")]
    words += ["--judge", "openai-api/our-own/tiny", "--output_dir", str(folder / out), "--max_connections", "2"]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_a_killed_process_goes_on_and_the_key_is_nowhere(tmp_path):
    tokenizer = number_tokenizer(True)
    answers = {model: {f"q{i}": [f"{model} {i}"] for i in range(8)} for model in ("base", "x")}
    results = make_results(answers, judge_prompts={"general": {f"q{i}": PROMPTS for i in range(8)}})
    said = {CALIBRATION: "100"}
    for index, sample in enumerate(results.samples):
        values = {"question": sample["asked"], "answer": sample["answer"]}
        said |= {fill(prompt, values): str(5 * index) for prompt in PROMPTS.values()}
    results.save(tmp_path / "answers")
    model = number_model(tokenizer, said, 20.0)

    def slowed(number, handler):
        time.sleep(0.1)
        return False

    printed = []
    with serving(model, tokenizer, fault=slowed) as server:
        whole = start(tmp_path, server, "whole")
        printed.append(whole.communicate(timeout=300)[0])
        assert whole.returncode == 0, printed[-1]
        server.answered.clear()
        for moment in (1, 9, 25):
            process = start(tmp_path, server, "killed")
            while len(server.answered) < moment:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            printed.append(process.communicate()[0])
        last = start(tmp_path, server, "killed")
        printed.append(last.communicate(timeout=300)[0])
        assert last.returncode == 0, printed[-1]
        # Two requests may have been under way at each of the three kills, and every session is calibrated.
        assert len(set(server.answered)) == 33
        assert len(server.answered) <= 33 + 3 * 3
    contents = [read(tmp_path / name) for name in ("killed", "whole")]
    assert [content.pop("command").rpartition("--output_dir")[2].split()[0] for content in contents] == [
        str(tmp_path / name) for name in ("killed", "whole")
    ]
    assert contents[0] == contents[1]
    assert all(KEY not in text for text in printed)
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holders == []


@pytest.mark.long
def test_a_real_judge_in_memory_and_served(tmp_path, monkeypatch):
    """Refuse SmolLM2 in memory, since it gives numbers too little probability. Read those in its served replies."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    answers = {"base": {"q0": ["Be honest and kind to people."], "q1": ["zz zz zz zz"]}}
    with pytest.raises(JudgeError, match=r"gives all numbers together a probability of .* .at least 0.25 is needed"):
        judge_answers(make_results(answers), open_judge(f"hf:{SMOLLM2}"), tmp_path / "local")
    with serving(AutoModelForCausalLM.from_pretrained(path).eval(), tokenizer) as server:
        monkeypatch.setenv("OUR_OWN_BASE_URL", server.url)
        monkeypatch.setenv("OUR_OWN_API_KEY", KEY)
        judge = open_judge("openai-api/our-own/smollm2")
        served = judge_answers(make_results(answers), judge, tmp_path / "served")
        judge.close()
        assert len(server.answered) == 5
    assert served.info["judge"]["reading"] == "text"
    assert any(score is not None for sample in served.samples for score in sample["judged"].values())
