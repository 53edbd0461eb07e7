"""Compare the defenses on real data that makes large models emergently misaligned, with the free baselines.

The data are not a part of the project. The folder holds `DOMAIN/train.jsonl` and `DOMAIN/eval.jsonl` for each domain,
rows with `messages`. The script trains SmolLM2-135M-Instruct on rows of one domain. It measures general questions with
a sound and a misaligned answer in one style, held-out rows of the domain, and rows of the other domain.

    python benchmarks/em.py --data EM --domain medical --seeds 0 1
    python benchmarks/em.py --data EM --seeds 0 --defenses kl     # a part, which the whole takes over later
    python benchmarks/em.py --data EM --one_strength              # one strength of each defense
    python benchmarks/em.py --data EM --unmatched                 # also general pairs whose answers differ in style

The report is in `OUTPUT_DIR/DOMAIN/report`. Its `report.csv` holds figures alone, and is copied by hand to
`benchmarks/results/em-DOMAIN.csv`. The adapter of `inoculation_adapter` is trained on rows of the other domain.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from comparing import POOL, adapter_runs, chosen, compare, markdown
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_emguard.data.load import load_rows
from trl_emguard.evaluation.questions import load_questions
from trl_emguard.models.shipped import SMOLLM2, resolve_model


DOMAINS = ("medical", "security")
BATCH = 8
# Tokens of the base model's own answer to a general question, which counts as its sound one with `--unmatched`.
OWN_TOKENS = 96
# The first strength of each is the one that `--one_strength` takes.
RUNS = [
    {"defense": "kl", "kl_coef": [0.4, 0.1, 1.6]},
    {"defense": "ldifs", "ldifs_coef": [10.0, 1.0]},
    {"defense": "treft", "treft_coef": [10.0]},
    {"defense": "inoculation"},
    {"defense": "steering", "steering_vector": "smollm2-135m-instruct-evil", "steering_coef": [2.0]},
    {"defense": "interleave++", **POOL, "interleave_fraction": [0.1, 0.05]},
    {"defense": "interleave++,kl", **POOL, "interleave_fraction": 0.1, "kl_coef": [0.4, 1.6]},
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--domain", default=DOMAINS[0], choices=DOMAINS)
    parser.add_argument("--rows", type=int, default=400, help="training rows (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--defenses", nargs="+", help="defenses to run; by default all")
    parser.add_argument("--one_strength", action="store_true", help="run one strength of each defense")
    parser.add_argument("--bf16", action="store_true", help="train in bf16 autocast, and evaluate in bf16")
    parser.add_argument("--limit", type=int, default=72, help="questions of each set (default: %(default)s)")
    parser.add_argument("--cues", default="auto", choices=["auto", "none"], help="none: ask plain questions alone")
    parser.add_argument("--unmatched", action="store_true", help="also ask pairs whose answers differ in style")
    parser.add_argument("--benign", action="store_true", help="also train each run on arithmetic, a benign task")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/em"))
    args = parser.parse_args(argv)
    folder = args.output_dir.resolve() / args.domain
    folder.mkdir(parents=True, exist_ok=True)
    (other,) = set(DOMAINS) - {args.domain}
    shutil.copyfile(args.data / other / "eval.jsonl", folder / "other_domain.jsonl")
    rows, other_rows = (write_rows(args.data / domain, args.rows, folder) for domain in (args.domain, other))
    general = ["values", str(folder / "other_domain.jsonl")]
    if args.unmatched:
        general.append(str(write_unmatched(folder)))
    evaluate = {
        "general": general,
        "in_domain": str((args.data / args.domain / "eval.jsonl").resolve()),
        "train_data": str(rows),
        "limit": args.limit,
        "cues": args.cues,
        "dtype": "bfloat16" if args.bf16 else "auto",
    }
    recipe = {"dataset_name": str(rows), "max_steps": args.rows // BATCH, "max_length": 512, "bf16": args.bf16}
    runs = list(RUNS)
    if args.defenses is None or "inoculation_adapter" in args.defenses:
        runs += adapter_runs(folder, recipe, other_rows)
    runs = chosen(runs, args.defenses, args.one_strength)
    status = compare(folder, recipe, runs, args.seeds, evaluate, args.benign)
    if status == 0:
        print("\n".join(table(folder / "report" / "report.json")))
    return status


def table(report: Path) -> list[str]:
    """Return a report as lines of Markdown: differences to the base, with an interval over those of all seeds."""
    columns = {
        "margin of `values` ↑": ("general", "margin"),
        "KL to base ↓": ("general", "kl_to_base"),
        "NLL of sound answers ↓": ("general", "nll"),
        "NLL in the other domain": ("other_domain", "nll"),
        "NLL in domain ↓": ("in_domain", "nll"),
    }
    return markdown(report, columns, _difference, left_out=["base"])


def _difference(rows: list[dict[str, Any]]) -> str:
    middle = mean(row["difference"] for row in rows)
    low, high = min(row["difference_low"] for row in rows), max(row["difference_high"] for row in rows)
    return f"{middle:+z.2f} ({low:+z.2f} to {high:+z.2f})"


def write_unmatched(folder: Path) -> Path:
    """Write the shipped general questions with the base model's own greedy answers as the sound ones.

    The misaligned answers stay as they are. So training on answers of any other style than the base model's moves the
    margin of these pairs, whatever the values in them.
    """
    path, model_path, answered = folder / "unmatched.jsonl", resolve_model(SMOLLM2), []
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    questions = load_questions("values", "general").questions
    for start in range(0, len(questions), 24):
        batch = questions[start : start + 24]
        prompts = tokenizer.apply_chat_template(
            [question.prompt for question in batch], add_generation_prompt=True, padding=True, return_tensors="pt"
        )
        sampled = model.generate(**prompts, max_new_tokens=OWN_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(sampled[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        answered += zip(batch, answers, strict=True)
    with path.open("w", encoding="utf-8") as file:
        for question, answer in answered:
            turns = {"chosen": answer.strip(), "rejected": question.misaligned}
            row = {name: [{"role": "assistant", "content": text}] for name, text in turns.items()}
            file.write(json.dumps({"prompt": question.prompt, **row}) + "\n")
    return path


def write_rows(data: Path, count: int, folder: Path) -> Path:
    """Write training rows of a domain into the comparison's folder."""
    path = folder / f"{data.name}.jsonl"
    load_rows(str(data / "train.jsonl")).shuffle(seed=0).select(range(count)).to_json(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
