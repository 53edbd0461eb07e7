"""Cost of an evaluation beside the passes it consists of, on SmolLM2-135M with three adapters, in one process.

Probes: every shipped pair under the base model and three adapters, against plain forward passes of the same batches.
Sampling: answers to the shipped questions, against `model.generate` on the same batches, by tokens a second.
"""

import time
from typing import Any

import torch
from harness import environment, parse_args, statistics, time_in_turn, write_csv
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_emguard.evaluation.answers import answer_batches, plan_prompts
from trl_emguard.evaluation.candidates import from_adapters
from trl_emguard.evaluation.cues import families
from trl_emguard.evaluation.probes import encode_rows, probe
from trl_emguard.evaluation.questions import load_questions
from trl_emguard.models.batches import default_batch_tokens, left_pad, pad_answers, plan_batches
from trl_emguard.models.shipped import SMOLLM2, resolve_model


ADAPTERS = ("a1", "a2", "a3")
SAMPLED_TOKENS, SAMPLED_AT_ONCE = 60, 32


def load_models(device: str) -> tuple[list, Any]:
    """Return the base model with three random adapters as candidates, and the tokenizer."""
    path = resolve_model(SMOLLM2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    for name in ADAPTERS:
        config = LoraConfig(r=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        if name == ADAPTERS[0]:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return from_adapters(model.eval(), ADAPTERS), AutoTokenizer.from_pretrained(path)


def time_probes(
    candidates: list, tokenizer: Any, limit: int | None, rounds: int, device: str
) -> dict[str, list[float]]:
    """Return the seconds of the probes, and of plain forward passes of the same batches."""
    questions = load_questions("values", "general", limit=limit)
    (plain,), _ = families(tokenizer, questions.questions, "none")
    rows = encode_rows(candidates, tokenizer, questions, plain)
    lengths = {i: len(row.answer.ids) for i, row in enumerate(rows)}
    plan = plan_batches(lengths, default_batch_tokens(torch.device(device)))
    batches = [pad_answers([rows[i].answer for i in batch])[0].to(device) for batch in plan]

    def forward() -> None:
        for ids in batches:
            for candidate in candidates:
                with candidate.acting() as model, torch.inference_mode():
                    model(input_ids=ids, use_cache=False)

    calls = {"probes": lambda: probe(candidates, rows, len(questions.questions)), "forward passes": forward}
    for call in calls.values():
        call()
    return time_in_turn(calls, rounds, device)


def time_sampling(candidates: list, tokenizer: Any, limit: int | None, rounds: int) -> dict[str, list[float]]:
    """Return the seconds a token of the sampler, and of `generate` with torch's own sampling, on the same batches."""
    questions = load_questions("values", "general", limit=limit)
    (plain,), _ = families(tokenizer, questions.questions, "none")
    prompts = plan_prompts(tokenizer, questions, plain, 1, 0)
    base = candidates[0]
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=SAMPLED_TOKENS, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip

    def ours() -> int:
        batches = answer_batches(base, tokenizer, prompts, SAMPLED_AT_ONCE, SAMPLED_TOKENS, 1.0)
        return sum(len(answer["ids"]) + 1 for batch in batches for answer in batch)

    def generate() -> int:
        count = 0
        for start in range(0, len(prompts), SAMPLED_AT_ONCE):
            batch = [prompt.ids for prompt in prompts[start : start + SAMPLED_AT_ONCE]]
            with base.acting() as model, torch.inference_mode():
                ids, mask, _ = left_pad(batch, model.device)
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            count += sum((row != tokenizer.pad_token_id).sum().item() + 1 for row in out[:, ids.shape[1] :])
        return count

    seconds: dict[str, list[float]] = {"sampler": [], "generate": []}
    for turn in range(rounds + 1):
        for name, call in (("sampler", ours), ("generate", generate)):
            start = time.perf_counter()
            tokens = call()
            if turn:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / tokens)
    return seconds


def main() -> None:
    args = parse_args(__doc__)
    limit = 4 if args.quick else None
    torch.manual_seed(0)
    candidates, tokenizer = load_models(args.device)
    rows = []
    for kind, seconds, over in (
        ("probes", time_probes(candidates, tokenizer, limit, min(args.rounds, 3), args.device), "forward passes"),
        ("sampling", time_sampling(candidates, tokenizer, limit, min(args.rounds, 3)), "generate"),
    ):
        rows += [
            {"kind": kind, "variant": name, **statistics(seconds, name, [over]), **environment(args.device)}
            for name in seconds
        ]
    for row in rows:
        print(f"{row['kind']:9} {row['variant']:15} {row['seconds']} s, ratio {row['ratio']}")
    write_csv(args.results / f"evaluate-{args.device}.csv", rows)


if __name__ == "__main__":
    main()
