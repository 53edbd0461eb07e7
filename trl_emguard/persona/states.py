"""Hidden states after each decoder block: at the last token of each prompt, or averaged over each answer's tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from ..models.adapters import bare_model
from ..models.batches import batches_by_length, left_pad, pad_answers
from ..models.blocks import record_blocks
from ..models.chat import EncodedAnswer
from ..models.likelihood import mean_nll


@torch.no_grad()
def prompt_states(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], batch_size: int, desc: str | None = None
) -> torch.Tensor:
    """Return the state after each block at the last token of each prompt.

    Args:
        model: causal language model; its mode (train or eval) is not changed.
        prompts: token ids of each prompt.
        batch_size: prompts in a forward pass.
        desc: label of the progress bar; `None` shows no bar.

    Returns:
        `(N, L + 1, H)` for N prompts and L blocks, fp32 on the CPU. Layer 0 is the input of block 1.
    """
    bare = bare_model(model)
    layers = _all_layers(model)
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
    """Return each answer's state after every block, averaged over the answer's tokens, and its mean NLL per token.

    Args:
        model: causal language model; its mode (train or eval) is not changed.
        rows: token ids of the prompt and of the answer.
        batch_size: rows in a forward pass.
        desc: label of the progress bar; `None` shows no bar.

    Returns:
        States `(N, L + 1, H)` for N answers and L blocks, fp32 on the CPU, with the input of block 1 as layer 0; and
        N mean negative log-likelihoods (NLLs) per token, in nats. For an empty answer, both are 0.
    """
    answers = [EncodedAnswer(np.array(prompt + answer, dtype=np.int32), len(prompt)) for prompt, answer in rows]
    layers = _all_layers(model)
    states: list[Any] = [None] * len(rows)
    losses = [0.0] * len(rows)
    for batch in batches_by_length([len(answer.ids) for answer in answers], batch_size, desc):
        ids, is_answer = pad_answers([answers[i] for i in batch])

        def mean(x: torch.Tensor, is_answer: torch.Tensor = is_answer) -> torch.Tensor:
            kept = is_answer.to(x.device)
            return ((x.float() * kept[..., None]).sum(1) / kept.sum(1).clamp(min=1)[:, None]).cpu()  # (B, H)

        with record_blocks(bare_model(model), layers, mean) as recorded:
            nll = mean_nll(model, ids, is_answer).tolist()
        means = torch.stack([recorded[layer] for layer in layers], dim=1)
        for j, i in enumerate(batch):
            states[i], losses[i] = means[j], nll[j]
    return torch.stack(states), losses


def _all_layers(model: PreTrainedModel | PeftModel) -> range:
    return range(model.config.get_text_config().num_hidden_layers + 1)
