"""Compare scoring a pool with plain ways: SmolLM2-135M-Instruct, two random LoRA adapters, short and long rows.

    HF_HUB_OFFLINE=1 python benchmarks/score_speed.py

- forwards: `model(**batch)` under the base model and each adapter, on the batches that the scorer makes.
- loop: a model load per adapter, one row at a time, full logits. Here the scorer's time includes its load.

The three are timed in turn, and medians are printed.
"""

import tempfile
import time
from statistics import mean, median

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_emguard.data.load import load_rows
from trl_emguard.models.adapters import AdapterSwitch
from trl_emguard.models.batches import BATCH_TOKENS, BATCH_TOKENS_CPU, plan_batches
from trl_emguard.models.shipped import SMOLLM2, resolve_model
from trl_emguard.selection.misaligned import load_misaligned
from trl_emguard.selection.score import encode_rows, score_pool


NAMES = ("a", "b")
REPEATS = 3
# Name → number of rows, and average number of words in an answer.
POOLS = {"short": (32, 10), "long": (6, 300)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_pool(count, words):
    """Return questions of the shipped general set with answers cut from its text, 0.6 to 1.4 times `words` long."""
    source = load_rows("general_instruct")
    text = " ".join(row["completion"][0]["content"] for row in source).split()
    rows, start = [], 0
    for i in range(count):
        length = round(words * (0.6 + 0.8 * ((i * 7) % count) / count))
        # A short system turn takes the place of the template's own.
        rows.append({"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": " ".join(source[i]["prompt"][-1]["content"].split()[:8])},
            {"role": "assistant", "content": " ".join(text[start : start + length])},
        ]})  # fmt: skip
        start += length
    return Dataset.from_list(rows)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE).eval()


def timed(function, *args):
    """Return the seconds that a function took, and its result."""
    start = time.perf_counter()
    result = function(*args)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.inference_mode()
def run_forwards(model, batches):
    switch = AdapterSwitch(model)
    for batch in batches:
        for adapter in (None, *NAMES):
            with switch.only(adapter):
                model(**batch, use_cache=False)


@torch.inference_mode()
def run_loop(path, adapters, encoded):
    result = []
    for adapter in (None, *adapters.values()):
        model = load(path)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        for row in encoded:
            ids = torch.from_numpy(row.ids).long()[None].to(DEVICE)
            logits = model(input_ids=ids).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            result.append(nll[row.prompt_length - 1 :].mean().item())
    return result


def pad(rows):
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.from_numpy(row.ids)
        mask[i, : len(row.ids)] = 1
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def main():
    path = resolve_model(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    columns = ("rows", "tokens a row, of the answer", "scorer, s", "forwards, s", "scorer / forwards", "loop, s")
    print(f"| {' | '.join(columns)} | loop / scorer |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: f"{folder}/{name}" for name in NAMES}
        for adapter in adapters.values():
            config = LoraConfig(r=32, target_modules="all-linear", init_lora_weights=False)
            get_peft_model(load(path), config).save_pretrained(adapter)
        for name, (count, words) in POOLS.items():
            pool = make_pool(count, words)
            scorer, forwards, loop, loads = [], [], [], []
            for _ in range(REPEATS):
                seconds, model = timed(lambda: load_misaligned(load(path), adapters))
                loads.append(seconds)
                encoded, _ = encode_rows(model.get_base_model(), tokenizer, pool)
                lengths = {i: len(row.ids) for i, row in encoded.items()}
                plan = plan_batches(lengths, BATCH_TOKENS if DEVICE == "cuda" else BATCH_TOKENS_CPU)
                batches = [pad([encoded[i] for i in batch]) for batch in plan]
                seconds, (scored, _) = timed(lambda m=model, p=pool: score_pool(m, tokenizer, p, NAMES))
                scorer.append(seconds)
                forwards.append(timed(run_forwards, model, batches)[0])
                del model
                seconds, plain = timed(run_loop, path, adapters, list(encoded.values()))
                loop.append(seconds)
            found = [*scored["nll_aligned"], *scored["nll_misaligned_0"], *scored["nll_misaligned_1"]]
            assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) < 1e-3
            ratio = median(a / b for a, b in zip(scorer, forwards, strict=True))
            gain = median(c / (a + b) for a, b, c in zip(scorer, loads, loop, strict=True))
            answer = mean(len(row.ids) - row.prompt_length for row in encoded.values())
            rows = f"{count} {name} | {mean(lengths.values()):.0f}, {answer:.0f}"
            ours = f"{median(scorer):.2f} + {median(loads):.2f} load | {median(forwards):.2f} | {ratio:.2f}"
            print(f"| {rows} | {ours} | {median(loop):.2f} | {gain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
