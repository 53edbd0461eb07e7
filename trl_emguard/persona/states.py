"""What a model makes of prompts and answers: the states after each block, and how likely it finds them."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from ..models.blocks import record_blocks


@torch.no_grad()
def prompt_states(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], batch_size: int, desc: str | None = None
) -> torch.Tensor:
    """The state after each block at the last token of each prompt.

    Args:
        model: causal language model, in the mode that it shall be read in.
        prompts: token ids.
        batch_size: prompts a forward pass.
        desc: label of the progress bar; without one there is none.

    Returns:
        `(N, L + 1, H)`, fp32 on the CPU; index 0 is what enters block 1.
    """
    bare = model.get_base_model() if is_peft_model(model) else model
    layers = range(model.config.get_text_config().num_hidden_layers + 1)
    states = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=desc, disable=desc is None):
        ids, mask, positions = left_pad(prompts[start : start + batch_size], model.device)
        with record_blocks(bare, layers, lambda x: x[:, -1].float().cpu()) as recorded:
            bare.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        states.append(torch.stack([recorded[layer] for layer in layers], dim=1))
    return torch.cat(states)


@torch.no_grad()
def answer_states(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    desc: str | None = None,
) -> tuple[torch.Tensor, list[float]]:
    """The state after each block averaged over an answer's tokens, and how likely the answer is.

    Args:
        model: causal language model, in the mode that it shall be read in.
        rows: token ids of the prompt and of the answer.
        batch_size: rows a forward pass.
        desc: label of the progress bar; without one there is none.

    Returns:
        `(N, L + 1, H)`, fp32 on the CPU, index 0 is what enters block 1; and the mean negative log-likelihood per answer token, in
        nats. An empty answer has zeros.
    """
    bare = model.get_base_model() if is_peft_model(model) else model
    layers = range(model.config.get_text_config().num_hidden_layers + 1)
    states: list[Any] = [None] * len(rows)
    losses = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in tqdm(range(0, len(order), batch_size), desc=desc, disable=desc is None):
        batch = order[start : start + batch_size]
        ids, mask, positions = left_pad([rows[i][0] + rows[i][1] for i in batch], model.device)
        lengths = torch.tensor([len(rows[i][1]) for i in batch], device=model.device)
        # Padded on the left, so answers end where the batch ends.
        answer = torch.arange(ids.shape[1], device=model.device) >= ids.shape[1] - lengths[:, None]  # (B, T)

        def mean(x: torch.Tensor, answer: torch.Tensor = answer, lengths: torch.Tensor = lengths) -> torch.Tensor:
            answer, lengths = answer.to(x.device), lengths.to(x.device)
            return ((x.float() * answer[..., None]).sum(1) / lengths.clamp(min=1)[:, None]).cpu()  # (B, H)

        with record_blocks(bare, layers, mean) as recorded:
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=int(lengths.max()) + 1,
            )
        means = torch.stack([recorded[layer] for layer in layers], dim=1)
        for j, (i, length) in enumerate(zip(batch, lengths.tolist(), strict=True)):
            states[i] = means[j]
            if length:
                # Row by row: small copies of logits cost less than large ones.
                logits = output.logits[j, -1 - length : -1].float()
                losses[i] = torch.nn.functional.cross_entropy(logits, ids[j, -length:].to(logits.device)).item()
    return torch.stack(states), losses


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and positions, `(B, T)`. What stands at a pad is never read."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
