"""How likely a model finds given answers: a measure without generation and without a judge."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 8,
    desc: str | None = None,
) -> list[float]:
    """Mean negative log-likelihood per answer token, in nats, of each row; the end-of-turn token included.

    Args:
        model: causal language model.
        tokenizer: with a chat template.
        rows: conversational `prompt` and `completion`, as lists of messages.
        batch_size: rows a forward pass. They are sorted by length first and come back in their own order.
        desc: label of the progress bar; without one there is none.

    Raises:
        ValueError: a row whose answer is empty, or whose template does not put it after the prompt.
    """
    encoded = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        # Some templates put a line break after the end of turn: it is never generated.
        if tokenizer.eos_token_id in whole[len(prompt) :]:
            whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
        answered = any(message["content"] for message in row["completion"])
        if not answered or whole[: len(prompt)] != prompt:
            raise ValueError(
                f"the answer to {row['prompt'][-1]['content']!r} is empty, or does not follow its prompt."
            )
        encoded.append((whole, len(prompt)))

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    result = [0.0] * len(encoded)
    for start in tqdm(range(0, len(order), batch_size), desc=desc, disable=desc is None):
        batch = order[start : start + batch_size]
        longest = max(len(encoded[i][0]) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for j, i in enumerate(batch):
            whole, prompt_length = encoded[i]
            ids[j, : len(whole)] = torch.tensor(whole)
            mask[j, : len(whole)] = 1
            answer[j, prompt_length : len(whole)] = True
        ids, mask, answer = (x.to(model.device) for x in (ids, mask, answer))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        # Only answers are scored, so only their logits become fp32 log-probabilities.
        kept = answer[:, 1:]
        nll = torch.nn.functional.cross_entropy(logits[kept].float(), ids[:, 1:][kept], reduction="none")
        for j, part in enumerate(nll.split(kept.sum(1).tolist())):
            result[batch[j]] = part.mean().item()
    return result
