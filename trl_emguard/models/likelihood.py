"""Likelihood of given answers under a model, measured without generating answers and without a judge."""

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..ops import logit_transform
from ..ops import token_nll as head_nll
from .adapters import bare_model
from .batches import batches_by_length, pad_answers
from .chat import encode_answers, end_tokens, template_arguments


# Dtypes of an output head whose weight can be multiplied by the hidden states directly. Weights of other dtypes are
# quantised, and their head must be called as a module.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# If the head must be called as a module, at most this many logits are computed at once: 256 MiB in fp32.
CHUNK_LOGITS = 2**26


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    batch_size: int = 8,
    desc: str | None = None,
) -> list[float]:
    """Return each row's mean negative log-likelihood per answer token (end-of-turn token included), in nats.

    Args:
        model: causal language model. A PEFT model is measured with its active adapters.
        tokenizer: tokenizer with a chat template.
        rows: conversational `prompt` and `completion`, as lists of messages.
        batch_size: rows in a forward pass. Rows are sorted by length first; the result is in the order of `rows`.
        desc: label of the progress bar; `None` shows no bar.

    Raises:
        ValueError: a row's answer is empty, or the chat template refuses the row or does not put the answer after the
            prompt.
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

    Only the positions that predict an answer token go through the head, chunk by chunk, so the full logits `(B, T, V)`
    are never allocated. Hooks on the model's blocks run as usual, so a caller can record hidden states in this pass.

    Args:
        model: causal language model in eval mode. A PEFT model is measured with its active adapters.
        ids: `(B, T)`, prompts with their answers, padded on the right ([`~trl_emguard.models.batches.pad_answers`]).
        is_answer: `(B, T)`, True at the tokens of an answer.

    Returns:
        A tensor `(A,)` for each row with A answer tokens; nats, fp64 on the CPU.
    """
    predicts = is_answer[:, 1:]
    nll = states_nll(model, predicting_states(model, ids, is_answer), ids[:, 1:][predicts])
    return list(nll.split(predicts.sum(1).tolist()))


@torch.no_grad()
def predicting_states(model: PreTrainedModel | PeftModel, ids: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states `(P, H)` at the positions that predict an answer token, row after row.

    Args:
        model, ids, is_answer: as for [`token_nll`].
    """
    bare = bare_model(model)
    hidden = bare.base_model(input_ids=ids.to(bare.device), use_cache=False).last_hidden_state
    return hidden[:, :-1][is_answer[:, 1:].to(hidden.device)]


@torch.no_grad()
def states_nll(model: PreTrainedModel | PeftModel, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of labels `(P,)`, given last hidden states `(P, H)`.

    Returns:
        `(P,)`, nats, fp64 on the CPU.
    """
    bare = bare_model(model)
    softcap, logit_scale = logit_transform(bare.config.get_text_config())
    head = active_head(bare)
    if isinstance(head, nn.Linear) and head.weight.dtype in PLAIN_DTYPES and not head.weight.is_meta:
        states, labels = states.to(head.weight.device), labels.to(head.weight.device)
        return head_nll(states, head.weight, head.bias, labels, softcap, logit_scale).cpu().double()
    # A head that has an adapter of its own, or is quantised or offloaded, must be called as a module.
    chunk = max(1, CHUNK_LOGITS // bare.config.get_text_config().vocab_size)
    parts = []
    for part, targets in zip(states.split(chunk), labels.split(chunk), strict=True):
        logits = states_logits(model, part)
        parts.append(nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none"))
    return torch.cat(parts).cpu().double()


@torch.no_grad()
def states_logits(
    model: PreTrainedModel | PeftModel, states: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the logits `(P, V)`, fp32, that the active head computes from last hidden states `(P, H)`.

    Args:
        model: causal language model.
        states: last hidden states.
        weights: other weights for the head, by name; by default the head's own.
    """
    bare = bare_model(model)
    softcap, logit_scale = logit_transform(bare.config.get_text_config())
    head = active_head(bare)
    logits = (head(states) if weights is None else functional_call(head, dict(weights), (states,))).float()
    if logit_scale != 1:
        logits *= logit_scale
    return logits if softcap is None else (logits / softcap).tanh_() * softcap


def active_head(model: PreTrainedModel) -> nn.Module:
    """Return the output head in use: the active adapter's (`modules_to_save`) if it has one, else the base model's."""
    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    active = next(iter(head.active_adapters), None)
    has_own = not head.disable_adapters and active in head.modules_to_save
    return head.modules_to_save[active] if has_own else head.original_module
