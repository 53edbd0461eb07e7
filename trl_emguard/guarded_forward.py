"""The one patched forward: reference pass, policy pass, head, terms.

A training step of a defended run calls the wrapped model once per micro-batch, `model(**inputs, guard=...)`. What
happens inside stands in [`PolicyGuard.__call__`], from top to bottom. Without `guard` the forward is the stock one.
"""

import functools
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .blocks import record_blocks
from .defenses import Defense, ReferenceDefense
from .ops import ce_kl_head, with_gradient
from .reference import AdapterReference


def positions_in_scope(inputs: Mapping[str, Any], tokens: str) -> torch.Tensor:
    """Which positions a term looks at: entry t is about the prediction of token t + 1.

    Args:
        inputs: a collated batch, `(B, T)` tensors.
        tokens: `"loss"` for positions that predict a label; `"all"` for those that predict a real token, by attention
            mask or document boundaries and never by pad id (which may equal the end of turn).

    Returns:
        Boolean, `(B, T - 1)`.
    """
    if tokens == "loss":
        return inputs["labels"][:, 1:] != -100
    if inputs.get("attention_mask") is not None:
        mask = inputs["attention_mask"].bool()
        return mask[:, 1:] & mask[:, :-1]
    if inputs.get("position_ids") is not None:
        # Padding-free: a position of 0 starts a document, or pads the end.
        return inputs["position_ids"][:, 1:] != 0
    return torch.ones_like(inputs["input_ids"][:, 1:], dtype=torch.bool)


@dataclass
class States:
    """What a pass keeps of P positions.

    Attributes:
        last: `(P, H)`, after the final norm: what the head projects.
        blocks: layer → `(P, H)`, raw block outputs.
        head: weight `(V, H)` and bias `(V,)` or `None`.
        router_logits: of mixture-of-experts models, as the backbone returns them.
    """

    last: torch.Tensor
    blocks: dict[int, torch.Tensor]
    head: tuple[torch.Tensor, torch.Tensor | None]
    router_logits: Any = None


@dataclass
class GuardOutput(ModelOutput):
    """What a guarded forward returns.

    Attributes:
        loss: `()`, CE + Σ coef · term, scaled for the step; the only entry with a gradient.
        stats: `(4 + 4 · terms,)`, sums over this micro-batch's positions, detached: CE, label positions, entropy, top-1
            hits; then per term its value, positions, evidence, and whether the policy's states require grad.
        router_logits: of mixture-of-experts models.
    """

    loss: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    router_logits: Any = None


HEAD_STATS = ("ce", "tokens", "entropy", "top1")
TERM_STATS = ("value", "positions", "evidence", "requires_grad")


def add_guarded_forward(model: PreTrainedModel) -> None:
    """Let `model(..., guard=g)` answer with `g(model, inputs)`. Call it after TRL added its head, before any wrapper."""
    original_forward = model.forward

    # The original signature: `generate` validates its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, guard=None, **kwargs):
        if guard is None:
            return original_forward(*args, **kwargs)
        return guard(self, kwargs)

    model.forward = types.MethodType(forward, model)


class ReferenceGuard:
    """The pass of a separate reference model: no gradient, and only the states that the terms compare.

    Args:
        scope: `(B, T - 1)`, the positions to keep.
        layers: the blocks to keep.
    """

    def __init__(self, scope: torch.Tensor, layers: Sequence[int]):
        self.scope = scope
        self.layers = layers

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> States:
        return _run(model, inputs, self.scope, self.layers)


class PolicyGuard:
    """One training micro-batch of a defended run.

    Args:
        terms: the active reference defenses.
        defenses: all active defenses: those that surround the policy's pass act here.
        scopes: for each term, the positions it looks at, `(B, T - 1)`.
        ce_scale: what Σ CE is multiplied with: ranks / label tokens of the step.
        term_scales: for each term, what its sum is multiplied with: coef · ranks / tokens in scope of the step.
        reference: the reference that shares the policy's base weights, or its states, already computed.
    """

    def __init__(
        self,
        terms: Sequence[ReferenceDefense],
        defenses: Sequence[Defense],
        scopes: Sequence[torch.Tensor],
        ce_scale: torch.Tensor,
        term_scales: Sequence[torch.Tensor],
        reference: AdapterReference | States,
    ):
        self.terms = terms
        self.defenses = defenses
        self.scopes = scopes
        self.ce_scale = ce_scale
        self.term_scales = term_scales
        self.reference = reference

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> GuardOutput:
        has_label = positions_in_scope(inputs, "loss")  # (B, T - 1)
        scope = functools.reduce(torch.logical_or, self.scopes, has_label)
        labels = inputs.pop("labels")[:, 1:][scope]  # (P,)
        divergent = [term for term in self.terms if term.divergence is not None]
        layers = wanted_layers(self.terms, model)

        # The reference's pass: no gradient, no steering, other adapters.
        reference = self.reference
        if isinstance(reference, AdapterReference):
            with reference.swapped_in():
                reference = ReferenceGuard(scope, layers)(model, inputs)

        # The policy's pass.
        with ExitStack() as surroundings:
            for defense in self.defenses:
                surroundings.enter_context(defense.policy_pass(model))
            policy = _run(model, inputs, scope, layers)

        # Per term, the weight of each kept position: its scale inside its scope, 0 outside.
        weights = [
            scale * positions[scope].to(policy.last.device)
            for scale, positions in zip(self.term_scales, self.scopes, strict=True)
        ]

        # One pass of the head for CE and KL, with their gradient.
        device = policy.head[0].device
        labels = labels.to(device)
        kl_weight = weights[self.terms.index(divergent[0])].to(device) if divergent else None
        softcap, logit_scale = logit_transform(model)
        with maybe_gather_lm_head_ctx(*policy.head, *(reference.head if divergent else ())):
            head = ce_kl_head(
                policy.last.to(device),
                *policy.head,
                labels,
                self.ce_scale.to(device) * (labels != -100),
                kl_weight,
                (reference.last.to(device), *reference.head) if divergent else None,
                divergent[0].divergence if divergent else "reverse",
                softcap,
                logit_scale,
            )
        loss = head.loss
        stats = [head.ce.sum(), (labels != -100).sum(), head.entropy[labels != -100].sum(), head.is_top1.sum()]

        # The terms over block outputs.
        for term, positions, weight in zip(self.terms, self.scopes, weights, strict=True):
            if term.divergence is not None:
                value, evidence = head.kl[positions[scope].to(device)].sum(), head.kl_evidence
                connected = policy.last.requires_grad
            else:
                kept = positions[scope]
                wanted = term.layers(model.config.get_text_config().num_hidden_layers)
                weighted, value, evidence, connected = state_term(
                    term,
                    [policy.blocks[layer][kept.to(policy.blocks[layer].device)] for layer in wanted],
                    [reference.blocks[layer][kept.to(reference.blocks[layer].device)] for layer in wanted],
                    weight[kept.to(weight.device)],
                )
                loss = loss + weighted.to(loss.device)
            stats += [value, positions.sum(), evidence, torch.tensor(float(connected))]
        return GuardOutput(
            loss=loss,
            stats=torch.stack([s.detach().to(loss.device, torch.float32) for s in stats]),
            router_logits=policy.router_logits,
        )


def state_term(
    term: ReferenceDefense, policy: list[torch.Tensor], reference: list[torch.Tensor], weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """A weighted term over block outputs, with its gradient formed at once.

    Args:
        term: whose [`~ReferenceDefense.token_loss`] it is.
        policy: for each layer, the policy's states, `(N, H)`.
        reference: the reference's.
        weight: `(N,)`.

    Returns:
        The weighted sum, `()`, connected to `policy`; the plain sum, `()`; the evidence Σ |∂ weighted sum / ∂ states|,
        `()`, exactly 0 where the term teaches nothing; and whether any of the policy's states requires grad.
    """
    leaves = [x.detach().requires_grad_() for x in policy]
    reference = [x.to(leaf.device) for x, leaf in zip(reference, leaves, strict=True)]
    with torch.enable_grad():
        value = term.token_loss(leaves, reference)
        if value.shape != weight.shape:
            raise ValueError(
                f"{type(term).__name__}.token_loss returned shape {tuple(value.shape)}; it must be one distance per "
                f"token, {tuple(weight.shape)}."
            )
        weighted = (value * weight.to(value)).sum()
    gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
    # A detached term has a value and no gradient, and the evidence says so.
    if weighted.requires_grad:
        gradients = torch.autograd.grad(weighted, leaves, allow_unused=True)
    evidence = sum((g.abs().sum(dtype=torch.float32).to(value.device) for g in gradients if g is not None), torch.zeros(()))
    connected = any(x.requires_grad for x in policy)
    return with_gradient(weighted, policy, gradients), value.detach().sum(), torch.as_tensor(evidence), connected


def wanted_layers(terms: Sequence[ReferenceDefense], model: PreTrainedModel) -> list[int]:
    """The blocks that any of the terms looks at, ascending."""
    count = model.config.get_text_config().num_hidden_layers
    return sorted({layer for term in terms for layer in term.layers(count)})


def logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """Soft-cap and scale that the model's own forward applies to its logits, under the names that models give them."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        scale = 1.0 if scaling is None else scaling if config.model_type == "hyperclovax" else 1 / scaling
    return getattr(config, "final_logit_softcapping", None), float(scale)


def _run(model: PreTrainedModel, inputs: dict[str, Any], scope: torch.Tensor, layers: Sequence[int]) -> States:
    """One backbone pass, and the states of the positions in `scope`."""

    def select(states: torch.Tensor) -> torch.Tensor:
        return states[:, :-1][scope.to(states.device)]  # (B, T, H) → (P, H)

    with record_blocks(model, layers, select) as blocks:
        # The backbone is looked up on each call: FSDP and PEFT may replace it after patching.
        outputs = model.base_model(**inputs)
    # With adapters off, a head in `modules_to_save` is the original one: it is looked up where the pass is.
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, lm_head.bias
    # FSDP2 keeps parameters as shards: the head is gathered once, before it is cut into chunks.
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    return States(select(outputs.last_hidden_state), blocks, (weight, bias), getattr(outputs, "router_logits", None))
