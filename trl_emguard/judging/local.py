"""A judge in this process, whose scores come from the probabilities of all strings from "0" to "100"."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..models.chat import prompt_problem
from ..models.identity import fingerprint, weights_digest
from ..models.load import load_base
from ..models.shipped import public_name, resolve_model
from .prompts import CALIBRATION
from .scores import LEAST_MASS, TRIE, Judgement, weighted_score
from .served import unreadable


Path = tuple[int, ...]


class LocalJudge:
    """A judge model in this process's memory.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer, with a chat template.
        name: name of the judge in the results.

    Raises:
        ValueError: the tokenizer has no chat template, or one that shows no plain text, or the tokenizer merges a
            number that follows a prompt with the prompt's tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"judge {name!r} has no chat template: take an instruct model.")
        if problem := prompt_problem(tokenizer, [{"role": "user", "content": "?"}]):
            raise ValueError(f"judge {name!r} cannot be asked: {problem}.")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.reading = ""
        self.identity = f"{name} {fingerprint(model)}"
        self.weights: str | None = weights_digest(model)
        self.numbers = number_paths(tokenizer, self._render("?"))
        paths = {path[:length] for path in self.numbers for length in range(1, len(path))}
        self.inner = sorted(paths, key=lambda path: (len(path), path))
        # `self.cache` is the name of the key-value cache in the arguments and in the output of `forward`. transformers
        # 5.24 renamed it from `past_key_values` to `cache`, and warns about the old name.
        self.cache = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    def calibrate(self) -> str:
        """Return `trie`, the key of `scores.READINGS` that tells how this judge's scores are read.

        Every number counts, however the tokenizer splits it, so the reading is known before. One prompt is judged all
        the same: a model that cannot judge then fails before any answer is sampled for it.

        Raises:
            JudgeError: the model answers no number, for example because it thinks first.
        """
        found = self.judge(CALIBRATION)
        if found.score is None:
            likely = f"gives all numbers together a probability of {found.mass:.2f} (at least {LEAST_MASS} is needed)"
            raise unreadable(self.name, f"begins with {found.said!r} and {likely}")
        self.reading = TRIE
        return self.reading

    def ask(self, prompts: Sequence[str], on_answer: Callable[[int, Judgement], None]) -> None:
        """Call [`judge`] on one prompt after the other, and `on_answer` with each prompt's index and judgement."""
        for index, prompt in enumerate(prompts):
            on_answer(index, self.judge(prompt))

    def close(self) -> None:
        """Do nothing: a judge in memory has no connection to close."""

    @torch.no_grad()
    def judge(self, prompt: str) -> Judgement:
        """Return the judgement that a prompt asks for, from the probabilities of the model's next tokens."""
        ids = self.tokenizer(self._render(prompt), add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = self.model(input_ids=ids.to(self.model.device), use_cache=True, logits_to_keep=1)
        first = output.logits[0, -1].double().softmax(-1).cpu()
        after: dict[Path, torch.Tensor] = {(): first}
        if self.inner:
            after |= self._after_paths(getattr(output, self.cache), ids.shape[1])
        score, mass = weighted_score(number_probabilities(self.numbers, after))
        said = self.tokenizer.decode([int(first.argmax())], skip_special_tokens=True)
        return Judgement(score, mass, said, ids.shape[1] + len(self.inner))

    def _after_paths(self, cache: Any, length: int) -> dict[Path, torch.Tensor]:
        """Return a dict from path (a number's first tokens, after the prompt) to the probabilities of the next token.

        All paths go through the model in one batch. `self.inner` lists them: all proper prefixes of the numbers'
        tokens but the empty one.
        """
        longest = max(map(len, self.inner))
        # No mask is needed: pads follow the tokens of a row, and a causal model never attends to later tokens.
        tokens = torch.tensor([[*path, *[0] * (longest - len(path))] for path in self.inner])
        # Each path needs a copy of the prompt's cache. An index of zeros makes `reorder_cache` repeat the only row of
        # the cache. No other method of the cache can repeat the states of linear-attention layers, which some models
        # have. The index may be on the CPU, because each layer moves it to its own device.
        cache.reorder_cache(torch.zeros(len(self.inner), dtype=torch.long))
        positions = torch.arange(length, length + longest)[None].expand(len(self.inner), -1)
        device = self.model.device
        inputs = {"input_ids": tokens.to(device), "position_ids": positions.to(device), self.cache: cache}
        logits = self.model(**inputs).logits
        return {path: logits[row, len(path) - 1].double().softmax(-1).cpu() for row, path in enumerate(self.inner)}

    def _render(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        # The next token must be a number's. Templates of models that never think ignore `enable_thinking`.
        options: Any = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(self.tokenizer.apply_chat_template(turns, **options))


def number_paths(tokenizer: PreTrainedTokenizerBase, before: str) -> dict[Path, int]:
    """Return a dict from tokens to number, for "0" to "100" as a tokenizer splits them behind a rendered prompt.

    Raises:
        ValueError: the prompt's own tokens change when a number follows.
    """
    start = tokenizer(before, add_special_tokens=False)["input_ids"]
    paths: dict[Path, int] = {}
    for number in range(101):
        ids = tokenizer(f"{before}{number}", add_special_tokens=False)["input_ids"]
        if ids[: len(start)] != start or len(ids) == len(start):
            raise ValueError(
                f"the judge's tokenizer does not write {number} behind its prompt as tokens of its own: take another "
                "judge, or serve this one (openai-api/SERVICE/MODEL)."
            )
        paths[tuple(ids[len(start) :])] = number
    return paths


def number_probabilities(numbers: dict[Path, int], after: dict[Path, torch.Tensor]) -> dict[int, float]:
    """Return number → probability of its string: the product of the next-token probabilities along its tokens.

    Longer numbers may begin with a number's tokens, for example 85 with the token of 8. Then the shorter number's
    product is multiplied by the probability that none of the longer numbers' next tokens follows. If every proper
    prefix of a number's tokens, except the empty one, is also a number, all results add up to the probability of the
    numbers' first tokens.

    Args:
        numbers: tokens of a number → the number.
        after: prefix of a number's tokens, including the empty prefix → probabilities `(V,)` of the next token.
    """
    continued: dict[Path, set[int]] = {}
    for path in numbers:
        for length in range(len(path)):
            continued.setdefault(path[:length], set()).add(path[length])
    found = {}
    for path, number in numbers.items():
        probability = 1.0
        for length, token in enumerate(path):
            probability *= float(after[path[:length]][token])
        if path in continued:
            probability *= max(0.0, 1 - sum(float(after[path][token]) for token in continued[path]))
        found[number] = probability
    return found


def load_local(name: str, model: str) -> LocalJudge:
    """Load a judge by folder, hub id or short name of a shipped model; in bf16 on a GPU, in fp32 on a CPU.

    Args:
        name: prefix (`hf:`) of the judge's name in results. The rest is the model's id or folder name.
        model: folder, hub id or shipped name.

    Raises:
        OSError: the model is not found.
        ValueError: a weights file is damaged, or the model cannot judge (see [`LocalJudge`]).
    """
    path, cuda = resolve_model(model), torch.cuda.is_available()
    loaded = load_base(path, dtype=torch.bfloat16 if cuda else torch.float32, device_map="auto" if cuda else None)
    return LocalJudge(loaded, AutoTokenizer.from_pretrained(path), f"{name}{public_name(path)}")
