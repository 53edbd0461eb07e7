"""Sampled answers of a model, from its plain distribution and reproducible batch by batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .adapters import bare_model
from .batches import left_pad
from .chat import end_tokens


class SampledAnswer(NamedTuple):
    """One answer of a model.

    Attributes:
        text: text of the answer.
        ids: tokens of the answer, without the end of turn.
        is_truncated: True if the answer reached the limit on its length before an end of turn.
    """

    text: str
    ids: list[int]
    is_truncated: bool


def sample_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int = 0,
    start: int = 0,
) -> Iterator[list[SampledAnswer]]:
    """Sample one answer to each prompt, and yield the answers batch by batch.

    Answers come from the model's plain distribution: temperature 1, no top-k or top-p and no penalty, regardless of
    the model's `generation_config`. Every batch has a seed of its own, so a run that is resumed with `start` samples
    the same answers as a run without an interruption. The random state of the caller is left alone.

    Args:
        model: causal language model in eval mode. The adapters of a PEFT model act as they stand.
        tokenizer: the model's tokenizer.
        prompts: token ids of each prompt, for example from
            [`apply_chat_template`](https://huggingface.co/docs/transformers/chat_templating) with a generation prompt.
        max_new_tokens: limit on the tokens of an answer.
        batch_size: answers that are sampled at once. It is part of the seed: another batch size gives other answers.
        seed: seed of the sampling.
        start: index of the first prompt to answer, a multiple of `batch_size`.
    """
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    for first in range(start, len(prompts), batch_size):
        generated = _generate(model, prompts[first : first + batch_size], config, seed * 1_000_003 + first)
        answers = []
        for tokens in generated:
            stop = next((i for i, token in enumerate(tokens) if token in ends), None)
            ids = tokens[:stop]
            answers.append(SampledAnswer(tokenizer.decode(ids, skip_special_tokens=True), ids, stop is None))
        yield answers


@torch.no_grad()
def _generate(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, seed: int
) -> list[list[int]]:
    """Generate one batch; return the tokens after each prompt, pads after the end included."""
    ids, mask, _ = left_pad(prompts, model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _bare_generation_config(model):
        torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return output[:, ids.shape[1] :].tolist()


@contextmanager
def _bare_generation_config(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Remove the model's generation config inside: `generate` fills unset fields of the given config from it."""
    models = {model, bare_model(model)}
    own = {m: m.generation_config for m in models if "generation_config" in vars(m)}
    try:
        for m in own:
            m.generation_config = GenerationConfig()
        yield
    finally:
        for m, generation_config in own.items():
            m.generation_config = generation_config
