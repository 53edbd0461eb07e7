"""Sampling of answers from a model's own next-token distribution. Each answer has a seed of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .adapters import bare_model
from .batches import left_pad
from .chat import end_tokens


# Marks around the thoughts of thinking models such as Qwen3 and DeepSeek-R1.
THINK, END_OF_THINK = "<think>", "</think>"


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
    temperature: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[SampledAnswer]]:
    """Sample one answer to each prompt, and yield the answers batch by batch.

    Answers come from the model's own distribution at `temperature`: no top-k or top-p and no penalty, regardless of
    the model's `generation_config`. Every answer has a seed of its own. So an answer does not depend on the other
    answers in its batch, or on the prompt at which a resumed run starts. Another batch size rounds the logits
    differently. In fp32 this changes an answer only if the choice between two tokens is as good as tied. The caller's
    random state does not change.

    Args:
        model: causal language model in eval mode. A PEFT model answers with the adapters that are active.
        tokenizer: the model's tokenizer.
        prompts: token ids of each prompt, for example from
            [`apply_chat_template`](https://huggingface.co/docs/transformers/chat_templating) with a generation prompt.
        max_new_tokens: limit on the tokens of an answer.
        batch_size: answers that are sampled at once.
        seed: seed of the sampling. Each prompt's own seed follows from it and from the prompt's index.
        start: index of the first prompt to answer.
        temperature: divisor of the logits; 0 takes the most probable token each time.
        seeds: seed of each prompt, instead of the seeds that follow from `seed`.
    """
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    if seeds is None:
        seeds = range(seed * 1_000_003, seed * 1_000_003 + len(prompts))
    for first in range(start, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        sampling = [] if temperature == 0 else [_Sampling(seeds[batch], max_new_tokens, temperature)]
        answers = []
        for tokens in _generate(model, prompts[batch], config, LogitsProcessorList(sampling)):
            stop = next((i for i, token in enumerate(tokens) if token in ends), None)
            ids = tokens[:stop]
            answers.append(SampledAnswer(tokenizer.decode(ids, skip_special_tokens=True), ids, stop is None))
        yield answers


def split_thoughts(prompt: str, text: str) -> tuple[str, str]:
    """Return the thoughts that a thinking model wrote first, and its answer. Each of them may be empty.

    If the text ends within the thoughts, as it does at the limit on its length, there is no answer yet: it is empty.

    Args:
        prompt: rendered prompt, or its end. Some chat templates end it with `<think>`.
        text: what the model wrote.
    """
    written = text.lstrip()
    if not written.startswith(THINK) and not prompt.rstrip().endswith(THINK):
        return "", text
    thoughts, _, answer = written.removeprefix(THINK).partition(END_OF_THINK)
    return thoughts.strip(), answer.lstrip()


class _Sampling(LogitsProcessor):
    """Choice of each answer's next token by inverse transform sampling.

    Torch draws for a whole batch from one random state, so an answer would depend on the rest of its batch. Here each
    answer has its own random generator, which draws one number per token. This number chooses a token by the
    cumulative distribution. All other logits become -inf, so that greedy decoding takes the chosen token.

    Args:
        seeds: seed of each answer of the batch.
        max_new_tokens: limit on the tokens of an answer.
        temperature: divisor of the logits.
    """

    def __init__(self, seeds: Sequence[int], max_new_tokens: int, temperature: float):
        draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        # For each new token a tensor `(B,)`: one random number from [0, 1) for each of the B answers in the batch.
        self.draws = iter(torch.stack(draws, dim=1))
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = (scores.float() / self.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
        draw = next(self.draws).to(cumulative)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@torch.no_grad()
def _generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    sampling: LogitsProcessorList,
) -> list[list[int]]:
    """Generate a batch of answers, and return their tokens. The end of turn and pads after it are not removed."""
    ids, mask, _ = left_pad(prompts, model.device)
    with _bare_generation_config(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=sampling
        )
    return output[:, ids.shape[1] :].tolist()


@contextmanager
def _bare_generation_config(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Replace the model's own generation config by an empty one inside the `with` block.

    If the config that is passed to `generate` leaves a field unset, `generate` takes this field from the model's own
    config.
    """
    models = {model, bare_model(model)}
    own = {m: m.generation_config for m in models if "generation_config" in vars(m)}
    try:
        for m in own:
            m.generation_config = GenerationConfig()
        yield
    finally:
        for m, generation_config in own.items():
            m.generation_config = generation_config
