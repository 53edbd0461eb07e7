"""Test that the benchmarks run, compare what they claim to compare, and make their page. No timing is checked."""

import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from methods import KINDS
from peft import get_peft_model
from tiny import lora, make_model

from trl_emguard.evaluation.questions import load_questions
from trl_emguard.io.files import locked


ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
harness, head, report, steps = map(import_module, ("harness", "head", "report", "steps"))
comparing, em, testbed = map(import_module, ("comparing", "em", "testbed"))


@pytest.fixture(scope="module")
def tiny():
    """Return a point small enough to train on in a test."""
    steps.SHAPES["tiny"] = {
        "vocab_size": 8192,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    yield steps.Point("tiny", "lora", 2, 12, (*steps.MAIN, "paper kl", "paper ldifs", "two kernels"))
    del steps.SHAPES["tiny"]


def test_every_kind_of_defense_is_measured():
    assert {*KINDS} - {"none"} <= {*steps.POINTS["cpu"][0].variants}
    assert {name for points in steps.POINTS.values() for point in points for name in point.variants} <= {
        *steps.RATIO_TO
    }


def test_memory_is_counted():
    def call():
        a = torch.empty(1000, 250)
        b = a.exp()
        del a
        b.exp()

    assert harness.peak_memory(call, "cpu") == 2_000_000


def test_calls_are_made_in_turn():
    made = []
    seconds = harness.time_in_turn({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 3, "cpu")
    assert made == ["a", "b"] * 3
    columns = harness.statistics({"a": [3.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0], "c": [1.0, 1.0, 1.0]}, "a", ("b", "c"))
    assert (columns["seconds"], columns["ratio"], columns["ratio_to"]) == ("4", "1.333", "b + c")
    assert len(seconds["a"]) == 3


def test_other_ways_to_write_kl_train_alike(tiny, tmp_path):
    """Compare adapters after three steps: `kl` equals TRL's two kernels and differs from plain training."""
    base = steps.load_base(tiny, "cpu")
    tokenizer = steps.AutoTokenizer.from_pretrained(steps.smollm2())
    trainers = {
        name: steps.make_trainer(name, tiny, base, tokenizer, str(tmp_path), "cpu")
        for name in ("stock", "kl", "two kernels")
    }
    weights = {}

    def train():
        # Adam would hide the coefficient's small share in a step.
        trainers["kl"].defenses[0].coef = steps.KL_COEF
        for name, trainer in trainers.items():
            for _ in range(3):
                steps.make_step(trainer)
            weights[name] = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "KL_COEF", 100.0)
        steps.while_training(list(trainers.values()), train)
    moved = (weights["kl"] - weights["stock"]).norm()
    assert (weights["kl"] - weights["two kernels"]).norm() < 1e-2 * moved


@pytest.mark.long
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_point_is_measured(tiny, tuning):
    point = steps.replace(
        tiny, tuning=tuning, variants=tuple(v for v in tiny.variants if tuning == "lora" or v != "two kernels")
    )
    rows = {row["variant"]: row for row in steps.measure(point, 1, "cpu")}
    assert list(rows) == list(point.variants)
    for name, row in rows.items():
        assert bool(row["seconds"]) != bool(row["note"]), name
        assert row["tokens"] in ("", 24)
    # Both a second model and a frozen copy are held.
    assert rows["paper kl"]["held_mib"] > rows["stock"]["held_mib"]
    assert (rows["kl"]["held_mib"] > rows["stock"]["held_mib"]) == (tuning == "full")


def test_rows_of_the_real_model_are_as_stated():
    tokenizer = steps.AutoTokenizer.from_pretrained(steps.smollm2())
    point = steps.POINTS["cpu"][0]
    lengths, labels = [], 0
    for row in steps.make_rows(point, tokenizer):
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        lengths.append(len(whole))
        labels += len(whole) - len(prompt)
    assert (point.batch, point.length) == (8, 124)
    assert max(lengths) == 124
    assert abs(sum(lengths) - 970) <= 10
    assert abs(labels - 600) <= 20


def test_the_page(tmp_path):
    """Make tables, verdicts and pictures from invented rows. Without rows, the page says that nothing was measured."""
    shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path)
    page, results = tmp_path / "benchmarks.md", tmp_path / "results"
    report.write_page(results, tmp_path)
    assert page.read_text().count("not measured: no GPU was at hand") == 4
    assert "reached |" not in page.read_text()

    where = harness.environment("cpu")
    seconds = {"stock": 4.0, "reference forward": 1.0, "kl": 4.9, "paper kl": 12.0, "ldifs": 6.0, "two kernels": 8.0}
    point = {"model": "smollm2-135m-instruct", "layers": 30, "tuning": "lora", "batch": 8, "length": 124}
    rows = []
    for name, time in seconds.items():
        over = steps.RATIO_TO[name]
        columns = harness.statistics({other: [value] * 3 for other, value in seconds.items()}, name, over)
        columns |= {"tokens": 970, "labels": 600, "tokens_per_second": 970 / time, "held_mib": 100.0, "step_mib": 50.0}
        rows.append(point | {"variant": name} | columns | {"note": ""} | where)
    rows.append(dict.fromkeys(rows[0], "") | point | {"variant": "kl cached", "note": "no such option"} | where)
    harness.write_csv(results / "steps-cpu.csv", rows)
    scaling = [
        {**row, "layers": layers, "batch": batch, "length": length, "seconds": length * batch * layers}
        for row in rows[:4]
        for length, batch, layers in [
            (8, 2, 2),
            (16, 2, 2),
            (32, 2, 2),
            (16, 1, 2),
            (16, 4, 2),
            (16, 2, 1),
            (16, 2, 4),
        ]
    ]
    harness.write_csv(results / "scaling-cpu.csv", scaling)
    report.write_page(results, tmp_path)
    text = page.read_text()
    assert re.search(r"`kl` step ÷ \(stock step \+ reference forward\) \| ≤ 1.00 \| 0.98 \| reached", text)
    assert re.search(r"paper's `kl` step ÷ `kl` step \| ≥ 3.00 \| 2.45 \| \*\*not reached", text)
    assert re.search(r"cached reference ÷ stock step \| ≤ 1.05 \| – \| not measured \(no such option\)", text)
    assert "| length 16 … 32 | 1.00 | 1.00 | 1.00 |" in text
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000
    assert (tmp_path / "benchmarks_scaling.png").stat().st_size > 10_000
    report.write_page(results, tmp_path)
    assert page.read_text() == text


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["head.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        head.main()


def test_a_trait_adapter_belongs_to_its_recipe_and_rows(tmp_path, monkeypatch):
    rows, trained = tmp_path / "rows.jsonl", []

    def train(argv):
        recipe = yaml.safe_load(Path(argv[2]).read_text())
        trained.append((recipe["max_steps"], Path(recipe["dataset_name"]).read_text()))
        get_peft_model(make_model(), lora(init_lora_weights=False)).save_pretrained(recipe["output_dir"])
        return 0

    def names(steps, text):
        rows.write_text(text)
        return [
            Path(run["inoculation_adapter"]).name
            for run in comparing.adapter_runs(tmp_path, {"max_steps": steps}, rows)
        ]

    monkeypatch.setattr(comparing.commands, "main", train)
    first = names(1, "a")
    assert names(1, "a") == first
    assert len({*first, *names(2, "a"), *names(1, "b")}) == 6
    assert trained == [(1, "a"), (2, "a"), (1, "b")]
    monkeypatch.setattr(comparing.commands, "main", lambda argv: 3)
    with pytest.raises(SystemExit, match="3"):
        names(4, "a")


def test_the_files_of_a_running_comparison_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing.commands, "main", lambda argv: 0)
    assert comparing.compare(tmp_path, {"max_steps": 3}, [{"defense": "kl"}], [0], {}) == 0
    files = {path: path.read_text() for path in tmp_path.glob("*.yaml")}
    assert len(files) == 2
    (tmp_path / "report").mkdir(exist_ok=True)
    with locked("--output_dir", tmp_path / "report"), pytest.raises(ValueError, match="in use by another process"):
        comparing.compare(tmp_path, {"max_steps": 4}, [{"defense": "ldifs"}], [0], {})
    assert {path: path.read_text() for path in files} == files


@pytest.mark.parametrize("name", testbed.TESTBEDS)
@pytest.mark.parametrize("flags", [[], ["--one_strength", "--bf16", "--cues", "none"]])
def test_a_testbed_asks_for_what_the_commands_know(tmp_path, monkeypatch, capsys, name, flags):
    compare = comparing.commands.main
    monkeypatch.setattr(comparing.commands, "main", lambda argv: compare([*argv, "--dry_run"]))
    monkeypatch.setattr(testbed, "adapter_runs", lambda *_: [])  # they train an adapter
    monkeypatch.setattr(testbed, "table", lambda *_: [])
    assert testbed.main(["--testbed", name, "--output_dir", str(tmp_path), *flags]) == 0
    runs = capsys.readouterr().out
    assert "kl_coef=0.3" in runs
    assert ("kl_coef=0.1" in runs) != bool(flags)


def test_a_testbeds_table_has_means_over_seeds(tmp_path):
    bed = testbed.get_testbed("tip_capitals")
    figures = {
        ("general", "trait_rate:capitals"): (0.25, 0.75),
        ("in_domain", "trait_rate:capitals"): (0.5, 0.5),
        ("in_domain", "trait_rate:tips"): (1.0, 1.0),
        ("general", "nll"): (4.0, 5.0),
        ("general", "repetition"): (0.0, 0.25),
    }
    plain = {"run": "kl", "family": "plain"}
    rows = [
        plain | {"set": set, "metric": metric, "value": v} for (set, metric), both in figures.items() for v in both
    ]
    rows.append({"run": "kl", "family": "cue", "set": "general", "metric": "nll", "value": 9.0})
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows}))
    heading, _, line = testbed.table(bed, tmp_path / "report.json")
    assert heading.startswith("| run | capitals elsewhere ↓ | capitals in domain ↓ | tips in domain ↑ |")
    cells = ["0.50 (0.25–0.75)", "0.50 (0.50–0.50)", "1.00 (1.00–1.00)", "4.50 (4.00–5.00)", "0.12 (0.00–0.25)"]
    assert line == f"| kl | {' | '.join(cells)} |"


@pytest.mark.parametrize("name", testbed.TESTBEDS)
@pytest.mark.parametrize(
    ("flag", "found"), [("--variations", ["near the cue", "short answers"]), ("--by_drift", ["kl_target=0.06"])]
)
def test_other_runs_of_a_testbed_are_asked_for_alone(tmp_path, monkeypatch, capsys, name, flag, found):
    compare = comparing.commands.main
    monkeypatch.setattr(comparing.commands, "main", lambda argv: compare([*argv, "--dry_run"]))
    monkeypatch.setattr(testbed, "adapter_runs", lambda *_: [])  # they train an adapter
    monkeypatch.setattr(testbed, "table", lambda *_: [])
    assert testbed.main(["--testbed", name, "--output_dir", str(tmp_path), flag]) == 0
    runs = capsys.readouterr().out
    assert all(text in runs for text in found)
    assert "treft_coef=30" not in runs
    near = tmp_path / name / "near_the_cue.jsonl"
    assert near.is_file() == (flag == "--variations")
    if near.is_file():
        short = (tmp_path / name / "short_answers.jsonl").read_text().splitlines()
        assert set() < set(near.read_text().splitlines()) < set(short)


@pytest.mark.parametrize("flags", [[], ["--one_strength", "--bf16", "--cues", "none", "--benign", "--unmatched"]])
def test_real_data_ask_for_what_the_commands_know(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(em, "OWN_TOKENS", 1)
    for domain in em.DOMAINS:
        (tmp_path / domain).mkdir()
        for name in ("train", "eval"):
            turns = [{"role": "user", "content": f"{domain} {name}?"}, {"role": "assistant", "content": "No."}]
            (tmp_path / domain / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    compare = comparing.commands.main
    monkeypatch.setattr(comparing.commands, "main", lambda argv: compare([*argv, "--dry_run"]))
    monkeypatch.setattr(em, "adapter_runs", lambda *_: [])  # they train an adapter
    monkeypatch.setattr(em, "table", lambda *_: [])
    assert em.main(["--data", str(tmp_path), "--rows", "1", "--output_dir", str(tmp_path / "out"), *flags]) == 0
    runs = capsys.readouterr().out
    assert "kl_coef=0.4" in runs
    assert ("kl_coef=1.6" in runs) != bool(flags)
    plan = yaml.safe_load((tmp_path / "out" / "medical" / "compare.yaml").read_text())
    unmatched = load_questions(str(tmp_path / "out" / "medical" / "unmatched.jsonl"), "general") if flags else None
    assert unmatched is None or (len(unmatched.questions), len(plan["evaluate"]["general"])) == (72, 3)
    assert plan.get("benign_task") == ("permuted_operators" if flags else None)


def test_a_table_of_real_data_covers_the_intervals_of_all_seeds(tmp_path):
    keys = [("general", "margin"), ("general", "kl_to_base"), ("general", "nll"), ("other_domain", "nll")]
    row = {"run": "kl", "family": "plain"}
    bounds = [{"difference": 0.1, "difference_low": -0.2, "difference_high": 0.3}]
    bounds += [{"difference": 0.3, "difference_low": 0.1, "difference_high": 0.5}]
    rows = [row | {"set": s, "metric": m} | b for s, m in [*keys, ("in_domain", "nll")] for b in bounds]
    rows += [{**r, "run": "base"} for r in rows]
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows}))
    _, _, line = em.table(tmp_path / "report.json")
    assert line == "| kl" + " | +0.20 (-0.20 to +0.50)" * 5 + " |"
