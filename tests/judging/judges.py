"""Judges of the tests: tiny models whose tokenizer has whole numbers or digits, and one that answers by a function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_emguard.evaluation.results import Results
from trl_emguard.judging import Judgement
from trl_emguard.judging.scores import TRIE


def number_tokenizer(is_whole: bool) -> PreTrainedTokenizerBase:
    """Return the byte tokenizer, which splits numbers into digits, or one with a token for each number."""
    tokenizer = make_tokenizer()
    if is_whole:
        tokenizer.add_tokens([str(number) for number in range(101)])
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def number_model(tokenizer: PreTrainedTokenizerBase, said: dict[str, str], strength: float = 12.0) -> PreTrainedModel:
    """Return a tiny random model that leans towards given answers: prompt → text, ended by the end of turn.

    The rows of the head are fitted to the states before each token, so all other logits stay random.
    """
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "max_position_embeddings": 8192}
    model = make_model("qwen2", **sizes).eval()
    states, tokens = [], []
    for prompt, text in said.items():
        before = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            found = model.model(torch.tensor([before + answer])).last_hidden_state[0, len(before) - 1 : -1]
        states, tokens = [*states, *found], tokens + answer
    with torch.no_grad():
        stacked = torch.stack(states).double()  # (N, H)
        added = torch.zeros(len(tokens), len(tokenizer), dtype=torch.float64)
        added[range(len(tokens)), tokens] = strength
        # The least change of the head that adds this to the logits at these states.
        model.lm_head.weight += (torch.linalg.pinv(stacked) @ added).T.float()
    return model


class FunctionJudge:
    """A judge that answers by a function, and counts what it was asked.

    Args:
        answer: prompt → judgement, or an error to raise.
        weights: hash of its weights.
        way: way of reading it, which its calibration finds.
    """

    reading = ""

    def __init__(
        self,
        answer: Callable[[str], Judgement],
        name: str = "hf:function",
        weights: str | None = "w",
        way: str = TRIE,
    ):
        self.answer, self.name, self.identity, self.weights, self.way = answer, name, name, weights, way
        self.asked: list[str] = []
        self.calibrations = 0

    def calibrate(self) -> str:
        self.calibrations += 1
        self.reading = self.way
        return self.reading

    def close(self) -> None:
        pass

    def ask(self, prompts: Sequence[str], on_answer: Callable[[int, Judgement], None]) -> None:
        for index, prompt in enumerate(prompts):
            found = self.answer(prompt)
            self.asked.append(prompt)
            on_answer(index, found)


def make_results(
    answers: dict[str, dict[str, list[str]]], set: str = "general", family: str = "plain", **info: Any
) -> Results:
    """Return results with sampled answers: model → question → answers."""
    samples = [
        {
            "model": model,
            "set": set,
            "family": family,
            "question": question,
            "sample": number,
            "asked": f"Question {question}?",
            "prompt": "",
            "answer": answer,
            "truncated": False,
        }
        for model, questions in answers.items()
        for question, texts in questions.items()
        for number, answer in enumerate(texts)
    ]
    models = {model: {"fingerprint": f"of {model}", "weights": f"beneath {model}"} for model in answers}
    about = {"versions": {}, "command": None, "model": "m", "models": models, "judge": None, "judge_prompts": {}}
    return Results([], samples, [], about | info, list(answers), {set: "general"})
