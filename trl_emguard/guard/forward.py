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
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..defenses import Defense, ReferenceDefense
from ..defenses.interleaving.collator import INTERLEAVED
from ..models.blocks import record_blocks
from ..models.sharding import gathered
from ..ops import ce_divergence_head, logit_transform, with_gradient
from ..reference.choose import AdapterReference, ModelReference


def positions_in_scope(inputs: Mapping[str, Any], tokens: str) -> torch.Tensor:
    """Which positions a term looks at: entry t is about the prediction of token t + 1.

    Args:
        inputs: a collated batch, `(B, T)` tensors.
        tokens: `"loss"` for positions that predict a label; `"interleaved"` for those that predict a label of a mixed-in row;
            `"all"` for those that predict a real token, by attention mask or document boundaries and never by pad id (which
            may equal the end of turn).

    Returns:
        Boolean, `(B, T - 1)`.

    Raises:
        ValueError: `"all"`, and the batch does not say which tokens are real.
    """
    if tokens == "loss":
        return inputs["labels"][:, 1:] != -100
    if tokens == "interleaved":
        return (inputs["labels"][:, 1:] != -100) & inputs[INTERLEAVED][:, 1:]
    if inputs.get("attention_mask") is not None:
        mask = inputs["attention_mask"].bool()
        return mask[:, 1:] & mask[:, :-1]
    if inputs.get("position_ids") is not None:
        # Padding-free: a position of 0 starts a document, or pads the end.
        return inputs["position_ids"][:, 1:] != 0
    raise ValueError(
        "tokens='all' needs to know which tokens are real, and this batch has neither 'attention_mask' nor 'position_ids': let "
        "the data collator return one."
    )


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
        total: `()`, CE + Σ coef · term, scaled for the step; the only entry with a gradient.
        stats: `(6 + 4 · terms,)`, sums over this micro-batch's positions, detached: CE, label positions, entropy, top-1
            hits, CE and label positions in mixed-in rows; then per term its value, positions, evidence, and whether the
            policy's states require grad.
        router_logits: of mixture-of-experts models.
    """

    # Not `loss`: AdaLoRA adds a regulariser of its own to an output of that name, which SFTTrainer's does not have.
    total: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    router_logits: Any = None


HEAD_STATS = ("ce", "tokens", "entropy", "top1", "ce_interleaved", "tokens_interleaved")
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


def run_model_reference(
    reference: ModelReference, inputs: Mapping[str, Any], scope: torch.Tensor, defenses: Sequence[ReferenceDefense]
) -> States:
    """The states that a separate reference model gives to the positions of a batch, `(B, T - 1)`, by its own engine."""
    request = ReferenceGuard(scope, wanted_layers(defenses, reference.model))
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "output_router_logits")}
    states = reference.engine(**inputs, guard=request)
    # Read anew: FSDP2 takes a head apart again when the pass ends.
    states.head = output_head(reference.model)
    return states


@dataclass
class Term:
    """A reference defense in one micro-batch.

    Attributes:
        defense: whose distance it is.
        scope: `(B, T - 1)`, the positions it looks at.
        scale: `()`, what the sum over them is multiplied with: coef · ranks / positions in scope of the step.
    """

    defense: ReferenceDefense
    scope: torch.Tensor
    scale: torch.Tensor


def kept_positions(inputs: Mapping[str, Any], terms: Sequence[Term]) -> torch.Tensor:
    """The positions whose states CE or any term needs. `(B, T - 1)`"""
    return functools.reduce(torch.logical_or, [term.scope for term in terms], positions_in_scope(inputs, "loss"))


class PolicyGuard:
    """One training micro-batch of a defended run.

    Args:
        terms: at most one of them compares distributions.
        defenses: all active defenses: those that surround the policy's pass act here.
        ce_scale: `()`, what Σ CE is multiplied with: ranks / label tokens of the step.
        reference: the reference that shares the policy's base weights, or the states of one that does not or is cached; `None`
            without terms.
        interleaved: `(B, T - 1)`, positions that predict a label of a mixed-in row, where rows are mixed in.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        defenses: Sequence[Defense],
        ce_scale: torch.Tensor,
        reference: AdapterReference | States | None,
        interleaved: torch.Tensor | None = None,
    ):
        self.terms = terms
        self.defenses = defenses
        self.ce_scale = ce_scale
        self.reference = reference
        self.interleaved = interleaved

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> GuardOutput:
        kept = kept_positions(inputs, self.terms)  # (B, T - 1), P of them
        batch = dict(inputs)
        labels = inputs.pop("labels")[:, 1:][kept]  # (P,)
        layers = wanted_layers([term.defense for term in self.terms], model)

        # The reference's pass: no gradient, nothing around it, other adapters.
        reference: States | None
        if isinstance(self.reference, AdapterReference):
            with self.reference.swapped_in():
                reference = ReferenceGuard(kept, layers)(model, inputs)
        else:
            reference = self.reference

        # The policy's pass.
        with ExitStack() as surroundings:
            for defense in self.defenses:
                surroundings.enter_context(defense.policy_pass(model, batch))
            policy = _run(model, inputs, kept, layers)

        # The head: CE and KL in one pass, with their gradient.
        weight, bias = policy.head
        device = weight.device
        labels = labels.to(device)
        has_label = labels != -100
        kl = next((term for term in self.terms if term.defense.divergence is not None), None)
        kl_weight = None if kl is None else kl.scale.to(device) * kl.scope[kept].to(device)
        softcap, logit_scale = logit_transform(model.config.get_text_config())
        with gathered(weight, bias, *(reference.head if reference is not None else ())):
            compared = None
            if kl is not None and reference is not None:
                ref_weight, ref_bias = reference.head
                compared = (
                    reference.last.to(device),
                    ref_weight.to(device),
                    None if ref_bias is None else ref_bias.to(device),
                )
            head = ce_divergence_head(
                policy.last.to(device),
                weight,
                bias,
                labels,
                self.ce_scale.to(device) * has_label,
                kl_weight,
                compared,
                (kl and kl.defense.divergence) or "reverse",
                softcap,
                logit_scale,
            )
        loss = head.loss
        mixed_in = torch.zeros_like(has_label) if self.interleaved is None else self.interleaved[kept].to(device)
        stats = [head.ce.sum(), has_label.sum(), head.entropy[has_label].sum(), head.is_top1.sum()]
        stats += [head.ce[mixed_in].sum(), mixed_in.sum()]

        # The terms: the head's is done, those over block outputs form their gradient here.
        for term in self.terms:
            if term is kl:
                value, evidence = head.divergence[term.scope[kept].to(device)].sum(), head.divergence_evidence
                connected = policy.last.requires_grad
            else:
                assert reference is not None  # where there are terms, there is one
                own = wanted_layers([term.defense], model)
                weighted, value, evidence, connected = state_term(term, own, policy.blocks, reference.blocks, kept)
                loss = loss + weighted.to(loss.device)
            stats += [value, term.scope.sum(), evidence, torch.tensor(connected)]
        return GuardOutput(
            total=loss,
            stats=torch.stack([s.detach().to(loss.device, torch.float32) for s in stats]),
            router_logits=policy.router_logits,
        )


def state_term(
    term: Term,
    layers: Sequence[int],
    policy: dict[int, torch.Tensor],
    reference: dict[int, torch.Tensor],
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """A term over block outputs, with its gradient formed at once.

    Args:
        term: whose [`~ReferenceDefense.token_loss`] it is.
        layers: the blocks it looks at.
        policy: layer → the policy's states, `(P, H)`.
        reference: layer → the reference's.
        kept: `(B, T - 1)`, the P positions that the states are of.

    Returns:
        scale · Σ distance, `()`, connected to `policy`; the plain sum, `()`; the evidence Σ |∂ scale · Σ distance / ∂
        states|, `()`, exactly 0 where the term teaches nothing; and whether any of the policy's states requires grad.
    """
    rows = term.scope[kept]
    states = [policy[layer][rows.to(policy[layer].device)] for layer in layers]
    leaves = [x.detach().requires_grad_() for x in states]
    targets = [reference[layer].to(x.device)[rows.to(x.device)] for layer, x in zip(layers, leaves, strict=True)]
    with torch.enable_grad():
        distance = term.defense.token_loss(leaves, targets)
        if distance.shape != leaves[0].shape[:1]:
            raise ValueError(
                f"{type(term.defense).__name__}.token_loss returned shape {tuple(distance.shape)}: it must be one distance "
                f"per token, ({len(leaves[0])},)."
            )
        weighted = distance.sum() * term.scale.to(distance)
    gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
    # A detached term has a value and no gradient, and the evidence says so.
    if weighted.requires_grad:
        gradients = torch.autograd.grad(weighted, leaves, allow_unused=True)
    evidence = torch.zeros((), device=weighted.device)
    for gradient in gradients:
        if gradient is not None:
            evidence += gradient.abs().sum(dtype=torch.float32).to(evidence.device)
    connected = any(x.requires_grad for x in states)
    return with_gradient(weighted, states, gradients), distance.detach().sum(), evidence, connected


def wanted_layers(defenses: Sequence[ReferenceDefense], model: PreTrainedModel) -> list[int]:
    """The blocks that any of the defenses looks at, ascending.

    Raises:
        ValueError: a layer outside 1 … L, or a defense that compares neither distributions nor blocks.
    """
    count = model.config.get_text_config().num_hidden_layers
    wanted: set[int] = set()
    for defense in defenses:
        layers = defense.layers(count)
        if not layers and defense.divergence is None:
            raise ValueError(
                f"defense {defense.name!r} names no layer and sets no `divergence`: it has nothing to compare."
            )
        for layer in layers:
            if not 1 <= layer <= count:
                raise ValueError(
                    f"defense {defense.name!r}: layer {layer} is out of range: the blocks count from 1 to {count}."
                )
        wanted.update(layers)
    return sorted(wanted)


def _run(model: PreTrainedModel, inputs: dict[str, Any], scope: torch.Tensor, layers: Sequence[int]) -> States:
    """One backbone pass, and the states of the positions in `scope`."""

    def select(states: torch.Tensor) -> torch.Tensor:
        return states[:, :-1][scope.to(states.device)]  # (B, T, H) → (P, H)

    with record_blocks(model, layers, select) as blocks:
        # The backbone is looked up on each call: FSDP and PEFT may replace it after patching.
        outputs = model.base_model(**inputs)
    return States(
        select(outputs.last_hidden_state), blocks, output_head(model), getattr(outputs, "router_logits", None)
    )


def output_head(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A model's head, weight `(V, H)` and bias `(V,)` or `None`. With adapters off, one in `modules_to_save` is the original."""
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, lm_head.bias
    # A head whose module is never called stays FSDP2's shards: it is gathered once, before it is cut into chunks. Its gradient is
    # each rank's own, and averaged over the ranks as FSDP2 averages what it gathers itself.
    if isinstance(weight, DTensor):
        weight, bias = _whole(weight), None if bias is None else _whole(bias)
    return weight, bias


def _whole(shards: DTensor) -> torch.Tensor:
    return shards.full_tensor(grad_placements=[Partial("avg")] * shards.device_mesh.ndim)
