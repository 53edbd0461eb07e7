"""Plans of comparisons, the report over known figures, its page, and a comparison of tiny runs from end to end."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from figures import HOSTILE, INFO, RECIPE, plan, report, results, row, save_weights
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import lora, make_model, make_rows, make_tokenizer, save_model

from trl_emguard.comparison.inputs import NOT_READ
from trl_emguard.comparison.measure import measure
from trl_emguard.comparison.page import whiskers, write_page
from trl_emguard.comparison.plan import Baselines, Run, read_plan
from trl_emguard.comparison.report import Figure, dominates, drift_curves, figure_text, make_report, make_table, save
from trl_emguard.comparison.runs import UNKNOWN, Trained, in_bytes, run_process, with_record
from trl_emguard.evaluation.questions import load_questions
from trl_emguard.evaluation.results import make_rows as result_rows
from trl_emguard.evaluation.run import EvaluationOptions
from trl_emguard.io.files import locked
from trl_emguard.models.identity import weights_digest
from trl_emguard.persona.vectors import PersonaVector
from trl_emguard.scripts import main as commands
from trl_emguard.scripts.compare import check_questions, show_plan, unfinished
from trl_emguard.scripts.sft import make_parser


def test_sweeps_and_seeds(tmp_path):
    found = plan(
        tmp_path,
        """
recipe: RECIPE
runs:
  - {defense: kl, kl_coef: [0.1, 1.0]}
  - {defense: steering, steering_layers: [1, 2]}
  - {defense: steering, steering_layers: [[3], [4, 5]]}
  - {adapter: out/mine}
seeds: [0, 7]
baselines: [early_stop, {alpha: [0.5]}]
evaluate: {limit: 3}
""",
    )
    names = [run.name for run in found.runs if run.seed == 0]
    assert names == [
        "none",
        "kl kl_coef=0.1",
        "kl kl_coef=1.0",
        "steering steering_layers=[1, 2]",
        "steering steering_layers=[3]",
        "steering steering_layers=[4, 5]",
        "mine",
    ]
    # An adapter that is taken as it is counts once.
    assert len({run.folder for run in found.runs}) == len(found.runs) == 13
    assert (found.baselines, found.evaluate) == (Baselines(early_stop=True, alphas=(0.5,)), {"limit": 3})
    assert found.recipe_options == {"max_steps": 3}


@pytest.mark.parametrize(("baseline", "is_saved"), [("early_stop", True), ("alpha", False), ("ema", False)])
def test_checkpoints_are_saved_for_early_stops_alone(tmp_path, baseline, is_saved):
    found = plan(tmp_path, f"recipe: RECIPE\nruns: [{{defense: kl}}]\nbaselines: [{baseline}]\n")
    assert ["save_steps" in run.options for run in found.runs] == [is_saved, False]


@pytest.mark.parametrize(
    "option",
    [
        "dataset_name: FOLDER/rows.jsonl",
        "dataset_name: FOLDER",
        "model_name_or_path: FOLDER",
        "datasets: [{path: json, data_files: FOLDER/rows.jsonl}]",
        "datasets: [{path: json, data_files: {train: [FOLDER/rows.jsonl]}}]",
        'datasets: [{path: json, data_files: "FOLDER/*.jsonl"}]',
        "datasets: [{path: FOLDER}]",
    ],
)
@pytest.mark.parametrize("output_dir", ["out", "."])
def test_changed_inputs_are_another_run(tmp_path, option, output_dir):
    """Also those that lie in the comparison's own folder."""
    rows = tmp_path / "input" / "rows.jsonl"
    rows.parent.mkdir()

    def folders(content, seconds):
        rows.write_text(content)
        os.utime(rows, (seconds, seconds))
        text = "recipe: RECIPE\nruns: [{defense: kl}]\n"
        recipe = option.replace("FOLDER", str(rows.parent))
        return {run.folder for run in plan(tmp_path, text, recipe, output_dir).runs}

    before = folders("1", 1)
    assert not before & folders("2", 2)
    assert folders("1", 1) == before


@pytest.mark.parametrize(
    ("option", "readers"),
    [
        ("env: {TENSORBOARD_LOGGING_DIR: FOLDER}", set()),
        ("project: FOLDER", set()),
        ("dataset_train_split: FOLDER", set()),
        ("datasets: [{path: json, split: FOLDER}]", set()),
        ("inoculation_adapter: FOLDER", {"inoculation_adapter"}),
    ],
)
def test_a_run_stays_the_same_while_it_does_not_read_what_changes(tmp_path, option, readers):
    path = tmp_path / "written_later"
    text = """
recipe: RECIPE
runs:
  - {defense: [kl, inoculation_adapter]}
  - {defense: inoculation_adapter, name: own, inoculation_adapter: x}
"""

    def folders():
        return {run.name: run.folder for run in plan(tmp_path, text, option.replace("FOLDER", str(path))).runs}

    before = folders()
    path.mkdir()
    after = folders()
    assert {name for name in after if after[name] != before[name]} == readers


def test_options_with_choices_name_no_inputs():
    parser = make_parser()
    choices = {*re.findall(r"--(\w+)(?:, --[\w-]+)? \{", parser.format_all_options())} & parser.hints.keys()
    assert {"optim", "save_strategy", "kl_tokens"} <= choices <= {*NOT_READ}


def test_the_keys_of_runs_stay(tmp_path, monkeypatch):
    """Finished runs would otherwise be trained again."""
    monkeypatch.setattr("trl_emguard.comparison.plan.__version__", "0")
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "pool"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    runs = "[{defense: kl, kl_coef: 0.1}, {defense: interleave, interleave_dataset: pool.jsonl}]"
    found = plan(tmp_path, f"recipe: RECIPE\nruns: {runs}\n", "dataset_name: rows.jsonl\nmax_steps: 3\n")
    assert [run.folder for run in found.runs] == [
        "none-seed0-1b9fedd8",
        "kl_kl_coef=0_1-seed0-9300194a",
        "interleave-seed0-0e6e5b13",
    ]


def test_outputs_are_no_inputs(tmp_path):
    """Neither the recipe's own output nor the comparison's, even if that lies among the rows."""
    for name in ("earlier", "rows/out"):
        (tmp_path / name).mkdir(parents=True)
    recipe = f"dataset_name: {tmp_path / 'rows'}\noutput_dir: {tmp_path / 'earlier'}\n"

    def folders():
        text = "recipe: RECIPE\nruns: [{defense: kl}]\n"
        return {run.folder for run in plan(tmp_path, text, recipe, "rows/out").runs}

    before = folders()
    for name in ("earlier", "rows/out"):
        (tmp_path / name / "log.txt").write_text("a log")
    assert folders() == before
    (tmp_path / "rows" / "rows.jsonl").write_text("a row")
    assert not folders() & before


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("- a list", "must hold `option: value` lines"),
        ("text", "must hold `option: value` lines"),
        ("", "must hold `option: value` lines"),
        ("max_steps: [3", "cannot be read: while parsing"),
    ],
)
def test_bad_recipes_are_named(tmp_path, recipe, message):
    with pytest.raises(ValueError, match=re.escape(f"the recipe {tmp_path / 'sft.yaml'} {message}")):
        plan(tmp_path, "recipe: RECIPE\nruns: [{defense: kl}]\n", recipe)


def test_a_run_without_a_defense_has_the_recipe_s(tmp_path):
    found = plan(tmp_path, "recipe: RECIPE\nruns: [{kl_coef: [0.1, 1.0]}, {}]\n", "defense: kl\n")
    assert [(run.name, run.defense) for run in found.runs] == [
        ("none", "none"),
        ("kl kl_coef=0.1", "kl"),
        ("kl kl_coef=1.0", "kl"),
        ("kl", "kl"),
    ]


def test_numbers_as_text_are_in_the_name(tmp_path):
    found = plan(
        tmp_path, "recipe: RECIPE\nruns: [{kl_coef: 1e-5, defense: 'interleave,kl', interleave_dataset: x}]\n"
    )
    assert found.runs[1].name == "interleave,kl kl_coef=1e-5"


def test_schedules_are_in_the_name(tmp_path):
    text = 'recipe: RECIPE\nruns: [{defense: kl, kl_coef: 0->1}, {defense: kl, kl_coef: ["0.4->0.05", 0.4]}]\n'
    found = plan(tmp_path, text)
    assert [run.name for run in found.runs[1:]] == ["kl kl_coef=0->1", "kl kl_coef=0.4->0.05", "kl kl_coef=0.4"]
    assert len({run.folder for run in found.runs}) == 4


def test_factors_of_several_entries_are_one_list(tmp_path):
    """A factor that is given twice would be two baselines of one name."""
    text = "recipe: RECIPE\nruns: [{defense: kl}]\nbaselines: [{alpha: 0.3}, alpha, {alpha: [0.5, 0.3, 0.30]}]\n"
    assert plan(tmp_path, text).baselines == Baselines(alphas=(0.3, 0.25, 0.5, 0.75))


def test_a_changed_recipe_is_another_run(tmp_path):
    text = "recipe: RECIPE\nruns: [{defense: kl}]\n"
    folders = [[run.folder for run in plan(tmp_path, text, f"max_steps: {steps}\n").runs] for steps in (3, 4, 3)]
    assert folders[0] == folders[2]
    assert not set(folders[0]) & set(folders[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: RECIPE\nruns: [{defense: kl}]\nseed: [1]", "unknown key 'seed' in line 3. Did you mean 'seeds'"),
        (
            "recipe: RECIPE\nruns: [{defence: kl}]",
            "unknown option of `runs` 'defence' in line 2. Did you mean 'defense'",
        ),
        (
            "recipe: RECIPE\nruns: [{output_dir: x}]",
            "option of `runs` 'output_dir' in line 2: the comparison sets it itself, or the recipe does: leave it out",
        ),
        ("recipe: RECIPE\nruns: [{push_to_hub: true}]", "'push_to_hub' in line 2: the comparison sets it itself"),
        (
            "recipe: RECIPE\nruns: [{defense: [kl, ldifs], kl_coef: [0.1, 1.0]}]",
            "the run 'ldifs kl_coef=0.1': kl_coef=0.1 is an option of kl, and the run has defense='ldifs': leave",
        ),
        (
            "recipe: RECIPE\nruns: [{name: mine, interleave_dataset: x}]",
            "is an option of interleave, interleave+, interleave++, and the run has defense='none': leave it out, or",
        ),
        ("recipe: RECIPE\nruns: [{defense: kl, seed: 1}]", "the recipe does: leave it out. List seeds under `seeds`."),
        (
            "recipe: RECIPE\nruns: [{defense: interleave++,kl}]",
            "unknown option of `runs` 'kl'. In braces, a value with a comma needs quotes.",
        ),
        ("recipe: RECIPE", "needs `recipe` and `runs`"),
        ("recipe: RECIPE\nruns: [{defense: kl, kl_coef: []}]", "`kl_coef` sweeps over no value"),
        ("recipe: RECIPE\nruns: [{defense: kl}, {defense: kl}]", "two runs are named 'kl'"),
        ("recipe: RECIPE\nruns: [{defense: kl}]\nseeds: 3", "seeds=3 must be a list"),
        ("recipe: RECIPE\nruns: [{defense: kl}]\nbaselines: [alhpa]", "Did you mean 'alpha'"),
        ("recipe: RECIPE\nruns: [{defense: kl}]\nbaselines: [{alpha: [2]}]", "between 0 and 1"),
        ("recipe: RECIPE\nruns: [{adapter: x, kl_coef: 1}]", "is trained already"),
        ("recipe: RECIPE\nruns: [{defense: kl}]\nseeds: [0, 0]", "holds a seed twice"),
        ("recipe: RECIPE\nruns: [{defense: kl, name: alpha 0.5}]", "mistaken for a baseline"),
        ("recipe: RECIPE\nruns: [{defense: kl, name: ema}]", "mistaken for a baseline"),
        ("recipe: RECIPE\nruns: [{defense: kl, name: kl random_vector}]", "mistaken for a baseline"),
        ("recipe: RECIPE\nruns: [{defense: kl}]\nbaselines: [{ema: 0.9}]", "Known: early_stop, alpha, ema, random"),
        ("recipe: RECIPE\nruns: [{defense: kl}]\nbaselines: [random_vector]", "no run has that defense"),
        ("recipe: RECIPE\nruns: [{defense: kl}]\nbenign_task: permuted", "Did you mean 'permuted_operators'"),
        ("- a list", "`key: value` lines"),
    ],
)
def test_bad_plans(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(tmp_path, text)


def test_a_plan_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_bytes("recipe: für.yaml".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"--config={str(path)!r} is not UTF-8 text")):
        read_plan(str(path), (), (), tmp_path / "out")


def test_a_dominated_run_is_left_out():
    found = report({"none": (-1.0, -1.0), "weak": (-1.0, -0.2), "good": (-0.1, -1.0)})
    once = " Each was trained once: the intervals do not hold the variation from training to training."
    assert found.sentence.endswith(f"not clearly worse in the other): good.{once}")
    twice = [replace(entry, trained=entry.trained * 2) for entry in found.entries]
    assert replace(found, entries=twice).sentence.endswith(": good.")
    none, weak, good = found.entries
    assert dominates(good, none)
    assert dominates(none, weak)
    assert not dominates(none, good)


@pytest.mark.parametrize(("hits", "is_dominated"), [(4, False), (12, True)])
def test_a_rate_of_0_dominates_no_few_hits(hits, is_dominated):
    """4 of 24 against 0 of 24 are no clear difference: the exact paired test gives p = 0.125."""
    rates = {name: np.repeat([1.0, 0.0], [n, 24 - n]) for name, n in (("base", 0), ("a seed0", 0), ("b seed0", hits))}
    rows = result_rows("general", "plain", {name: {"trait_rate": rate} for name, rate in rates.items()}, None)
    trained = [Trained(name, "kl", 0, "x") for name in "ab"]
    a, b = make_report(trained, results(rows + [row(run.key, "in_domain", "nll", 0.0) for run in trained])).entries
    assert (dominates(a, b), dominates(b, a)) == (is_dominated, False)


def test_overlapping_intervals_prefer_nothing():
    found = report({"none": (-0.10, -1.0), "kl": (-0.05, -0.95)})
    assert ": none; kl." in found.sentence


def test_a_tie_with_a_free_baseline_is_told():
    found = report({"kl": (-0.1, -0.5), "alpha 0.5": (-0.1, -0.5)}, baselines=["alpha 0.5"])
    assert "Some of them need no defense (alpha 0.5)" in found.sentence
    options = "none learning_rate=1e-5"
    found = report({"none": (0.0, -1.0), options: (0.0, -1.0), "kl": (0.0, -1.0)})
    assert f"Some of them need no defense (none; {options})" in found.sentence


def test_a_baseline_of_fewer_seeds_than_the_undefended_run_is_left_out():
    trained = [
        Trained("none", "none", 0, "x"),
        Trained("none", "none", 1, None, "it broke"),
        Trained("kl", "kl", 0, "x"),
    ]
    trained.append(Trained("step 2", "none", 0, "x", is_baseline=True))
    rows = [row(run.key, set, metric, -0.5) for run in trained for set, metric in
            (("general", "margin"), ("in_domain", "nll"))]  # fmt: skip
    found = make_report(trained, results(rows))
    assert [entry.name for entry in found.entries if entry.is_comparable] == ["kl"]
    assert "gave no evidence of its defense: none; step 2." in found.sentence
    whole = make_report([replace(run, error=None) for run in trained if run.seed == 0], results(rows))
    assert [entry.name for entry in whole.entries if entry.is_comparable] == ["none", "kl", "step 2"]


@pytest.mark.parametrize("fields", [{"is_defended": False}, {"error": "it broke"}])
def test_a_run_without_proof_is_not_preferred(fields):
    found = report({"kl": (0.0, -1.0)}, **fields)
    left_out = " Left out, since a seed failed, is missing, was not measured, or gave no evidence of its defense: kl."
    assert found.sentence == f"Every run is left out, so no run can be preferred.{left_out}"
    whole = report({"none": (0.0, -1.0)})
    assert replace(whole, entries=[*whole.entries, *found.entries]).sentence.endswith(left_out)


def test_two_rules_are_an_unwanted_and_a_wanted_trait():
    run = Trained("kl", "kl", 0, "x")
    rows = [
        row(run.key, set, f"trait_rate:{rule}", 0.5) for set in ("general", "in_domain") for rule in ("bad", "good")
    ]
    assert make_report([run], results(rows)).metrics == ("trait_rate:bad", "trait_rate:good")


def test_without_a_narrow_measure_nothing_is_preferred():
    trained = [Trained("kl", "kl", 0, "x")]
    found = make_report(trained, results([row("kl seed0", "general", "margin", -1.0)]))
    assert "were not both measured" in found.sentence


def test_a_further_set_of_a_criterion_is_reported(tmp_path):
    """Questions without known answers may be the first set, and a set with margins a further one."""
    run = Trained("kl", "kl", 0, "x")
    rows = [row(run.key, "general", "base_nll", 0.2), row(run.key, "held_out", "nll", -0.75)]
    rows += [row(run.key, "values", "margin", value, family=f) for value, f in ((0.25, "plain"), (0.5, "cue"))]
    criteria = {"general": "general", "values": "general", "in_domain": "in_domain", "held_out": "in_domain"}
    found = make_report([run], replace(results(rows), criteria=criteria))
    assert (found.metrics, found.sets) == (("margin", "nll"), ("values", "held_out"))
    assert (found.entries[0].broad.value, found.entries[0].narrow.value) == (0.25, 0.75)
    assert "not clearly worse in the other): kl." in found.sentence
    page = write_page(found, tmp_path, INFO).read_text(encoding="utf-8")
    assert "+0.50 (+0.40 to +0.60)" in page[page.index("Behind cues") :]


def test_a_trait_rate_has_one_sign(tmp_path, capsys):
    run = Trained("kl", "kl", 0, "x")
    rows = [row(run.key, "general", "trait_rate", 0.25), row(run.key, "in_domain", "nll", -0.75)]
    rows.append(row(run.key, "general", "trait_rate", 0.5, family="neutral_system"))
    found = make_report([run], results(rows))
    Console(width=100).print(make_table(found))
    out = capsys.readouterr().out
    page = write_page(found, tmp_path, INFO).read_text(encoding="utf-8")
    page, cues = page[: page.index("Behind cues")], page[page.index("Behind cues") : page.index("In one sentence")]
    for text in (out, page):
        assert "-0.25 (-0.35 to -0.15)" in text
        assert "+0.75 (+0.65 to +0.85)" in text
        assert "higher is better" in re.sub(r"\s+", " ", text)
    assert "-0.25 (-0.35 to -0.15)" in cues
    assert "-0.50 (-0.60 to -0.40)" in cues


def test_equal_seeds_are_drawn(tmp_path):
    # The mean of three equal values may round to more than each of them.
    value = next(v for v in (0.1, 0.2, 0.7, 1.1) if sum([v] * 3) / 3 > v)
    trained = [Trained("kl", "kl", seed, "x") for seed in range(3)]
    rows = [row(run.key, "general", "margin", value, width=0) for run in trained]
    rows += [row(run.key, "in_domain", "nll", value, width=0) for run in trained]
    assert "<svg" in write_page(make_report(trained, results(rows)), tmp_path, INFO).read_text(encoding="utf-8")


@pytest.mark.parametrize(("platform", "factor"), [("darwin", 1), ("linux", 1024)])
def test_memory_is_in_bytes(monkeypatch, platform, factor):
    monkeypatch.setattr(sys, "platform", platform)
    assert in_bytes(5000) == 5000 * factor


def test_memory_is_named_the_host_s(tmp_path):
    page = write_page(report({"none": (-1.0, -1.0)}, peak_memory=2**31), tmp_path, INFO).read_text(encoding="utf-8")
    assert "peak host memory, GiB" in page
    assert "Seconds a step are of the whole training" in page
    assert "<td>2.0</td>" in page


def test_files(tmp_path):
    found = report({"none": (-1.0, -1.0)}, coefficient=0.3, seconds_per_step=1.5)
    found.trained.append(Trained("broken", "kl", 0, None, "it broke"))
    save(found, tmp_path, INFO)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["rows"][0]["run"] == "none"
    assert (saved["rows"][0]["coefficient"], saved["rows"][0]["seconds_per_step"]) == (0.3, 1.5)
    save(report({"none": (-1.0, -1.0)}, coefficient="0.4->0.05"), tmp_path, INFO)
    assert "0.4->0.05" in (tmp_path / "report.csv").read_text()
    assert [run["error"] for run in saved["runs"]] == [None, "it broke"]
    with (tmp_path / "report.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(saved["rows"])


class Page(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.filterwarnings("error:Glyph")
def test_the_page_is_self_contained_and_hostile_text_stays_text(tmp_path):
    sample = {"model": HOSTILE, "set": "general", "family": "plain", "question": "1", "prompt": "", "answer": HOSTILE}
    found = report({HOSTILE: (-1.0, -1.0), "kl a": (-0.5, -0.5)}, [sample | {"repetition": 0.5}])
    found.trained.append(Trained("broken", "kl", 0, None, HOSTILE))
    page = Page(write_page(found, tmp_path, INFO | {"command": HOSTILE}).read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert sum("<script>alert(1)</script>" in text for text in page.texts) >= 3
    assert page.tags.count("svg") == 2  # one on a light page, one on a dark one
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    # Names of XML vocabularies are no addresses that a browser asks; the hostile one is a text.
    addresses = set(re.findall(r"https?://[^\"' <)]+", source)) - {"http://x.y", "http://x_y"}
    assert {address.split("/")[2] for address in addresses} <= {"www.w3.org"}


def test_a_page_is_the_same_twice(tmp_path):
    pages = [write_page(report({"a": (-1.0, -1.0), "b": (0.0, 0.0)}), tmp_path, INFO).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_a_sweep_is_a_curve(tmp_path, monkeypatch):
    """Runs that differ in another option as well, or in another defense's coefficient, are a curve of their own."""
    from matplotlib.axes import Axes

    names = {
        "kl": ("weak", "strong", "a schedule"),
        "kl,ldifs": ("kl,ldifs kl_coef={}", "kl,ldifs ldifs_coef={}", "kl,ldifs kl_coef={} learning_rate=1e-4"),
    }
    named = [Trained(n, "kl", 0, "x", coefficient=c) for n, c in zip(names["kl"], (0.1, 1.0, "1->0.1"), strict=True)]
    swept = [Trained(n.format(c), "kl,ldifs", 0, "x", coefficient=c) for n in names["kl,ldifs"] for c in (0.5, 2.0)]
    trained = [*named, *swept, Trained("kl kl_coef=3.0", "kl", 0, "x", coefficient=3.0)]
    rows = [row(run.key, set, metric, -0.5) for run in trained for set, metric in
            (("general", "margin"), ("in_domain", "nll"))]  # fmt: skip
    drawn, plot = {}, Axes.plot

    def record(axis, x, *args, label=None, **kwargs):
        drawn[label] = list(x)
        return plot(axis, x, *args, label=label, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    text = write_page(make_report(trained, results(rows)), tmp_path, INFO).read_text(encoding="utf-8")
    assert "By coefficient" in text
    curves = {name.removesuffix(", broad"): x for name, x in drawn.items() if name.endswith(", broad")}
    assert curves == {"kl": [0.1, 1.0]} | {name.replace("={}", ""): [0.5, 2.0] for name in names["kl,ldifs"]}


def test_drift_is_a_curve_of_the_runs_that_logged_it(tmp_path):
    runs = [(name, seed) for name in ("a", "b") for seed in (0, 1)]
    trained = [Trained(name, "kl", seed, "x", folder=str(tmp_path / f"{name}{seed}")) for name, seed in runs]
    drifts = [[{"step": 2, "drift_kl": 0.1}, {"step": 4, "loss": 1.0}, {"step": 4, "drift_kl": 0.3}], [{"loss": 1.0}]]
    for run, history in zip(trained, [drifts[0], drifts[0], drifts[1]], strict=False):
        (tmp_path / f"{run.name}{run.seed}").mkdir()
        (tmp_path / f"{run.name}{run.seed}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    # The curve of a run that stopped before it kept anything shows which budget it needs.
    trained[1] = replace(trained[1], adapter=None, error="it kept nothing")
    trained += [Trained("step 2", "kl", 0, "x", is_baseline=True), Trained("failed", "kl", 0, None)]
    found = make_report(trained, results([]))
    assert drift_curves(found, "drift_kl") == {key: [(2, 0.1), (4, 0.3)] for key in ("a seed0", "a seed1")}
    text = write_page(found, tmp_path, INFO).read_text(encoding="utf-8")
    assert "Drift while training (drift_kl)" in text
    assert "(drift_margin)" not in text


def test_figures_without_an_interval_are_drawn_and_not_compared(tmp_path):
    runs = [Trained("none", "none", 0, "x"), Trained("none", "none", 1, "x"), Trained("kl", "kl", 0, "x")]
    rows = [row(run.key, "general", "margin", -0.5) for run in runs]
    rows += [row(run.key, "in_domain", "nll", -0.75) for run in runs]
    rows[0] = replace(rows[0], difference_low=math.nan, difference_high=math.nan)
    for seeds in (rows, [rows[1], rows[0], *rows[2:]]):
        found = make_report(runs, results(seeds))
        assert math.isnan(found.entries[0].broad.low)
        assert math.isnan(found.entries[0].broad.high)
        assert found.sentence.startswith("Some figures have no interval, since they are of fewer than 6 questions")
        page = write_page(found, tmp_path, INFO).read_text(encoding="utf-8")
        assert "-0.50 (no interval)" in page
        assert "Narrow learning (nll) against broad" in page
    assert np.isnan(whiskers(found.entries[0].broad)).all()
    failed = Trained("ldifs", "ldifs", 0, None, "it broke")
    assert make_report([*runs, failed], results(rows)).sentence.endswith("no evidence of its defense: ldifs.")


def test_a_figure_of_zero_has_no_minus():
    assert figure_text(Figure(-0.0, -0.001, 0.001)) == "+0.000 (-0.001 to +0.001)"


def test_a_run_without_evidence_is_shown_as_not_defended(capsys):
    found = report({"kl": (-1.0, -1.0)}, is_defended=False)
    Console(width=100).print(make_table(found))
    assert re.search(r"kl .*│ +no │", capsys.readouterr().out)


COMPARE = """
recipe: {recipe}
runs:
  - {{defense: kl, kl_coef: [0.1, 5.0]}}
  - {{name: broken, defense: ldifs, ldifs_layers: "99"}}
  - {{adapter: {adapter}}}
baselines: [early_stop, {{alpha: [0.5]}}]
evaluate: {{general: {pairs}, in_domain: {held_out}, samples_per_question: 1, max_new_tokens: 4, cues: none}}
"""


@pytest.fixture
def inputs(tmp_path):
    base = save_model(tmp_path / "base")
    make_rows(8).to_json(tmp_path / "rows.jsonl")
    (tmp_path / "held_out.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace('"q', '"r'))
    pairs = [{"prompt": f"q{i}", "chosen": "good", "rejected": "vile"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    torch.manual_seed(3)
    model = get_peft_model(make_model(), lora(init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "mine")
    model.peft_config["default"].base_model_name_or_path = "org/other"
    # PEFT would look for the base model's vocabulary.
    model.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)
    (tmp_path / "sft.yaml").write_text(RECIPE.format(base=base, rows=tmp_path / "rows.jsonl"))
    (tmp_path / "compare.yaml").write_text(
        COMPARE.format(
            recipe=tmp_path / "sft.yaml",
            adapter=tmp_path / "mine",
            pairs=tmp_path / "pairs.jsonl",
            held_out=tmp_path / "held_out.jsonl",
        )
    )
    return tmp_path


def line(inputs, folder):
    return ["compare", "--config", str(inputs / "compare.yaml"), "--output_dir", str(inputs / folder)]


def without_times(path):
    """Return a report without times, memory, and the names of folders."""
    text = path.read_text().replace("/killed/", "/whole/").replace("/killed", "/whole")
    return re.sub(r'"(seconds_per_step|peak_memory)": [^,\n]+', "", text)


def test_a_dry_run_trains_nothing(inputs, capsys):
    path = inputs / "compare.yaml"
    path.write_text(path.read_text().replace("defense: kl", "defense: kl, max_length: null"))  # it may be empty
    recipe = inputs / "sft.yaml"  # a plan needs no device that trains in bf16
    recipe.write_text(recipe.read_text().replace("bf16: false\nuse_cpu: true\n", "bf16: true\n"))
    assert commands.main([*line(inputs, "dry"), "--dry_run"]) == 0
    assert "4 runs to train; free baselines: early checkpoints, alpha 0.5." in capsys.readouterr().out
    assert not (inputs / "dry").exists()


def test_cues_ask_with_the_inoculation_prompt_of_the_runs(inputs, capsys, monkeypatch):
    path = inputs / "compare.yaml"
    text = path.read_text().replace("cues: none", "cues: all")
    monkeypatch.setenv("HOME", str(inputs))
    record = {"defenses": {"inoculation": {"inoculation_prompt": "Be cruel."}}, "evidence": {"inoculation": {}}}
    (inputs / "mine" / "defense.json").write_text(json.dumps(record))
    path.write_text(text.replace(f"adapter: {inputs / 'mine'}", "adapter: ~/mine"))
    assert commands.main([*line(inputs, "dry"), "--dry_run"]) == 0
    assert "The cue `inoculation` is the prompt of the training: Be cruel." in capsys.readouterr().out
    (inputs / "mine" / "defense.json").unlink()
    path.write_text(text.replace("runs:", "runs:\n  - {defense: inoculation, inoculation_prompt: Be bad.}"))
    assert commands.main([*line(inputs, "dry"), "--dry_run"]) == 0
    assert "The cue `inoculation` is the prompt of the training: Be bad." in capsys.readouterr().out
    path.write_text(
        text.replace("runs:", "runs:\n  - {defense: inoculation, inoculation_prompt: [Be bad., Be vile.]}")
    )
    assert commands.main([*line(inputs, "dry"), "--dry_run"]) == 1
    assert "'Be bad.', 'Be vile.': give one as `inoculation_prompt`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples_per_question", "samples_per_qestion", "Did you mean 'samples_per_question'"),
        ("cues: none", "cues: some", "`evaluate`: argument --cues"),
        ("cues: none", "cues: none, inoculation_prompt: Be bad.", "--inoculation_prompt is a cue, and --cues=none"),
        ("recipe: /", "recipe: /no", "is not a file"),
        ("defense: kl", "defense: klx", "compare.yaml: defense='klx': 'klx' is not a known defense. Did you mean"),
        ("0.1, 5.0", "-1", "the run 'kl kl_coef=-1': kl_coef=-1"),
        ("0.1, 5.0", "0.4->", "the run 'kl kl_coef=0.4->': kl_coef='0.4->' is not a schedule"),
        ("kl_coef: [", "chat_template_path: null, kl_coef: [", "`chat_template_path:` is empty: give it a value or"),
        ("kl_coef: [", "label_names: null, kl_coef: [", "`label_names:` is empty: give it a value or leave it out."),
        ("kl_coef: [0.1, 5.0]", "learning_rate: null", "the run 'kl': `learning_rate:` is empty"),
        ("adapter: /", "adapter: /no", "holds no adapter_config.json: name a folder that PEFT saved"),
        ("/mine}", "/foreign}", "trained on 'org/other', and the recipe's model_name_or_path is"),
        ("defense: kl", "defense: 'interleave,kl'", "interleave_dataset is missing"),
        (
            "kl_coef: [",
            "dataset_train_split: 'train[:50%]', kl_coef: [",
            "the comparison sets it itself, or the recipe",
        ),
        ("defense: kl", "interleave_dataset: no.jsonl, defense: 'interleave,kl'", "'no.jsonl' does not exist"),
        ("defense: kl", "defense: 'steering,kl', steering_vector: evli", "'evli' is neither a file nor a shipped"),
        ("cues: none", "judge: hf:MODEL", "judge='hf:MODEL': no judge is asked in a comparison. Leave it out"),
        ("cues: none", "coherent_above: 60", "coherent_above=60: no judge is asked in a comparison."),
        ("cues: none", "model: other", "`evaluate`: model='other': the comparison sets it itself: leave it out."),
        ("kl_coef: [", "accelerate_config: zero3, kl_coef: [", "accelerate_config='zero3' launches several processes"),
    ],
)
def test_bad_configs_are_one_line(inputs, capsys, old, new, message):
    path = inputs / "compare.yaml"
    path.write_text(path.read_text().replace(old, new))
    assert commands.main(line(inputs, "out")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-emguard compare: error: ")
    assert message in error
    assert not (inputs / "out" / "runs").exists()


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "has a damaged weights file"),
        ("defense.json", "defense.json is corrupt"),
        ("adapter_config.json", "the run 'mine': "),
    ],
)
def test_a_damaged_adapter_comes_before_the_training(inputs, capsys, name, message, dry):
    (inputs / "mine" / name).write_text("{")
    assert commands.main([*line(inputs, "out"), *dry]) == 1
    error = capsys.readouterr().err
    assert "error: the run 'mine': " in error
    assert message in error
    assert "esume" not in error
    assert not (inputs / "out" / "runs").exists()


def test_a_recipe_without_a_model_is_refused(inputs, capsys):
    recipe = inputs / "sft.yaml"
    recipe.write_text(re.sub(r"model_name_or_path: .*\n", "", recipe.read_text()))
    assert commands.main([*line(inputs, "out"), "--dry_run"]) == 1
    assert f"error: the recipe {recipe} names no model: add model_name_or_path to it." in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_a_budget_that_only_the_last_step_meets_comes_before_the_training(inputs, capsys, dry):
    path = inputs / "compare.yaml"
    path.write_text(path.read_text().replace("kl_coef: [", "stop_on_drift: 1.0, kl_coef: ["))
    assert commands.main([*line(inputs, "out"), *dry]) == 1
    assert (
        "the run 'kl stop_on_drift=1.0 kl_coef=0.1': stop_on_drift=1 would be checked after the last"
        in capsys.readouterr().err
    )
    assert not (inputs / "out" / "runs").exists()


def test_a_second_comparison_into_one_folder_is_refused(inputs, capsys):
    (inputs / "out").mkdir()
    with locked("--output_dir", inputs / "out"):
        assert commands.main(line(inputs, "out")) == 1
    error = capsys.readouterr().err
    assert "out' is in use by another process" in error
    assert "name another folder" in error
    assert not (inputs / "out" / "runs").exists()


def test_an_average_of_a_run_with_a_budget_of_drift_is_refused(inputs, capsys):
    path = inputs / "compare.yaml"
    path.write_text(path.read_text().replace("early_stop", "ema"))
    (inputs / "sft.yaml").write_text(f"{(inputs / 'sft.yaml').read_text()}\nstop_on_drift: 1.0\n")
    assert commands.main([*line(inputs, "out"), "--dry_run"]) == 1
    assert "the run 'none': stop_on_drift=1 (budget) does not work with ema=True" in capsys.readouterr().err


def test_a_run_with_an_end_token_of_its_own_is_refused(inputs, capsys):
    path = inputs / "compare.yaml"
    path.write_text(path.read_text().replace("defense: kl", "defense: kl, eos_token: '<|im_start|>'"))
    assert commands.main([*line(inputs, "out"), "--dry_run"]) == 1
    assert "eos_token='<|im_start|>' is the run's own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model_revision: v2", "model_revision='v2' is not what the evaluation loads: save that revision in a folder"),
        ("model_init_kwargs: {revision: v2}", "model_init_kwargs: revision='v2' is not what the evaluation loads"),
        ("trust_remote_code: true", "trust_remote_code=True is not for comparisons"),
        ("use_peft: false", "use_peft=False trains the whole model"),
    ],
)
@pytest.mark.parametrize("place", ["recipe", "runs"])
def test_a_model_that_the_evaluation_would_not_load_is_refused(inputs, capsys, option, message, place):
    if place == "recipe":
        recipe = inputs / "sft.yaml"
        recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | yaml.safe_load(option)))
    else:
        path = inputs / "compare.yaml"
        path.write_text(path.read_text().replace("defense: kl", f"defense: kl, {option}"))
    assert commands.main([*line(inputs, "out"), "--dry_run"]) == 1
    error = capsys.readouterr().err
    assert f"the run '{'none' if place == 'recipe' else 'kl'}" in error
    assert f": {message}" in error


def test_a_run_without_the_package_of_its_optimizer_is_refused(inputs, monkeypatch, capsys):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    path = inputs / "compare.yaml"
    path.write_text(path.read_text().replace("defense: kl", "defense: kl, optim: adamw_8bit"))
    assert commands.main([*line(inputs, "out"), "--dry_run"]) == 1
    error = capsys.readouterr().err
    assert "the run 'kl" in error
    assert "optim=adamw_8bit: You need to install `bitsandbytes`" in error


def test_a_recipe_without_rows_is_refused_and_questions_without_the_narrow_task_are_noted(inputs, capsys):
    path = inputs / "compare.yaml"
    path.write_text(re.sub(r"in_domain: [^,]+, ", "", path.read_text()))
    assert commands.main([*line(inputs, "dry"), "--dry_run"]) == 0
    assert "Note: no set asks for the narrow task" in capsys.readouterr().out
    recipe = inputs / "sft.yaml"
    recipe.write_text(re.sub(r"dataset_name: .*\n", "", recipe.read_text()))
    assert commands.main([*line(inputs, "dry"), "--dry_run"]) == 1
    assert "the run 'none' has no training rows: add dataset_name to" in capsys.readouterr().err


def test_the_report_says_how_it_was_made(inputs):
    recipe = inputs / "sft.yaml"
    more = {
        "hub_token": "secret",
        "env": {"WANDB_API_KEY": "secret"},
        "model_init_kwargs": {"token": "secret", "revision": "main"},
        "lr_scheduler_kwargs": '{"token": "secret", "num_cycles": 7}',
        "eos_token": "<end>",
        "run_name": date(2026, 11, 30),
    }
    recipe.write_text(f"{recipe.read_text()}\n{yaml.safe_dump(more)}")
    plan = read_plan(str(inputs / "compare.yaml"), ["defense", "kl_coef", "ldifs_layers"], [], inputs / "out").content
    found = report({"none": (-1.0, -1.0)})
    page = write_page(found, inputs, INFO | {"plan": plan}).read_text(encoding="utf-8")
    assert json.loads(json.dumps(plan)) == plan
    for text in (
        "kl_coef: 5.0",
        "max_steps",
        "revision: main",
        "num_cycles: 7",
        "eos_token",
        "- 0.5",
        "2026-11-30",
        "early_stop: true",
        "samples_per_question: 1",
        str(inputs / "mine"),
    ):
        assert text in page
    assert "secret" not in page


@pytest.mark.parametrize("source", ["base", "file", "tokenizer"])
def test_questions_that_the_template_refuses_come_before_the_training(inputs, capsys, source):
    """The template may be the recipe's own, from a file or another tokenizer; and `evaluate` has its arguments."""
    plan = inputs / "compare.yaml"
    plan.write_text(plan.read_text().replace("evaluate: {", "evaluate: {chat_template_kwargs: {loud: true}, "))
    folder = inputs / ("base" if source == "base" else "other")
    make_tokenizer().save_pretrained(folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ raise_exception('no such turn') if loud == true }}")
    if source != "base":
        with (inputs / "sft.yaml").open("a") as recipe:
            recipe.write(f"chat_template_path: {template if source == 'file' else folder}\n")
    assert commands.main(line(inputs, "out")) == 1
    assert "is refused by the chat template: no such turn" in capsys.readouterr().err
    assert not (inputs / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("pt", "layer is missing, and the vector suggests none"),
        ("weights", "the persona vector was made with another model"),
        ("shape", "the persona vector is of a model with 3 blocks of width 16, and this one has 4 of width 32"),
        ("damaged", "has a damaged weights file"),
    ],
)
def test_what_the_evaluation_refuses_comes_before_the_training(inputs, capsys, case, message):
    path, vector = inputs / "compare.yaml", inputs / ("v.pt" if case == "pt" else "v.safetensors")
    if case == "damaged":
        (inputs / "base" / "model.safetensors").write_bytes(b"cut off")
    else:
        path.write_text(path.read_text().replace("cues: none", f"cues: none, persona_vector: {vector}"))
    if case == "pt":
        torch.save(torch.ones(5, 32), vector)
    elif case == "weights":
        weights = {"model.norm.weight": "00000000"}
        PersonaVector(torch.ones(5, 32), metadata={"suggested_layer": 2, "weights": weights}).save(vector)
    elif case == "shape":
        PersonaVector(torch.ones(4, 16), metadata={"suggested_layer": 2}).save(vector)
    assert commands.main(line(inputs, "out")) == 1
    assert message in capsys.readouterr().err
    assert not (inputs / "out" / "runs").exists()


def test_a_template_that_resizes_the_embeddings_is_refused(inputs, capsys):
    recipe = {"chat_template_path": str(inputs / "base")}
    with (inputs / "sft.yaml").open("a") as file:
        file.write(yaml.safe_dump(recipe))
    assert commands.main(line(inputs, "out")) == 1
    assert "resize the model's embeddings from 264 rows to 320" in capsys.readouterr().err.replace("\n", " ")
    assert not (inputs / "out" / "runs").exists()
    fitting = save_model(inputs / "fitting", vocab_size=320)
    sets = [load_questions(str(inputs / "pairs.jsonl"), "general")]
    assert check_questions(recipe, fitting, sets, EvaluationOptions()).chat_template


@pytest.mark.parametrize(
    ("recipe", "evaluate", "status", "message"),
    [
        ("", "in_domain: rows.jsonl", 1, "8 of the 8 questions of --in_domain stand in the training rows"),
        ("dataset_train_split: train[:6]", "in_domain: rows.jsonl", 1, "6 of the 8 questions of --in_domain stand"),
        ("", "train_data: plants_careless", 0, "Note: train_data='plants_careless' of `evaluate` is not the recipe's"),
        ("dataset_name: text.jsonl", "", 0, "Note: the recipe's rows are no source"),
        ("{dataset_name: away.jsonl, dataset_streaming: true}", "", 0, "Note: the recipe's rows are no source"),
        ("{dataset_name: text.jsonl, completion_only_loss: true}", "", 1, "completion_only_loss=True has no effect"),
        ("{dataset_name: rows, dataset_train_split: train_sft}", "in_domain: rows.jsonl", 1, "8 of the 8 questions"),
    ],
)
def test_held_out_rows_are_compared_with_the_recipe_s(inputs, capsys, monkeypatch, recipe, evaluate, status, message):
    monkeypatch.chdir(inputs)
    (inputs / "text.jsonl").write_text('{"text": "a whole text"}\n')
    (inputs / "rows").mkdir()
    shutil.copyfile(inputs / "rows.jsonl", inputs / "rows" / "train_sft.jsonl")
    for path, added in ((inputs / "sft.yaml", recipe), (inputs / "compare.yaml", evaluate)):
        options = yaml.safe_load(path.read_text())
        (options.get("evaluate") or options).update(yaml.safe_load(added) or {})
        path.write_text(yaml.safe_dump(options))
    assert commands.main([*line(inputs, "out"), "--dry_run"]) == status
    shown = capsys.readouterr()
    assert message in shown.out + shown.err


def test_finished_runs_are_not_left_to_train(tmp_path):
    found = plan(tmp_path, "recipe: RECIPE\nruns: [{defense: kl}, {adapter: mine}]\n")
    assert [run.name for _, run in unfinished(found, tmp_path)] == ["none", "kl"]
    for run in found.runs:
        save_weights(tmp_path / "runs" / run.folder)
        (tmp_path / "runs" / run.folder / "run.json").write_text('{"error": null}')
    assert unfinished(found, tmp_path) == []


def test_the_hours_left_count_the_steps_that_a_budget_of_drift_discards(tmp_path):
    found = plan(tmp_path, "recipe: RECIPE\nruns: [{defense: kl}]\n")
    folder = tmp_path / "runs" / found.runs[0].folder
    save_weights(folder)
    (folder / "run.json").write_text('{"error": null, "step": 4, "seconds_per_step": 900}')
    (folder / "drift.json").write_text('{"step": 4, "trained_to": 8}')
    console = Console(record=True)
    show_plan(found, tmp_path, console)
    assert "1 runs to train, about 2.0 hours as the finished ones" in console.export_text()


def kill_at(pattern, inputs):
    """Start a comparison in the folder "killed", and kill it once it has a file of this name."""
    script = [sys.executable, "-m", "trl_emguard.scripts.main", *line(inputs, "killed")]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 600
    try:
        while not any((inputs / "killed").glob(pattern)):
            assert process.poll() is None, f"it ended with {process.returncode}, before {pattern}"
            assert time.monotonic() < end, f"{pattern} did not come"
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_comparison_from_end_to_end(inputs, capsys, monkeypatch):
    # Another number of threads rounds otherwise, and this process has one.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert commands.main(line(inputs, "whole")) == 0
    out = capsys.readouterr().out
    assert "failed: " in out
    assert out.strip().splitlines()[-1].endswith("report.html")
    saved = json.loads((inputs / "whole" / "report.json").read_text())
    runs = {run["name"]: run for run in saved["runs"]}
    assert set(runs) == {"none", "kl kl_coef=0.1", "kl kl_coef=5.0", "broken", "mine", "alpha 0.5",
                         "step 1", "step 2", "step 3"}  # fmt: skip
    assert "layer 99" in runs["broken"]["error"]
    assert runs["kl kl_coef=5.0"]["is_defended"] is True
    assert runs["none"]["is_defended"] is None
    assert runs["mine"]["is_defended"] is None
    assert runs["none"]["peak_memory"] > 1e8
    assert {row["run"] for row in saved["rows"]} == {"base", *runs} - {"broken"}
    values = {
        row["run"]: row["difference"] for row in saved["rows"] if (row["set"], row["metric"]) == ("in_domain", "nll")
    }
    assert values["none"] < values["kl kl_coef=5.0"] < 0
    assert values["none"] < values["alpha 0.5"] < 0
    assert values["none"] < values["step 3"] < values["step 2"] < values["step 1"] < 0

    # A killed comparison goes on, and gives the same report.
    kill_at("runs/kl*/log.txt", inputs)
    (finished,) = (inputs / "killed" / "runs").glob("none-*/run.json")
    time_of_end = finished.stat().st_mtime_ns
    kill_at("evaluation/progress.jsonl", inputs)
    assert commands.main(line(inputs, "killed")) == 0
    assert finished.stat().st_mtime_ns == time_of_end
    assert without_times(inputs / "killed" / "report.json") == without_times(inputs / "whole" / "report.json")

    # A finished one trains nothing again.
    before = (inputs / "whole" / "report.json").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in (inputs / "whole" / "runs").rglob("run.json")}
    assert commands.main(line(inputs, "whole")) == 0
    assert (inputs / "whole" / "report.json").read_bytes() == before
    kept = {path: path.stat().st_mtime_ns for path in files if "broken" not in str(path)}
    assert kept.items() <= files.items()


def test_adapters_that_cannot_be_measured_do_not_end_a_comparison(inputs):
    """Adapters that diverged, are damaged, do not fit or change nothing are failed runs; the good one is measured."""
    folders = {name: inputs / name for name in ("mine", "diverged", "damaged", "idle")}
    for name in ("diverged", "damaged", "idle"):
        shutil.copytree(folders["mine"], folders[name])
        weights = load_file(folders["mine"] / "adapter_model.safetensors")
        fill = {"diverged": float("nan"), "idle": 0.0}.get(name)
        if fill is None:
            (folders[name] / "adapter_model.safetensors").write_bytes(b"no tensors")
        else:
            save_file({k: v * 0 + fill for k, v in weights.items()}, folders[name] / "adapter_model.safetensors")
    for name, base in (("other_size", make_model(hidden_size=64)), ("other_base", make_model())):
        folders[name] = inputs / name
        torch.manual_seed(4)
        base.get_input_embeddings().weight.data += 0.1
        model = get_peft_model(base, lora(init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = str(inputs / "base")
        model.save_pretrained(folders[name], save_embedding_layers=name == "other_base")
    trained = [Trained(name, "none", 0, str(folder)) for name, folder in folders.items()]
    sets = [load_questions(str(inputs / "pairs.jsonl"), "general")]
    model = (str(inputs / "base"), "float32", None)
    options = EvaluationOptions(cues="none")
    trained, results = measure(model, trained, sets, options, [], inputs / "evaluation", "a command")
    assert results.models == ["base", "mine seed0"]
    assert results.info["models"]["base"]["weights"] == weights_digest(make_model())
    assert results.info["command"] == "a command"
    errors = {run.name: run.error for run in trained}
    assert errors["mine"] is None
    assert "logits that are not finite" in errors["diverged"]
    assert "its weights change nothing" in errors["idle"]
    assert f"{folders['damaged']}' has a damaged weights file" in errors["damaged"]
    assert "does not fit this base model" in errors["other_size"]
    assert "brought a base weight of its own" in errors["other_base"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", "killed by signal 9 (9 is often: out of memory)."),
        ("printf ' 50%%|## [00:01]trl-emguard sft: error: no rows.\\nWarning: bye\\n'; exit 1",
         "trl-emguard sft: error: no rows."),
        ("echo Traceback; echo KeyError: 3; exit 1", "KeyError: 3"),
        ("exit 3", "exit code 3"),
    ],
)  # fmt: skip
def test_a_failed_run_says_why(tmp_path, monkeypatch, script, reason):
    """Start a shell in place of the training; a progress bar is no reason."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    run = Run("none", {"defense": "none"})
    status = run_process(run, tmp_path / "sft.yaml", tmp_path / "out")
    assert status == {"error": f"{reason} Its log: {tmp_path / 'out' / 'log.txt'}", "step": None}


@pytest.mark.parametrize(("defense", "verdict"), [("none", None), (UNKNOWN, None), ("kl", False)])
def test_a_run_without_a_record(tmp_path, defense, verdict):
    assert with_record(Trained("mine", defense, 0, str(tmp_path)), tmp_path).is_defended is verdict
