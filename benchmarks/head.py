"""The head of a defended step against the matrix products that it cannot do without, and its memory against its byte
budget.

    make bench       # on CPU, this and the others
    make bench-gpu   # on CUDA

Frozen head, so three products: policy's logits, reference's logits, gradient of the policy's states.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from harness import environment, parse_args, peak_memory, statistics, time_in_turn, write_csv
from torch.nn.functional import cross_entropy, kl_div
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_emguard.ops import ce_divergence_head
from trl_emguard.ops.head import TILE_BYTES


# Tokens N, vocabulary V, width H. On CPU SmolLM2's head; on CUDA those of Qwen2.5-7B and -0.5B with the labels of
# 8192 tokens.
SIZES = {"cpu": [(1000, 49152, 576)], "cuda": [(8192, 152064, 3584), (8192, 151936, 896)]}
KL_COEF = 0.1
BARE = "three bare GEMMs"


def make_calls(tokens: int, vocab: int, width: int, device: str) -> dict[str, Callable[[], None]]:
    """Name → the work of one step, gradient included. fp32 on CPU, bf16 with fp32 logits on CUDA."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # Spread so that the distributions are those of a model that knows something.
    states = torch.randn(2, tokens, width, device=device).to(dtype)
    hidden, reference = states[0].requires_grad_(), states[1].lerp(states[0].detach(), 0.9)
    weight = (3 * torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    ce_weight = torch.full((tokens,), 1 / tokens, device=device)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        hidden.grad = None

    # Made once: memory that is touched for the first time costs more than the products.
    logits = torch.empty(tokens, vocab, device=device)
    gradient = torch.ones(tokens, vocab, device=device, dtype=dtype)
    product = torch.empty(tokens, width, device=device)
    # fp32 out of bf16, which only CUDA has.
    out_dtype = {} if dtype == torch.float32 else {"out_dtype": torch.float32}

    @torch.no_grad()
    def bare() -> None:
        torch.mm(hidden, weight.t(), out=logits, **out_dtype)
        torch.mm(reference, weight.t(), out=logits, **out_dtype)
        torch.mm(gradient, weight, out=product, **out_dtype)

    def head(direction: str) -> None:
        frozen = (reference, weight, None)
        backward(
            ce_divergence_head(hidden, weight, None, labels, ce_weight, KL_COEF * ce_weight, frozen, direction).loss
        )

    def ce_alone() -> None:
        backward(ce_divergence_head(hidden, weight, None, labels, ce_weight).loss)

    def two_kernels() -> None:
        outputs = ("log_probs", "entropy", "is_top1")
        log_probs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, outputs)
        divergence, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, reference, weight, None, 1.0)
        backward(KL_COEF * divergence.mean() - log_probs.mean())

    def full_logits() -> None:
        logits = (hidden @ weight.t()).float()
        with torch.no_grad():
            log_q = (reference @ weight.t()).float().log_softmax(-1)
        divergence = kl_div(log_q, logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        backward(cross_entropy(logits, labels) + KL_COEF * divergence.mean())

    return {
        BARE: bare,
        "head, CE + reverse KL": lambda: head("reverse"),
        "head, CE + forward KL": lambda: head("forward"),
        "head, CE alone": ce_alone,
        "TRL's two kernels": two_kernels,
        "full logits": full_logits,
    }


def measure(tokens: int, vocab: int, width: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """The rows of the CSV for one size."""
    calls = make_calls(tokens, vocab, width, device)
    memory = {}
    for name, call in calls.items():
        call()
        memory[name] = peak_memory(call, device)
    seconds = time_in_turn(calls, rounds, device)
    rows = []
    for name in calls:
        row = {
            "tokens": tokens,
            "vocab": vocab,
            "width": width,
            "operation": name,
            **statistics(seconds, name, (BARE,)),
        }
        row |= {"peak_mib": round(memory[name] / 2**20, 1), "budget_mib": TILE_BYTES // 2**20}
        rows.append(row | environment(device))
        print(f"{name:>22} {float(row['seconds']):8.3f} s {row['peak_mib']:9.1f} MiB", flush=True)
    return rows


def main() -> None:
    args = parse_args(__doc__)
    began = time.monotonic()
    rows = []
    for tokens, vocab, width in [(50, 4096, 64)] if args.quick else SIZES[args.device]:
        print(f"--- {tokens} tokens, vocabulary {vocab}, width {width}, {time.monotonic() - began:.0f} s", flush=True)
        rows += measure(tokens, vocab, width, args.rounds, args.device)
    write_csv(args.results / f"head-{args.device}.csv", rows)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
