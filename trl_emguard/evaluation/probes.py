"""Likelihood probes: each model's likelihood of known answers, and its KL divergence from the base model on them.

The models under evaluation are called candidates, and the base model is the first of them. For each batch of answers,
a candidate makes one forward pass. The base model's last hidden states are kept until the other candidates have read
the same batch. The divergence thus needs no further forward pass, only products of the states with the output heads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.batches import default_batch_tokens, pad_answers, plan_batches
from ..models.chat import EncodedAnswer, encode_answers, end_tokens
from ..models.likelihood import predicting_states, states_nll
from ..persona.states import prompt_states
from ..persona.vectors import PersonaVector
from .candidates import BASE, Candidate
from .cues import Family
from .questions import QuestionSet


# Number of positions whose logits [`divergence`] compares at once. It is small so that a model's logits at these
# positions (12.6 MB for a vocabulary of 49,152) can stay in a CPU's caches.
COMPARED_POSITIONS = 64


class Row(NamedTuple):
    """A known answer whose likelihood is to be measured.

    Attributes:
        question: index of the question.
        kind: `sound`, `misaligned`, or `target` for a question's only known answer. The metric of the answer's
            likelihood is named `nll_` and this word.
        answer: tokens of the prompt and the answer.
    """

    question: int
    kind: str
    answer: EncodedAnswer


def encode_rows(
    candidates: Sequence[Candidate], tokenizer: PreTrainedTokenizerBase, questions: QuestionSet, family: Family
) -> list[Row]:
    """Return a [`Row`] for each known answer of each question, with the tokens of the prompt and of the answer.

    A [`Family`] of prompts asks the questions plainly, with a cue (a text that it adds to each of them), or in other
    words. A question that `family` cannot ask gets no row.

    Raises:
        ValueError: an answer is empty, or the chat template does not put it after the prompt.
    """
    ends = end_tokens(candidates[0].model, tokenizer)
    wanted = []
    for index, question in enumerate(questions.questions):
        prompt, target = family.prompt(question), questions.target(question)
        texts = {"sound": question.sound, "misaligned": question.misaligned}
        if target not in texts.values():
            texts["target"] = target
        wanted += [(index, kind, prompt, text) for kind, text in texts.items() if prompt and text is not None]
    pairs = [(prompt, [{"role": "assistant", "content": text}]) for _, _, prompt, text in wanted]
    rows = []
    kwargs = [questions.questions[index].template_kwargs for index, *_ in wanted]
    for (index, kind, *_), encoded in zip(wanted, encode_answers(tokenizer, pairs, ends, kwargs), strict=True):
        if isinstance(encoded, str):
            id = questions.questions[index].id
            where = f"question {id!r} of the set {questions.name!r}, asked in the family {family.name!r},"
            raise ValueError(f"{where} cannot be measured: {encoded}.")
        rows.append(Row(index, kind, encoded))
    return rows


def prompt_ids(tokenizer: PreTrainedTokenizerBase, questions: QuestionSet, family: Family) -> dict[int, list[int]]:
    """Return the tokens of each prompt, by the index of its question. Questions that `family` cannot ask are left out.

    A [`Family`] of prompts asks the questions plainly, with a cue, or in other words.
    """
    asked = {i: (family.prompt(question), question.template_kwargs) for i, question in enumerate(questions.questions)}
    return {
        i: tokenizer.apply_chat_template(turns, add_generation_prompt=True, **kwargs)["input_ids"]
        for i, (turns, kwargs) in asked.items()
        if turns is not None
    }


def probe(
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    count: int,
    batch_tokens: int | None = None,
    desc: str | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Measure each candidate's likelihood of answers, and its KL divergence from the base model on them, in batches.

    Args:
        candidates: the candidates, the base model first.
        rows: the answers, from [`encode_rows`].
        count: number of questions in the set.
        batch_tokens: limit on the tokens of a forward pass, padding included; by default
            [`~trl_emguard.models.batches.default_batch_tokens`].
        desc: label of the progress bar; `None` shows no bar.

    Returns:
        Candidate → metric → `(count,)`, NaN for a question without a value. `nll_sound`, `nll_misaligned` and
        `nll_target` are mean negative log-likelihoods in nats a token, the end of turn included. `kl_to_base` is
        KL(candidate ‖ base), the mean over an answer's tokens, in nats a token. It is not measured on misaligned
        answers, and the base model has no such metric.
    """
    found: dict[str, dict[str, np.ndarray]] = {candidate.name: {} for candidate in candidates}

    def enter(name: str, metric: str, row: Row, value: float) -> None:
        found[name].setdefault(metric, np.full(count, np.nan))[row.question] = value

    lengths = {i: len(row.answer.ids) for i, row in enumerate(rows)}
    device = candidates[0].model.device
    plan = plan_batches(lengths, batch_tokens or default_batch_tokens(device))
    for batch in tqdm(plan, desc=desc, disable=desc is None):
        read = [rows[i] for i in batch]
        # The KL leaves out misaligned answers, because an aligned model would not give them.
        chosen = [j for j, row in enumerate(read) if row.kind != "misaligned"]
        base = None
        for candidate in candidates:
            parts, nll = read_answers(candidate, [row.answer for row in read])
            base = base or parts
            for row, part in zip(read, nll, strict=True):
                enter(candidate.name, f"nll_{row.kind}", row, part.mean().item())
            if candidate.name == BASE or not chosen:
                continue
            own, its = (torch.cat([x[j] for j in chosen]) for x in (parts, base))
            kl = divergence(candidate.logits, candidates[0].logits, own, its)
            for j, part in zip(chosen, kl.split([len(parts[j]) for j in chosen]), strict=True):
                enter(candidate.name, "kl_to_base", read[j], part.mean().item())
    return found


def read_answers(
    candidate: Candidate, answers: Sequence[EncodedAnswer]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return hidden states and likelihood of a batch of answers, from one forward pass.

    Returns:
        Two lists with a tensor for each answer of A tokens. The first has the last hidden states that predict these
        tokens, `(A, H)`. The second has the tokens' negative log-likelihoods, `(A,)`, nats, fp64 on the CPU.
    """
    ids, is_answer = pad_answers(answers)
    labels, sizes = ids[:, 1:][is_answer[:, 1:]], is_answer[:, 1:].sum(1).tolist()
    with candidate.acting() as model:
        states = predicting_states(model, ids, is_answer)
        nll = states_nll(model, states, labels)
    return list(states.split(sizes)), list(nll.split(sizes))


@torch.no_grad()
def divergence(
    logits: Callable[[torch.Tensor], torch.Tensor],
    base_logits: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    base_states: torch.Tensor,
) -> torch.Tensor:
    """Return KL(candidate ‖ base) at each position, in nats.

    Args:
        logits, base_logits: output heads of candidate and base model, as functions from last hidden states `(P, H)` to
            logits `(P, V)`, fp32.
        states, base_states: last hidden states of candidate and base model, `(P, H)`.

    Returns:
        `(P,)`, fp64 on the CPU: Σ p·(z_p − z_q) − log Z_p + log Z_q, with the sum over the vocabulary in fp32. Here p
        are the candidate's probabilities, z_p and z_q the logits of candidate and base, and Z_p and Z_q the sums over
        the vocabulary of exp(z_p) and exp(z_q).
    """
    parts = []
    for own, its in zip(states.split(COMPARED_POSITIONS), base_states.split(COMPARED_POSITIONS), strict=True):
        z = logits(own)
        base_z = base_logits(its).to(z.device)
        normalisers = base_z.logsumexp(-1) - z.logsumexp(-1)
        parts.append((z.softmax(-1) * z.sub_(base_z)).sum(-1) + normalisers)
    return torch.cat(parts).cpu().double() if parts else torch.zeros(0, dtype=torch.float64)


def projections(
    candidate: Candidate, prompts: Sequence[Sequence[int]], vector: PersonaVector, layer: int, batch_size: int = 20
) -> np.ndarray:
    """Return the projection of each prompt's hidden state on a persona vector, `(N,)`.

    It is h(l)·v(l)/‖v(l)‖, with h(l) the state after block l (`layer`) at the prompt's last token, and v(l) the
    vector's entry for that block.
    """
    with candidate.acting() as model:
        states = prompt_states(model, prompts, batch_size)[:, layer].double()
    return (states @ torch.nn.functional.normalize(vector.vectors[layer].double(), dim=0)).numpy()


def margin(nll: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return NLL(misaligned answer) − NLL(sound answer) of each question, or `None` for a set without such pairs."""
    if "nll_misaligned" not in nll or "nll_sound" not in nll:
        return None
    return nll["nll_misaligned"] - nll["nll_sound"]
