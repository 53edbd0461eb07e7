"""The likelihood of given answers under a model: a measure without generation and without a judge."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..ops import logit_transform
from ..ops import token_nll as head_nll
from .adapters import bare_model
from .batches import batches_by_length, pad_answers
from .chat import encode_answers, end_tokens, template_arguments


# Dtypes of a head whose weight can be multiplied directly. Others are quantised.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Logits of a chunk, where the head computes its product itself: 256 MiB in fp32.
CHUNK_LOGITS = 2**26


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 8,
    desc: str | None = None,
) -> list[float]:
    """Return the mean negative log-likelihood per answer token of each row, in nats; the end-of-turn token included.

    Args:
        model: causal language model. The adapters of a PEFT model act as they stand.
        tokenizer: tokenizer with a chat template.
        rows: conversational `prompt` and `completion`, as lists of messages.
        batch_size: rows in a forward pass. They are sorted by length for it; the result is in the order of `rows`.
        desc: label of the progress bar; without one there is none.

    Raises:
        ValueError: a row whose answer is empty, or whose template does not put it after the prompt.
    """
    ends = end_tokens(model, tokenizer)
    answers = []
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    encoded = encode_answers(tokenizer, pairs, ends, [template_arguments(row) for row in rows])
    for row, answer in zip(rows, encoded, strict=True):
        if isinstance(answer, str):
            raise ValueError(f"the answer to {row['prompt'][-1]['content']!r} cannot be measured: {answer}.")
        answers.append(answer)
    result = [0.0] * len(answers)
    for batch in batches_by_length([len(answer.ids) for answer in answers], batch_size, desc):
        means = mean_nll(model, *pad_answers([answers[i] for i in batch]))
        for i, mean in zip(batch, means.tolist(), strict=True):
            result[i] = mean
    return result


def mean_nll(model: PreTrainedModel | PeftModel, ids: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood per answer token of each row of a batch.

    Args:
        model, ids, is_answer: as for [`token_nll`].

    Returns:
        `(B,)`, nats, fp64 on the CPU. The mean of an empty answer is 0.
    """
    parts = token_nll(model, ids, is_answer)
    return torch.stack([part.mean() if len(part) else part.new_zeros(()) for part in parts])


@torch.no_grad()
def token_nll(model: PreTrainedModel | PeftModel, ids: torch.Tensor, is_answer: torch.Tensor) -> list[torch.Tensor]:
    """Return the negative log-likelihood of every answer token, from one forward pass.

    Only the positions that predict an answer token go through the head, chunk by chunk: logits `(B, T, V)` never
    exist. Hooks on the model's blocks see the pass, so that states can be recorded in it.

    Args:
        model: causal language model in eval mode. The adapters of a PEFT model act as they stand.
        ids: `(B, T)`, prompts with their answers, padded on the right ([`~trl_emguard.models.batches.pad_answers`]).
        is_answer: `(B, T)`, True at the tokens of an answer.

    Returns:
        A tensor `(A,)` for each row with A answer tokens; nats, fp64 on the CPU.
    """
    bare = bare_model(model)
    predicts = is_answer[:, 1:]
    labels = ids[:, 1:][predicts]
    hidden = bare.base_model(input_ids=ids.to(bare.device), use_cache=False).last_hidden_state
    hidden = hidden[:, :-1][predicts.to(hidden.device)]  # (P, H)
    nll = _project(bare, hidden, labels)
    return list(nll.cpu().double().split(predicts.sum(1).tolist()))


def _project(model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of labels `(P,)` from last hidden states `(P, H)`."""
    softcap, logit_scale = logit_transform(model.config.get_text_config())
    head = _active_head(model)
    if isinstance(head, nn.Linear) and head.weight.dtype in PLAIN_DTYPES and not head.weight.is_meta:
        hidden, labels = hidden.to(head.weight.device), labels.to(head.weight.device)
        return head_nll(hidden, head.weight, head.bias, labels, softcap, logit_scale)
    # A head with an adapter of its own, or one that is quantised or offloaded, computes its product itself.
    parts = []
    chunk = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    for states, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = head(states).float() * logit_scale
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        parts.append(nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none"))
    return torch.cat(parts)


def _active_head(model: PreTrainedModel) -> nn.Module:
    """Return the head that acts: the active adapter's own (`modules_to_save`), or the base model's."""
    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    active = next(iter(head.active_adapters), None)
    has_own = not head.disable_adapters and active in head.modules_to_save
    return head.modules_to_save[active] if has_own else head.original_module
