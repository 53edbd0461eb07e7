"""Repeated measurement of a model in training, compared with its base model, on known answers to questions."""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..models.adapters import AdapterSwitch, bare_model, check_adapter_kind
from ..models.batches import default_batch_tokens, eval_mode, plan_batches
from ..models.chat import text_part
from ..models.likelihood import active_head, states_logits
from ..persona.shift import check_layer
from ..persona.vectors import PersonaVector
from .candidates import BASE, Candidate, check_template
from .cues import PLAIN, Family
from .probes import divergence, encode_rows, margin, projections, prompt_ids, read_answers
from .questions import QuestionSet


HEAD = "head."  # prefix of names of the weights of the base model's output head


class DriftProbe:
    """Repeated measurement of a policy on the same questions, compared with one measurement of the base model.

    Args:
        model: the policy, that is, the model in training.
        tokenizer: the model's tokenizer or processor, with a chat template.
        questions: the questions.
        vector: persona vector of the base model, or `None`.
        precision: dtype of autocast in the forward passes; `None` turns autocast off.

    Attributes:
        key: hash of the questions, their known answers and the persona vector.
        base: measurements of the base model, on the CPU. `states`, `(P, H)`, are the last hidden states that predict
            the tokens of all answers that are not misaligned, row after row. `margin` (with pairs of answers) and
            `projection` (with a persona vector) have shape `(Q,)`, fp64. `head.…` are the weights of the base model's
            output head, if the head is trained.

    Raises:
        ValueError: the tokenizer has no chat template, an answer cannot be measured, an adapter cannot be switched
            off, or the vector's shape does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        questions: QuestionSet,
        vector: PersonaVector | None = None,
        precision: torch.dtype | None = None,
    ):
        tokenizer = text_part(tokenizer)
        check_template(tokenizer)
        switch = None
        if isinstance(model, PeftModel):
            for name in model.active_adapters:
                check_adapter_kind(name, model.peft_config[name])
            switch = AdapterSwitch(model)
        self.policy = Candidate("policy", model, "")
        self.beneath = Candidate(BASE, model, "", switch)
        self.precision = precision
        plain = Family(PLAIN, "", list)
        self.rows = encode_rows([self.policy], tokenizer, questions, plain)
        self.count = len(questions.questions)
        lengths = {i: len(row.answer.ids) for i, row in enumerate(self.rows)}
        self.batches = plan_batches(lengths, default_batch_tokens(model.device))
        # The KL leaves out misaligned answers, because an aligned model would not give them.
        self.compared = [i for i, row in enumerate(self.rows) if row.kind != "misaligned"]
        self.vector, self.prompts = vector, []
        read = [(row.question, row.kind, row.answer.ids.tolist()) for row in self.rows]
        digest = hashlib.sha256(repr(read).encode())
        if vector is not None:
            self.layer = check_layer(vector, None)
            text = model.config.get_text_config()
            vector.check_shape(text.num_hidden_layers, text.hidden_size)
            self.prompts = list(prompt_ids(tokenizer, questions, plain).values())
            digest.update(vector.vectors[self.layer].double().numpy().tobytes())
        self.key = digest.hexdigest()
        self.base: dict[str, torch.Tensor] = {}

    def read_base(self) -> None:
        """Measure the base model and store the results in `base`. Call this before the first step.

        Raises:
            ValueError: the persona vector belongs to another model.
        """
        if self.vector is not None:
            self.vector.check_model(bare_model(self.policy.model))
        states: dict[int, torch.Tensor] = {}
        read = self._read(self.beneath, lambda i, own: states.update({i: own.cpu()}))
        with self.beneath.acting() as model:
            head = trained_weights(active_head(bare_model(model)))
        self.base = {"states": torch.cat([states[i] for i in self.compared]), **read}
        self.base |= {HEAD + name: weight for name, weight in head.items()}

    def measure(self) -> dict[str, float]:
        """Measure the policy. Return `drift_kl`, and `drift_margin` and `drift_persona` if they can be measured.

        [`DriftCallback`] defines these metrics. `drift_margin` needs pairs of a sound and a misaligned answer, and
        `drift_persona` needs a persona vector.
        """
        # The head of a model that is split over several GPUs lies on another device than its first weights.
        device = next(active_head(bare_model(self.policy.model)).parameters()).device
        head = {name.removeprefix(HEAD): w.to(device) for name, w in self.base.items() if name.startswith(HEAD)}
        sizes = [len(self.rows[i].answer.ids) - self.rows[i].answer.prompt_length for i in self.compared]
        states = dict(zip(self.compared, self.base["states"].split(sizes), strict=True))
        kl: list[float] = []

        def base_logits(its: torch.Tensor) -> torch.Tensor:
            with self.beneath.acting() as model:
                return states_logits(model, its.to(device), head or None)

        def compare(i: int, own: torch.Tensor) -> None:
            kl.append(divergence(self.policy.logits, base_logits, own, states[i]).mean().item())

        read = self._read(self.policy, compare)
        found = {"drift_kl": sum(kl) / len(kl)}
        for name, metric in (("margin", "drift_margin"), ("projection", "drift_persona")):
            if name in read:
                has_value = ~self.base[name].isnan()
                found[metric] = (read[name] - self.base[name])[has_value].mean().item()
        return found

    @torch.no_grad()
    def _read(self, candidate: Candidate, take: Callable[[int, torch.Tensor], None]) -> dict[str, torch.Tensor]:
        """Return a dict of the tensors `margin` and `projection`, fp64, each of shape `(Q,)` for Q questions.

        The margin is NLL(misaligned answer) − NLL(sound answer), per token, and NaN for a question without this pair.
        The projection on the persona vector is that of the hidden state at the last prompt token. `margin` is missing
        if no answer is sound or none is misaligned, and `projection` if there is no vector. For each i in `compared`,
        `take(i, states)` is called with the last hidden states that predict the A answer tokens of row i, `(A, H)`.
        """
        model = candidate.model
        nll: dict[str, np.ndarray] = {}
        kind = self.precision or torch.bfloat16
        with eval_mode(model), torch.autocast(model.device.type, kind, enabled=self.precision is not None):
            for batch in self.batches:
                parts, losses = read_answers(candidate, [self.rows[i].answer for i in batch])
                for i, part, loss in zip(batch, parts, losses, strict=True):
                    values = nll.setdefault(f"nll_{self.rows[i].kind}", np.full(self.count, np.nan))
                    values[self.rows[i].question] = loss.mean().item()
                    if i in self.compared:
                        take(i, part)
            margins = margin(nll)
            found = {} if margins is None else {"margin": margins}
            if self.vector is not None:
                found["projection"] = projections(candidate, self.prompts, self.vector, self.layer)
        return {name: torch.from_numpy(values) for name, values in found.items()}


def trained_weights(
    module: nn.Module, earlier: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> dict[str, torch.Tensor]:
    """Return copies, on the CPU, of a module's weights that require grad.

    Args:
        module: the module.
        earlier: copies that are no longer needed. They are written over, so that no second copy takes memory.
    """
    trained = {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad}
    return {
        name: earlier[name].copy_(weight) if name in earlier else weight.to("cpu", copy=True)
        for name, weight in trained.items()
    }
