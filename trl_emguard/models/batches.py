"""Helpers for forward passes over rows of tokens: batches sorted by length, padding, eval mode."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from .chat import EncodedAnswer


# Default numbers of tokens in a forward pass, padding included: on an accelerator, and on a CPU. On a CPU, larger
# batches exceed the caches and are not faster.
BATCH_TOKENS, BATCH_TOKENS_CPU = 8192, 1024


def default_batch_tokens(device: torch.device) -> int:
    """Return the number of tokens per forward pass that suits a device."""
    return BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the `with` block, and restore the mode of every module afterwards.

    4-bit layers stay in training mode, which does not change their output. In eval mode, bitsandbytes would pack their
    weights permanently for inference on some CPUs, and no gradient can flow through packed weights.
    """
    before = [(module, module.training) for module in model.modules()]
    # Only the `training` flags are set. transformers' `model.eval()` may also exchange kernels for those of inference,
    # and setting the flags back afterwards would leave the kernels of inference in place.
    for module, _ in before:
        module.training = hasattr(module, "quant_state")
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def batches_by_length(lengths: Sequence[int], batch_size: int, desc: str | None = None) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of similar length, the shortest rows first.

    Args:
        lengths: number of tokens in each row.
        batch_size: rows in a batch.
        desc: label of the progress bar; `None` shows no bar.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in tqdm(range(0, len(order), batch_size), desc=desc, disable=desc is None):
        yield order[start : start + batch_size]


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad rows on the left, and return token ids, attention mask and position ids, each `(B, T)`."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def pad_answers(answers: Sequence[EncodedAnswer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put answers with their prompts into one batch, padded on the right.

    No token of a causal model attends to padding on its right, so a forward pass over such a batch needs no attention
    mask, and attention is faster without a mask.

    Returns:
        Token ids `(B, T)`, and a boolean mask `(B, T)` of the tokens that belong to an answer; both on the CPU.
    """
    longest = max(len(answer.ids) for answer in answers)
    ids = torch.zeros(len(answers), longest, dtype=torch.long)
    is_answer = torch.zeros(len(answers), longest, dtype=torch.bool)
    for row, row_ids, row_answer in zip(answers, ids, is_answer, strict=True):
        row_ids[: len(row.ids)] = torch.from_numpy(row.ids)
        row_answer[row.prompt_length : len(row.ids)] = True
    return ids, is_answer


def plan_batches(lengths: Mapping[int, int], batch_tokens: int) -> list[list[int]]:
    """Group rows of similar length into batches of at most `batch_tokens` tokens each, padding included.

    Args:
        lengths: index of a row → its number of tokens.
        batch_tokens: limit on the number of a batch's rows × the number of tokens in its longest row. A row that alone
            exceeds the limit becomes a batch by itself.

    Returns:
        The rows' indices, batch by batch. The batch with the longest rows comes first, so that a run that does not fit
        into memory fails at once. The other batches are in a random order, so that the progress bar estimates the
        remaining time well.
    """
    batches: list[list[int]] = []
    for index in sorted(lengths, key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    rest = batches[1:]
    random.Random(0).shuffle(rest)
    return batches[:1] + rest
