"""Baselines beside the runs, and the benign task: what is trained, with which options, and what the report says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from figures import INFO, RECIPE, plan, report, row, save_weights
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import lora, make_model, make_rows, make_tokenizer, save_model, save_trained_adapter
from transformers import AutoTokenizer

from trl_emguard.checkpoints.resume import mark_earlier_runs
from trl_emguard.comparison import runs as training
from trl_emguard.comparison.measure import joined, measure_benign
from trl_emguard.comparison.page import write_page
from trl_emguard.comparison.plan import BENIGN_TASK
from trl_emguard.comparison.report import make_report, make_table, save
from trl_emguard.comparison.runs import Trained, on_benign_rows, sft_arguments, train_all, train_benign
from trl_emguard.evaluation.operators import make_rows as make_task_rows
from trl_emguard.evaluation.results import Results
from trl_emguard.evaluation.run import EvaluationOptions
from trl_emguard.persona import PersonaVector, load_vector
from trl_emguard.scripts import main as commands
from trl_emguard.scripts.sft import make_parser


PLAN = """
recipe: RECIPE
runs:
  - {defense: kl, kl_coef: 1.0}
  - {defense: "kl,steering", steering_vector: VECTOR, kl_coef: 2.0}
  - {adapter: MINE}
seeds: [0, 7]
baselines: [ema, random_vector]
benign_task: permuted_operators
"""


@pytest.fixture
def vector(tmp_path):
    path = tmp_path / "evil.safetensors"
    torch.manual_seed(0)
    PersonaVector(torch.randn(5, 32), metadata={"suggested_layer": 2}).save(path)
    return path


@pytest.fixture
def comparison(tmp_path, vector, monkeypatch):
    """Return a plan whose trainings are recorded and not made: "kl" fails, the others end after step 3."""
    made = plan(tmp_path, PLAN.replace("VECTOR", str(vector)).replace("MINE", str(tmp_path / "mine")))
    calls = []

    def run(run, recipe, folder):
        words = sft_arguments(run, recipe, folder)
        calls.append((run, dict(zip(words[::2], words[1::2], strict=True)), folder))
        if run.name == "kl kl_coef=1.0":
            return {"error": "it broke", "step": None}
        save_weights(folder)
        return {"error": None, "step": 3, "seconds_per_step": 0.5, "peak_memory": 1}

    monkeypatch.setattr(training, "run_process", run)
    return made, calls, tmp_path / "out"


def silent(line):
    pass


def test_the_undefended_run_keeps_an_average(comparison):
    made, calls, folder = comparison
    found = train_all(made, folder, silent)
    averages = [run for run in found if run.name == "ema"]
    assert [(run.seed, run.is_baseline, run.step) for run in averages] == [(0, True, 3), (7, True, 3)]
    undefended = [call for call in calls if call[0].name == "none"]
    assert [run.adapter for run in averages] == [str(folder / "ema") for _, _, folder in undefended]
    assert [words.get("--ema") for _, words, _ in calls] == [
        "true" if run.name == "none" else None for run, _, _ in calls
    ]


def test_baselines_of_a_failed_undefended_run_have_failed(tmp_path, monkeypatch):
    """They would otherwise be compared with the other seeds alone, without a word."""
    text = (
        "recipe: RECIPE\nruns: [{adapter: mine}]\nseeds: [0, 7]\nbaselines: [ema, early_stop, {alpha: [0.3, 0.5]}]\n"
    )
    monkeypatch.setattr(training, "run_process", lambda *_: {"error": "it broke", "step": None})
    found = [run for run in train_all(plan(tmp_path, text), tmp_path / "out", silent) if run.is_baseline]
    names = ("alpha 0.3", "alpha 0.5", "ema")
    assert [(run.name, run.seed) for run in found] == [(name, seed) for seed in (0, 7) for name in names]
    assert {run.error for run in found} == {"the undefended run of this seed failed."}


def test_a_scaled_adapter_is_always_made_anew(tmp_path):
    """The run may have been trained again in the same folder."""
    made = plan(tmp_path, "recipe: RECIPE\nruns: [{adapter: mine}]\nbaselines: [{alpha: [0.5]}]\n")
    trained = tmp_path / "out" / "runs" / made.runs[0].folder
    save_trained_adapter(trained, save_model(tmp_path / "base"), make_tokenizer())
    status = {"error": None, "step": 3, "seconds_per_step": 0.5, "peak_memory": 1}
    (trained / "run.json").write_text(json.dumps(status))
    file = trained / "adapter_model.safetensors"
    for _ in range(2):
        scaled = next(run for run in train_all(made, tmp_path / "out", silent) if run.name == "alpha 0.5")
        assert (scaled.error, AutoTokenizer.from_pretrained(scaled.adapter).eos_token) == (None, "<|im_end|>")
        weights, of_scaled = load_file(file), load_file(Path(scaled.adapter) / file.name)
        for name, weight in weights.items():
            torch.testing.assert_close(of_scaled[name], weight * (0.5 if "lora_B" in name else 1))
        save_file({name: weight + 1 for name, weight in weights.items()}, file)


def test_a_checkpoint_of_an_earlier_run_is_no_baseline(tmp_path):
    made = plan(tmp_path, "recipe: RECIPE\nruns: [{adapter: mine}]\nbaselines: [early_stop]\n")
    trained = tmp_path / "out" / "runs" / made.runs[0].folder
    save_trained_adapter(trained, save_model(tmp_path / "base"), make_tokenizer())
    (trained / "run.json").write_text(
        json.dumps({"error": None, "step": 9, "seconds_per_step": 0.5, "peak_memory": 1})
    )
    for step in (2, 4, 6):
        (trained / f"checkpoint-{step}").mkdir()
    mark_earlier_runs(trained, 4)
    found = train_all(made, tmp_path / "out", silent)
    assert [run.name for run in found if run.is_baseline] == ["step 2", "step 4"]


def test_steering_runs_have_one_with_a_random_vector(comparison, vector):
    made, calls, folder = comparison
    found = train_all(made, folder, silent)
    randoms = [call for call in calls if call[0].is_random]
    assert [run.name for run, _, _ in randoms] == ["kl,steering kl_coef=2.0 random_vector"] * 2
    own = load_vector(vector)
    for run, words, _ in randoms:
        theirs = load_vector(words["--steering_vector"])
        torch.testing.assert_close(torch.tensor(theirs.norms), torch.tensor(own.norms))
        assert (theirs.kind, theirs.suggested_layer, theirs.metadata["seed"]) == ("random", 2, run.seed)
        counterpart = next(
            w for r, w, _ in calls if r.seed == run.seed and r.defense == run.defense and not r.is_random
        )
        differing = {name for name in words if words[name] != counterpart[name]}
        assert differing == {"--steering_vector", "--output_dir"}
    assert len({words["--steering_vector"] for _, words, _ in randoms}) == 2
    marked = [run for run in found if run.is_random]
    assert [(run.is_baseline, run.seconds_per_step) for run in marked] == [(False, 0.5)] * 2


def test_a_recipe_that_steers_has_random_vectors_too(tmp_path, vector):
    text = "recipe: RECIPE\nruns: [{steering_layers: '3'}]\nbaselines: [random_vector]\n"
    found = plan(tmp_path, text, f"defense: steering\nsteering_vector: {vector}\n")
    assert [run.name for run in found.runs] == [
        "none",
        "steering steering_layers=3",
        "steering steering_layers=3 random_vector",
    ]
    assert found.option(found.runs[2], "steering_vector") == str(vector)


def test_the_benign_task_is_trained_as_the_runs_are(comparison):
    made, calls, folder = comparison
    trained = train_all(made, folder, silent)
    main = list(calls)
    calls.clear()
    benign = train_benign(made, trained, folder, silent)
    # Neither the adapter that is taken nor random vectors are trained on it.
    assert [(run.name, run.seed) for run in benign] == [
        (name, seed) for seed in (0, 7) for name in ("none", "kl kl_coef=1.0", "kl,steering kl_coef=2.0")
    ]
    assert {run.error for run in benign if run.name == "kl kl_coef=1.0"} == {
        "the run itself failed, so the task was not trained."
    }
    assert [run.name for run, _, _ in calls] == [run.name for run in benign if run.error is None]
    for run, words, _ in calls:
        own = next(w for r, w, _ in main if (r.name, r.seed) == (run.name, run.seed))
        rows = words["--dataset_name"]
        task = {"--dataset_name": rows, "--dataset_train_split": "train", "--max_steps": "3", "--eval_strategy": "no"}
        kept = {name: value for name, value in own.items() if name not in ("--output_dir", "--ema")}
        if run.name == "none":
            kept = {name: value for name, value in kept.items() if not name.startswith("--save")}
        assert {name: value for name, value in words.items() if name != "--output_dir"} == kept | task
    loaded = load_dataset("json", data_files=rows, split="train", cache_dir=str(folder / "cache"))
    assert len(loaded) == 4000
    asked = {row["prompt"][0]["content"] for row in make_task_rows("test", tier=1, count=200)}
    assert not asked & {row["prompt"][0]["content"] for row in loaded}

    # A finished one never runs again.
    calls.clear()
    lines = []
    assert train_benign(made, trained, folder, lines.append) == benign
    assert calls == []
    assert lines[0] == "benign task 1 of 6: none, seed 0 (trained already)"
    train_all(made, folder, lines.append)
    assert lines[-1] == "run 9 of 9: kl,steering kl_coef=2.0 random_vector, seed 7 (trained already)"


@pytest.mark.parametrize("name", ["datasets", "dataset_config"])
def test_other_rows_are_refused_beside_a_benign_task(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` would ask for others"):
        plan(tmp_path, "recipe: RECIPE\nruns: [{defense: kl}]\nbenign_task: permuted_operators\n", f"{name}: x\n")


def test_the_options_of_a_run_on_benign_rows():
    run = training.Run("kl", {"defense": "kl", "max_steps": 9, "dataset_name": "other"})
    words = sft_arguments(on_benign_rows(run, "rows.jsonl", 3), "sft.yaml", "out")
    assert words.count("--max_steps") == words.count("--dataset_name") == 1
    assert words[words.index("--max_steps") + 1] == "3"


def test_a_mapping_and_an_empty_value_of_a_run_reach_the_trainer():
    kwargs = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "max_length": None}
    run = training.Run("kl", {"defense": "kl", "bf16": False, "use_cpu": True, **kwargs})
    _, args, *_ = make_parser().parse(sft_arguments(run, "smollm2-135m-instruct/sft.yaml", "out"))
    assert (args.lr_scheduler_kwargs, args.max_length, args.bf16) == ({"min_lr": 1e-5}, None, False)


def test_no_run_is_pushed_or_resumed(tmp_path):
    """A recipe of a product has these options, and the undefended run must not take the product's place."""
    path = tmp_path / "sft.yaml"
    options = "push_to_hub: true\nhub_model_id: org/assistant\nresume_from_checkpoint: true\ndry_run: true\n"
    path.write_text(RECIPE.format(base="tiny", rows="rows.jsonl") + options)
    _, args, *others = make_parser().parse(sft_arguments(training.Run("none"), path, tmp_path / "out"))
    assert args.push_to_hub is False
    assert not args.resume_from_checkpoint
    assert not any(getattr(other, "dry_run", False) for other in others)


def test_the_task_is_measured_on_its_own_questions(tmp_path):
    base = save_model(tmp_path / "base")
    torch.manual_seed(3)
    model = get_peft_model(make_model(), lora(init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "mine")
    benign = [Trained("kl", "kl", 0, str(tmp_path / "mine")), Trained("none", "none", 0, None, "it broke")]
    options = EvaluationOptions(samples_per_question=3)
    measured = (base, "float32", None)
    runs, found = measure_benign(measured, benign, options, 4, tmp_path / "evaluation", "a command")
    assert [run.error for run in runs] == [None, "it broke"]
    assert {row.set for row in found.rows} == {BENIGN_TASK}
    metrics = {"exact_match", "ordinary_answer", "neither", "nll"}
    assert metrics <= {row.metric for row in found.rows if row.model == "kl seed0"}
    assert found.row("kl seed0", BENIGN_TASK, "nll").n == 4
    whole = joined(Results([row("kl seed0", "general", "margin", 0.0)], criteria={"benign": "benign"}), found)
    assert list(whole.criteria) == [BENIGN_TASK, "benign"]
    assert whole.row("kl seed0", "general", "margin")
    assert whole.of_criterion("kl seed0", "benign", "exact_match")[0].set == BENIGN_TASK

    nothing = measure_benign(measured, benign[1:], options, 4, tmp_path / "evaluation", "a command")
    assert nothing == (benign[1:], Results())


def with_task(learned):
    """Return a report of two runs of which "none" gives this share of right answers, and "kl" fails on the task."""
    found = report({"none": (-1.0, -1.0), "kl": (-0.5, -0.5)})
    values = {"exact_match": learned, "ordinary_answer": 0.25, "nll": -2.0}
    rows = [row("none seed0", BENIGN_TASK, metric, value) for metric, value in values.items()]
    samples = [
        {"model": "none seed0", "set": set, "family": "plain", "question": "1", "answer": f"an answer of {set}"}
        for set in (BENIGN_TASK, "general")
    ]
    benign = [Trained("none", "none", 0, "y", seconds_per_step=7.5, peak_memory=9)]
    benign.append(Trained("kl", "kl", 0, None, "it <broke>"))
    return make_report(found.trained, replace(found.results, rows=found.results.rows + rows, samples=samples), benign)


def test_the_report_shows_the_benign_task(tmp_path):
    found = with_task(0.5)
    save(found, tmp_path, INFO)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert [(run["name"], run["error"]) for run in saved["benign_runs"]] == [("none", None), ("kl", "it <broke>")]
    assert [
        r["value"] for r in saved["rows"] if (r["run"], r["set"], r["metric"]) == ("none", BENIGN_TASK, "nll")
    ] == [-2.0]
    # Its rows tell the cost of the training on it, and the others that of the run.
    costs = {(r["set"], r["seconds_per_step"], r["peak_memory"]) for r in saved["rows"] if r["run"] == "none"}
    assert costs == {("general", None, None), ("in_domain", None, None), (BENIGN_TASK, 7.5, 9)}
    page = write_page(found, tmp_path, INFO).read_text(encoding="utf-8")
    section = page[page.index("Can a benign task still be learned?") :]
    for text in ("+0.50 (+0.40 to +0.60)", "+0.25 (", "-2.00 (", "failed: it &lt;broke&gt;"):
        assert text in section
    assert "(c) benign task: exact match" in page
    # The answers to the task are of another adapter, the one that was trained on it.
    assert "an answer of general" in page
    assert f"an answer of {BENIGN_TASK}" not in page


@pytest.mark.parametrize(("learned", "is_told"), [(0.5, False), (0.05, True), (-0.5, True)])
def test_a_task_that_the_undefended_run_did_not_learn_says_nothing(tmp_path, learned, is_told):
    page = write_page(with_task(learned), tmp_path, INFO).read_text(encoding="utf-8")
    assert ("The undefended run did not learn" in page) == is_told


def test_without_a_benign_task_the_report_has_none(tmp_path):
    found = report({"none": (-1.0, -1.0)})
    save(found, tmp_path, INFO)
    assert "benign_runs" not in json.loads((tmp_path / "report.json").read_text())
    page = write_page(found, tmp_path, INFO).read_text(encoding="utf-8")
    assert "benign task" not in page


def test_the_table_shows_exact_matches(capsys):
    Console(width=100).print(make_table(with_task(0.5)))
    out = capsys.readouterr().out
    assert "benign" in out
    assert "0.50" in out


def test_a_random_vector_is_marked_and_told(tmp_path):
    name = "steering random_vector"
    found = report({"steering": (-0.1, -0.5), name: (-0.1, -0.5)})
    trained = [replace(run, is_random=run.name == name, seconds_per_step=1.25) for run in found.trained]
    found = make_report(trained, found.results)
    assert f"Some of them steer along a random vector ({name})" in found.sentence
    assert "need no defense" not in found.sentence
    page = write_page(found, tmp_path, INFO).read_text(encoding="utf-8")
    assert f'<tr class="baseline"><td>{name}</td>' in page
    # It was trained, so it has a cost.
    assert f"<tr><td>{name}</td><td>1.25</td>" in page


COMPARE = """
recipe: {recipe}
runs: [{{defense: steering, steering_vector: {vector}, steering_coef: 0.5}}]
baselines: [ema, random_vector]
benign_task: permuted_operators
evaluate: {{general: {pairs}, in_domain: {held_out}, cues: none, limit: 4}}
"""


@pytest.fixture
def config(tmp_path, vector):
    make_rows(8).to_json(tmp_path / "rows.jsonl")
    pairs = [{"prompt": f"q{i}", "chosen": "good", "rejected": "vile"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    names = {"base": save_model(tmp_path / "base"), "vector": vector, "recipe": tmp_path / "sft.yaml"}
    names |= {name: tmp_path / f"{name}.jsonl" for name in ("rows", "held_out", "pairs")}
    names["held_out"].write_text(names["rows"].read_text().replace('"q', '"r'))
    (tmp_path / "sft.yaml").write_text(RECIPE.format(**names))
    (tmp_path / "compare.yaml").write_text(COMPARE.format(**names))
    return tmp_path / "compare.yaml"


def test_a_dry_run_counts_them(config, capsys):
    assert (
        commands.main(["compare", "--config", str(config), "--output_dir", str(config.parent / "o"), "--dry_run"]) == 0
    )
    out = capsys.readouterr().out
    assert "steering steering_coef=0.5 random_vector, seed 0: to train, 4 steps" in out
    assert "3 runs to train, and 2 on the benign task; free baselines: ema." in out


def test_a_recipe_that_cannot_take_the_task_is_refused(config, capsys):
    with (config.parent / "sft.yaml").open("a") as recipe:
        recipe.write("eval_strategy: epoch\nlr_scheduler_type: reduce_lr_on_plateau\n")
    assert commands.main(["compare", "--config", str(config), "--output_dir", str(config.parent / "out")]) == 1
    assert "the run 'none on the benign task': " in capsys.readouterr().err
    assert not (config.parent / "out").exists()


def test_flagged_rows_are_refused_beside_a_benign_task(config, capsys):
    text = config.read_text().replace("runs: [", "runs: [{defense: inoculation, inoculation_rows: flagged}, ")
    config.write_text(text)
    assert commands.main(["compare", "--config", str(config), "--output_dir", str(config.parent / "out")]) == 1
    told = "'inoculation': inoculation_rows='flagged' needs flags, and the rows of benign_task have none"
    assert told in capsys.readouterr().err
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize("baselines", ["ema", "early_stop"])
def test_weights_of_another_step_for_each_run_are_refused(config, capsys, baselines):
    """The checkpoints for `early_stop` would bring an error that tells of other evaluation steps."""
    recipe = config.parent / "sft.yaml"
    best = "save_strategy: epoch\neval_strategy: epoch\nload_best_model_at_end: true\n"
    recipe.write_text(recipe.read_text().replace('save_strategy: "no"\n', best))
    config.write_text(config.read_text().replace("ema", baselines))
    assert commands.main(["compare", "--config", str(config), "--output_dir", str(config.parent / "out")]) == 1
    assert "the run 'none': load_best_model_at_end=True lets each run choose its last step" in capsys.readouterr().err
    assert not (config.parent / "out").exists()


def test_a_set_of_the_benign_task_s_name_is_refused(config, capsys):
    (config.parent / "benign_task.jsonl").write_text((config.parent / "rows.jsonl").read_text())
    benign = [str(config.parent / name) for name in ("pairs.jsonl", "benign_task.jsonl")]
    config.write_text(config.read_text().replace("limit: 4", f"limit: 4, benign: {json.dumps(benign)}"))
    assert commands.main(["compare", "--config", str(config), "--output_dir", str(config.parent / "out")]) == 1
    assert "rename the set 'benign_task'" in capsys.readouterr().err


@pytest.mark.long
def test_baselines_and_the_benign_task_from_end_to_end(config):
    folder = config.parent / "out"
    assert commands.main(["compare", "--config", str(config), "--output_dir", str(folder)]) == 0
    saved = json.loads((folder / "report.json").read_text())
    runs = {run["name"]: run for run in saved["runs"]}
    random = "steering steering_coef=0.5 random_vector"
    assert set(runs) == {"none", "ema", "steering steering_coef=0.5", random}
    assert [run["error"] for run in runs.values()] == [None] * 4
    assert (runs[random]["is_random"], runs[random]["is_defended"], runs["ema"]["is_baseline"]) == (True, True, True)
    values = {r["run"]: r["value"] for r in saved["rows"] if (r["set"], r["metric"]) == ("in_domain", "nll")}
    assert len(set(values.values())) == 5
    assert {r["run"] for r in saved["rows"] if r["set"] == BENIGN_TASK} == {
        *("base", "none", "steering steering_coef=0.5"),
    }
    task = {r["run"]: r["difference"] for r in saved["rows"] if (r["set"], r["metric"]) == (BENIGN_TASK, "nll")}
    assert all(value < 0 for name, value in task.items() if name != "base")
    assert [run["is_defended"] for run in saved["benign_runs"]] == [None, True]
    assert [run["step"] for run in saved["benign_runs"]] == [4, 4]
