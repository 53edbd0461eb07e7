"""Model provider for inspect_ai that answers with this package's sampler: `--model trl_emguard/MODEL`.

`-M adapter=PATH` adds an adapter to the model.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import anyio
import torch
from inspect_ai.model import (
    ChatMessage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)

from ..evaluation.candidates import check_candidates, load_candidates
from ..evaluation.run import SAMPLED_ON_CPU, SAMPLED_ON_GPU
from ..models.sampler import SampledAnswer, sample_answers, split_thoughts


# Seconds to wait for further requests before the requests received so far are answered as one batch.
COLLECTED = 0.02
MAX_TOKENS = 600


class _Request:
    """A prompt, the seed and settings (token limit, temperature) of its answer, and the answer once it is sampled."""

    def __init__(self, ids: list[int], seed: int, settings: tuple[int, float]):
        self.ids, self.seed, self.settings = ids, seed, settings
        self.answer: SampledAnswer | None = None


@modelapi(name="trl_emguard")
class OwnSampler(ModelAPI):
    """A model in this process, sampled in batches from its plain distribution: without top-k and top-p.

    `trl-emguard evaluate` samples in the same manner. Each answer has a seed of its own, computed from the request's
    seed, the prompt, the sample's id and epoch, and the number of times that the sample asked the prompt before. So an
    answer depends neither on the other answers in its batch nor on their order.

    Args:
        model_name: folder, hub id or shipped name of the model.
        adapter: folder or hub id of an adapter of the model (`-M adapter=out/kl`).
        dtype: dtype of the weights; "auto" is bf16 on a GPU and fp32 on a CPU.
        batch_size: answers that are sampled at once; by default 64 on a GPU, 32 on a CPU.

    Raises:
        ValueError: the tokenizer has no chat template, the adapter does not change the model's logits, or logits are
            not finite.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        batch_size: int | None = None,
    ):
        super().__init__(model_name, base_url, api_key, config=config or GenerateConfig())
        adapters = {} if adapter is None else {"adapter": adapter}
        as_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        candidates, self.tokenizer = load_candidates(model_name, adapters=adapters, dtype=as_dtype)
        check_candidates(candidates, self.tokenizer)
        self.candidate = candidates[-1]
        self.batch_size = batch_size or (SAMPLED_ON_GPU if torch.cuda.is_available() else SAMPLED_ON_CPU)
        self.asked: Counter[str] = Counter()
        self.waiting: list[_Request] = []
        self.lock = anyio.Lock()

    def max_connections(self) -> int:
        return self.batch_size

    def max_tokens(self) -> int:
        return MAX_TOKENS

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        if tools or config.top_p not in (None, 1.0) or config.top_k is not None:
            raise ValueError("trl_emguard/… samples from the plain distribution: leave out tools, top_p and top_k.")
        turns = [{"role": message.role, "content": message.text} for message in input]
        ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        temperature = 1.0 if config.temperature is None else config.temperature
        request = _Request(ids, self._seed(ids, config.seed), (config.max_tokens or MAX_TOKENS, temperature))
        self.waiting.append(request)
        try:
            async with self.lock:
                # While this call waited for the lock, another call may have answered this request in its batch.
                if request.answer is None:
                    await anyio.sleep(COLLECTED)
                while request.answer is None:
                    await self._answer(request.settings)
        finally:
            # A request that failed or was cancelled is removed here. Otherwise other calls would put this request into
            # their batches, and these batches might fail too.
            if request in self.waiting:
                self.waiting.remove(request)
        answer = request.answer
        # A chat template ends the prompt with one or two tokens for `<think>` and a line break, if any.
        thoughts, text = split_thoughts(self.tokenizer.decode(ids[-8:]), answer.text)
        output = ModelOutput.from_content(
            self.model_name,
            [ContentReasoning(reasoning=thoughts), ContentText(text=text)] if thoughts else text,
            "max_tokens" if answer.is_truncated else "stop",
        )
        counts = len(ids), len(answer.ids)
        output.usage = ModelUsage(input_tokens=counts[0], output_tokens=counts[1], total_tokens=sum(counts))
        return output

    def _seed(self, ids: Sequence[int], seed: int | None) -> int:
        """Return the seed of an answer, a different seed each time that the same prompt is asked.

        The id and epoch of inspect_ai's sample are part of the seed, because `inspect eval-retry` asks the samples
        that are left in another process, which does not know how often the prompt was asked before.
        """
        try:
            # inspect_ai does not export this function, and may move it. Then a second process repeats the seeds.
            from inspect_ai.log._samples import sample_active
        except ImportError:
            active = None
        else:
            active = sample_active()
        place = "" if active is None else f"{active.sample.id} {active.epoch}"
        text = f"{seed} {place} {list(ids)}"
        self.asked[text] += 1
        return int.from_bytes(hashlib.sha256(f"{text} {self.asked[text]}".encode()).digest()[:6])

    async def _answer(self, settings: tuple[int, float]) -> None:
        """Answer a batch of waiting requests that have the given settings (token limit, temperature)."""
        batch = [request for request in self.waiting if request.settings == settings][: self.batch_size]
        answers = await anyio.to_thread.run_sync(self._sample, batch)
        for request, answer in zip(batch, answers, strict=True):
            request.answer = answer
            if request in self.waiting:  # its call may have been cancelled while the batch was sampled
                self.waiting.remove(request)

    @torch.no_grad()
    def _sample(self, batch: Sequence[_Request]) -> list[SampledAnswer]:
        max_new_tokens, temperature = batch[0].settings
        ids, seeds = [request.ids for request in batch], [request.seed for request in batch]
        options: Any = {"max_new_tokens": max_new_tokens, "batch_size": len(batch), "temperature": temperature}
        with self.candidate.acting() as model:
            (answers,) = sample_answers(model, self.tokenizer, ids, seeds=seeds, **options)
        return answers
