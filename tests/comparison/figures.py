"""Plans and reports over known figures, the recipe of a tiny training, and an adapter file."""

import torch
from safetensors.torch import save_file

from trl_emguard.comparison.plan import read_plan
from trl_emguard.comparison.report import make_report
from trl_emguard.comparison.runs import Trained
from trl_emguard.evaluation.results import ResultRow, Results


KNOWN = (
    "defense",
    "kl_coef",
    "steering_layers",
    "steering_vector",
    "interleave_dataset",
    "inoculation_adapter",
    "output_dir",
    "seed",
    "save_steps",
)
HOSTILE = "$x^$ <script>alert(1)</script><img src=http://x.y onerror=z> \u202e & 'quotes' \"\x1b[31m\0"
INFO = {"versions": {"trl_emguard": "0"}, "command": "trl-emguard compare", "model": "tiny", "judge": None}

# Recipe of a tiny LoRA training; `base` and `rows` are to be filled in.
RECIPE = """
model_name_or_path: {base}
dataset_name: {rows}
use_peft: true
lora_r: 4
lora_target_modules: all-linear
max_steps: 4
per_device_train_batch_size: 2
learning_rate: 0.01
bf16: false
use_cpu: true
activation_checkpointing: false
save_strategy: "no"
report_to: none
output_dir: unused
"""


def plan(tmp_path, text, recipe="max_steps: 3\n", output_dir="out"):
    (tmp_path / "sft.yaml").write_text(recipe)
    (tmp_path / "compare.yaml").write_text(text.replace("RECIPE", str(tmp_path / "sft.yaml")))
    return read_plan(str(tmp_path / "compare.yaml"), KNOWN, ["steering_layers"], tmp_path / output_dir)


def save_weights(folder):
    """Write an adapter's file of weights, so that the run of this folder counts as trained."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors")


def row(model, set, metric, value, width=0.1, family="plain"):
    low, high = value - width, value + width
    return ResultRow(model, set, family, metric, value, low, high, 9, 0.0, value, low, high)


def results(rows, samples=()):
    return Results(list(rows), list(samples), criteria={"general": "general", "in_domain": "in_domain"})


def report(figures, samples=(), baselines=(), **fields):
    """Return the report of runs with known differences in margin (broad) and in NLL in domain (narrow).

    Baselines, and runs whose name begins with "none", have no defense. The others have `kl`.
    """
    undefended = {name for name in figures if name in baselines or name.startswith("none")}
    trained = [
        Trained(name, "none" if name in undefended else "kl", 0, "x", is_baseline=name in baselines, **fields)
        for name in figures
    ]
    rows = []
    for run in trained:
        margin, nll = figures[run.name]
        rows += [row(run.key, "general", "margin", margin), row(run.key, "in_domain", "nll", nll)]
    return make_report(trained, results(rows, samples))
