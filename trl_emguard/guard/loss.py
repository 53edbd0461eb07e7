"""Loss of a defended run's micro-batch, computed in this order: reference pass, policy pass, output head, terms.

The policy is the model in training. Some defenses add terms to the loss. Most terms compare the policy with a
reference, for example with the same model without its adapters. A guard is a function that a model's patched forward
calls in place of the stock forward ([`~trl_emguard.guard.forward.Gate`]). A defense's `policy_pass` returns a context
manager. Inside this context, the defense may change the policy's forward pass, for example by steering.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ..defenses.base import Defense, ModelDefense
from ..defenses.step import MARKS, TERM_SUMS, Marks
from ..models.sharding import gathered
from ..ops import ce_divergence_head, logit_transform
from .forward import States, run_backbone
from .scopes import positions_in_scope
from .terms import Term, kept_positions, model_term, state_term, wanted_layers


@dataclass
class GuardOutput(ModelOutput):
    """Output of a [`LossGuard`]. The patched forward returns it in place of the model's own output.

    Attributes:
        total: `()`, cross-entropy (CE) + Σ coef · term, normalised over the whole step. The trainer adds only the
            load-balancing loss of `router_logits`, if there is one.
        stats: `(len(names),)`, sums over this micro-batch's positions, without gradient, in the order of
            [`LossGuard.names`].
        router_logits: router logits of the backbone, in mixture-of-experts models.
    """

    # PEFT's AdaLoRA adds a regulariser to the field `loss` of a model's output. This field has another name, so the
    # regulariser is not added. A run of SFTTrainer itself normally trains without the regulariser too: it ignores the
    # field `loss`, and computes its loss from the field `log_probs`.
    total: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    router_logits: Any = None

    @property
    def logits(self) -> torch.Tensor:
        raise AttributeError(
            "a defended step never forms whole logits, so the outputs of compute_loss(return_outputs=True) have none: "
            "call the model itself where you need them."
        )


class InsideReference(Protocol):
    """Interface of references: `inside` runs the reference inside the policy's patched forward.

    The method returns the reference's states, for example the states of the policy's model with the adapters off. It
    returns `None` if the states come from elsewhere, for example from a separate model or from a cache.
    """

    def inside(
        self, model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int]
    ) -> States | None: ...


class PassGuard:
    """Function in place of a model's forward: runs the stock forward in the defenses' `policy_pass` contexts.

    The trainer computes the loss from what the stock forward returns.

    Args:
        defenses: active defenses, whose `policy_pass` contexts are entered.
        batch: the trainer's micro-batch. It may contain labels that the trainer does not pass to the model.
    """

    def __init__(self, defenses: Sequence[Defense], batch: Mapping[str, Any]):
        self.defenses = defenses
        self.batch = batch
        self.passes = 0

    def __call__(self, model: PreTrainedModel, stock_forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        self.passes += 1
        with ExitStack() as surroundings:
            for defense in self.defenses:
                surroundings.enter_context(defense.policy_pass(model, {**self.batch, **inputs}))
            return stock_forward(**inputs)


class LossGuard:
    """Function in place of a model's forward: computes this package's loss for one training micro-batch.

    Args:
        terms: loss terms of the reference defenses. At most one of them compares next-token distributions.
        defenses: active defenses, whose `policy_pass` contexts are entered around the policy's pass.
        ce_scale: `()`, factor of the summed cross-entropy (CE): number of ranks / number of label tokens in the step.
        marks: name of a scope → mask of its tokens, `(B, T)`. [`GuardOutput.stats`] gets a sum of CE for each scope.
        reference: the reference that the terms compare the policy with. `None` without terms; also, unless an engine
            shards the model, if this micro-batch has no position to compare.
        states: the reference's states, if it ran before this call or its states were read from disk; else `None`.
        referenced: `(B, T - 1)`, mask of the positions of the reference's states. It includes all terms' positions.

    Attributes:
        compares_start: whether to measure how far the policy's states are from the reference's. The trainer sets this
            before the first update, when the two must be equal.
        share: factor of the terms that do not depend on the batch ([`ModelDefense`]). It is 1 / number of
            micro-batches in the step, or 1 where Trainer divides the whole loss by this number.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        defenses: Sequence[Defense],
        ce_scale: torch.Tensor,
        marks: Mapping[str, torch.Tensor],
        reference: InsideReference | None = None,
        states: States | None = None,
        referenced: torch.Tensor | None = None,
    ):
        self.referenced = referenced
        self.share = 1.0
        self.compares_start = False
        self.model_defenses = [defense for defense in defenses if isinstance(defense, ModelDefense)]
        self.terms = terms
        self.defenses = defenses
        self.ce_scale = ce_scale
        self.marks = marks
        self.reference = reference
        self.states = states

    @property
    def names(self) -> list[str]:
        """Names of the sums in [`GuardOutput.stats`]."""
        names = ["ce", "tokens", "entropy", "top1"]
        names += [f"{what}/{scope}" for scope in self.marks for what in ("ce", "tokens")]
        for defense in [*(term.defense for term in self.terms), *self.model_defenses]:
            names += [f"{defense.name}/{what}" for what in TERM_SUMS]
        return [*names, "start_difference", "start_positions"] if self.compares_start else names

    def __call__(
        self, model: PreTrainedModel, stock_forward: Callable[..., Any], inputs: dict[str, Any]
    ) -> GuardOutput:
        # Mask `(B, T - 1)`, true at each position that predicts a label or that a term compares: P positions in all.
        kept = kept_positions(inputs, self.terms)
        batch = dict(inputs)
        labels = inputs.pop("labels")[:, 1:][kept]  # (P,)
        layers = wanted_layers([term.defense for term in self.terms], model)

        # A reference whose states were not given (`states`) runs now, before the policy and without gradient. It runs
        # outside of the defenses' `policy_pass` contexts, because these contexts must change only the policy's states.
        reference, referenced = self.states, torch.zeros_like(kept) if self.referenced is None else self.referenced
        if reference is None and self.reference is not None:
            reference = self.reference.inside(model, inputs, referenced, layers)

        # The policy runs inside the `policy_pass` contexts, so that defenses such as steering change its forward pass.
        with ExitStack() as surroundings:
            for defense in self.defenses:
                surroundings.enter_context(defense.policy_pass(model, {**batch, MARKS: Marks(dict(self.marks))}))
            policy = run_backbone(model, inputs, kept, layers)

        # `_run_head` applies the output head in chunks of tokens. It computes CE, the divergence between next-token
        # distributions of policy and reference (if a term compares them), and gradients. No full logits are stored.
        divergence = next((term for term in self.terms if term.defense.divergence is not None), None)
        head = self._run_head(model, policy, reference, divergence, labels, kept)
        loss, device = head.loss, policy.head[0].device
        has_label = labels.to(device) != -100
        stats = [head.ce.sum(), has_label.sum(), head.entropy[has_label].sum(), head.is_top1.sum()]
        for scope in self.marks:
            marked = positions_in_scope(batch, scope, self.marks)[kept].to(device)
            stats += [head.ce[marked].sum(), marked.sum()]

        # The divergence term comes from the output head above. Terms that compare block outputs are computed here.
        for term in self.terms:
            if term is divergence:
                value, evidence = head.divergence[term.positions[kept].to(device)].sum(), head.divergence_evidence
                connected = any(x is not None and x.requires_grad for x in (policy.last, *policy.head))
            else:
                own = wanted_layers([term.defense], model)
                # `reference` is `None` if the reference did not run, because this micro-batch has no position to
                # compare. The term then compares empty tensors.
                blocks = {layer: policy.blocks[layer][:0] for layer in own} if reference is None else reference.blocks
                weighted, value, evidence, connected = state_term(term, own, policy.blocks, blocks, kept, referenced)
                loss = loss + weighted.to(loss.device)
            stats += [value, term.positions.sum(), evidence, torch.tensor(connected)]
        for defense in self.model_defenses:
            weighted, sums = model_term(defense, model, batch, self.share)
            loss = loss + weighted.to(loss.device)
            stats += sums
        if self.compares_start:
            at = referenced[kept].to(device)
            stats += [_difference(policy, reference, at, has_label), (has_label & at).sum()]
        return GuardOutput(
            total=loss,
            stats=torch.stack([s.detach().to(loss.device, torch.float32) for s in stats]),
            router_logits=policy.router_logits,
        )

    def _run_head(
        self,
        model: PreTrainedModel,
        policy: States,
        reference: States | None,
        divergence: Term | None,
        labels: torch.Tensor,
        kept: torch.Tensor,
    ) -> Any:
        weight, bias = policy.head
        device = weight.device
        labels = labels.to(device)
        softcap, logit_scale = logit_transform(model.config.get_text_config())
        with gathered(weight, bias, *(reference.head if reference is not None else ())):
            compared = at = term_weight = None
            if divergence is not None and reference is not None:
                ref_weight, ref_bias = reference.head
                ref_bias = None if ref_bias is None else ref_bias.to(device)
                assert self.referenced is not None
                own = divergence.positions[self.referenced].to(reference.last.device)
                compared = reference.last[own].to(device), ref_weight.to(device), ref_bias
                at = divergence.positions[kept].to(device)
                term_weight = divergence.scale.to(device) * at
            return ce_divergence_head(
                policy.last.to(device),
                weight,
                bias,
                labels,
                self.ce_scale.to(device) * (labels != -100),
                term_weight,
                compared,
                (divergence and divergence.defense.divergence) or "reverse",
                softcap,
                logit_scale,
                at,
            )


def balance_loss(router_logits: Any, config: PreTrainedConfig, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the routers' load-balancing loss of a micro-batch, `()`, in mixture-of-experts models.

    Like SFTTrainer, the caller averages this loss over a step's micro-batches, regardless of their numbers of tokens.
    """
    config = config.get_text_config()
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, mask)


@torch.no_grad()
def _difference(policy: States, reference: States | None, at: torch.Tensor, has_label: torch.Tensor) -> torch.Tensor:
    """Return Σ ‖policy − reference‖ / ‖reference‖, `()`, over positions with a label and over kinds of states.

    The kinds of states are the output of each kept block and, if the reference has them, the states after the final
    norm.

    Args:
        policy: states at P positions.
        reference: states at R of the P positions; `None` where R is 0.
        at: `(P,)`, true at the R positions.
        has_label: `(P,)`, true at positions with a label.
    """
    total = torch.zeros((), device=has_label.device)
    if reference is None:
        return total
    pairs = [(policy.blocks[layer], reference.blocks[layer]) for layer in policy.blocks]
    if reference.last.numel():
        pairs.append((policy.last, reference.last))
    for of_policy, of_reference in pairs:
        x, y = of_policy[at.to(of_policy.device)].float(), of_reference.to(of_policy.device).float()
        share = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        rows = has_label[at.to(has_label.device)]
        total = total + share.to(rows.device)[rows].sum()
    return total
