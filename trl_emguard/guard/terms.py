"""Terms that defenses add to the loss of a micro-batch."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..defenses.base import ModelDefense, ReferenceDefense
from ..models.blocks import decoder_blocks
from ..ops import with_gradient
from .scopes import LABELS, positions_in_scope


@dataclass
class Term:
    """Term of a reference defense in one micro-batch.

    Attributes:
        defense: defense that defines the distance per token.
        positions: `(B, T - 1)`, mask of the positions over which the distance is summed.
        scale: `()`, factor of this sum: coefficient · ranks / number of positions in the step.
    """

    defense: ReferenceDefense
    positions: torch.Tensor
    scale: torch.Tensor


def scaled_terms(
    defenses: Sequence[ReferenceDefense],
    batch: Mapping[str, Any],
    marks: Mapping[str, torch.Tensor],
    counts: Mapping[str, torch.Tensor],
    ranks: int,
) -> tuple[torch.Tensor, list[Term]]:
    """Return the factor of CE's sum, `()`, and the terms with their positions and factors.

    The factor of cross-entropy (CE) is the number of ranks, because DDP averages gradients over them, divided by the
    number of label tokens in the whole step.

    Args:
        defenses: active reference defenses.
        batch: collated micro-batch.
        marks: masks of tokens by the name of a scope.
        counts: number of positions in the step over all ranks, by scope. For a scope without a number, the mean is
            taken over the micro-batch, and Trainer divides it by the accumulation steps.
        ranks: ranks over which gradients are averaged.
    """

    def scale(coef: float, scope: str) -> torch.Tensor:
        here = positions_in_scope(batch, scope, marks)
        count = torch.as_tensor(counts[scope] if scope in counts else here.sum(), device=here.device)
        return coef * ranks / count.to(torch.float32).clamp(min=1)

    terms = [
        Term(d, positions_in_scope(batch, d.tokens, marks), scale(d.coef, d.mean_over or d.tokens)) for d in defenses
    ]
    return scale(1.0, LABELS), terms


def kept_positions(batch: Mapping[str, Any], terms: Sequence[Term], with_labels: bool = True) -> torch.Tensor:
    """Return the mask of positions whose states a term needs, or CE if `with_labels` is set, `(B, T - 1)`."""
    positions = [positions_in_scope(batch, LABELS)] if with_labels else []
    return functools.reduce(torch.logical_or, positions + [term.positions for term in terms])


def state_term(
    term: Term,
    layers: Sequence[int],
    policy: dict[int, torch.Tensor],
    reference: dict[int, torch.Tensor],
    kept: torch.Tensor,
    referenced: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Compute a term over block outputs, together with its gradient.

    Args:
        term: term whose [`~ReferenceDefense.token_loss`] is taken.
        layers: blocks whose outputs the term compares.
        policy: layer → the policy's states, `(P, H)`.
        reference: layer → the reference's states, `(R, H)`.
        kept: `(B, T - 1)`, mask of the P positions of the policy's states.
        referenced: `(B, T - 1)`, mask of the R positions of the reference's states, among them the term's positions.

    Returns:
        scale · Σ distance, `()`, connected to `policy` by autograd; Σ distance, `()`, detached; the evidence
        Σ |∂ scale · Σ distance / ∂ states|, `()`, exactly 0 where the term has no gradient; and whether any of the
        policy's states requires grad.
    """
    rows, reference_rows = term.positions[kept], term.positions[referenced]
    states = [policy[layer][rows.to(policy[layer].device)] for layer in layers]
    leaves = [x.detach().requires_grad_() for x in states]
    targets = [
        reference[layer].to(x.device)[reference_rows.to(x.device)] for layer, x in zip(layers, leaves, strict=True)
    ]
    with torch.enable_grad():
        distance = term.defense.token_loss(leaves, targets)
        if distance.shape != leaves[0].shape[:1]:
            raise ValueError(
                f"{type(term.defense).__name__}.token_loss returned shape {tuple(distance.shape)}: it must be one "
                f"distance per token, ({len(leaves[0])},)."
            )
        weighted = distance.sum() * term.scale.to(distance)
    gradients, evidence = _gradients(weighted, leaves)
    connected = any(x.requires_grad for x in states)
    return with_gradient(weighted, states, gradients), distance.detach().sum(), evidence, connected


def model_term(
    defense: ModelDefense, model: PreTrainedModel, batch: Mapping[str, Any], share: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute a micro-batch's share of a term that does not depend on the batch, together with its gradient.

    Returns:
        share · coef · d, `()`, connected to the weights by autograd; and four numbers to be summed over the step:
        share · d, the share itself, the evidence Σ |∂ share · coef · d / ∂ states|, and whether any of the states
        requires grad.
    """
    states = defense.model_states(model, batch)
    # Detached leaves give the gradient with respect to each state alone. In the model's graph, states of higher blocks
    # also depend on those of lower blocks.
    leaves = [x.detach().requires_grad_() for x in states]
    with torch.enable_grad():
        distance = defense.model_loss(leaves)
        weighted = share * defense.coef * distance
    gradients, evidence = _gradients(weighted, leaves)
    connected = any(x.requires_grad for x in states)
    sums = [share * distance.detach(), torch.tensor(share), evidence, torch.tensor(connected)]
    return with_gradient(weighted, states, gradients), sums


def _gradients(
    weighted: torch.Tensor, leaves: Sequence[torch.Tensor]
) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
    """Return a term's gradient with respect to the compared states, and the evidence Σ |gradient|, `()`."""
    gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
    # A term that was detached from the graph has no gradient, so its evidence stays 0.
    if weighted.requires_grad:
        gradients = torch.autograd.grad(weighted, leaves, allow_unused=True)
    evidence = torch.zeros((), device=weighted.device)
    for gradient in gradients:
        if gradient is not None:
            evidence += gradient.abs().sum(dtype=torch.float32).to(evidence.device)
    return gradients, evidence


def wanted_layers(defenses: Sequence[ReferenceDefense], model: PreTrainedModel) -> list[int]:
    """Return the blocks whose outputs any of the defenses compares, ascending.

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


def check_layers_train(defenses: Sequence[ReferenceDefense], policy: nn.Module, bare: PreTrainedModel) -> None:
    """Refuse terms over outputs of blocks that no trained weight can change.

    `requires_grad` does not show this: with gradient checkpointing the output of every block requires grad.

    Args:
        defenses: active reference defenses.
        policy: the model with its adapters.
        bare: the causal language model inside of it.

    Raises:
        ValueError: a defense compares a block below the lowest trained weight.
    """
    layers_of = {defense.name: wanted_layers([defense], bare) for defense in defenses}
    if not any(layers_of.values()):
        return
    # Blocks count from 1. The head is above all blocks, and any other weight outside of them counts as below them.
    blocks = decoder_blocks(bare)
    place = {id(p): len(blocks) + 1 for p in bare.get_output_embeddings().parameters()}
    place |= {id(p): 0 for p in bare.get_input_embeddings().parameters()}
    place |= {id(p): i for i, block in enumerate(blocks, 1) for p in block.parameters()}
    lowest = min((place.get(id(p), 0) for p in policy.parameters() if p.requires_grad), default=0)
    for name, layers in layers_of.items():
        below = [layer for layer in layers if layer < lowest]
        if below:
            raise ValueError(
                f"defense {name!r} compares the output of block {below[0]}, but the lowest block with a trained "
                f"weight is {lowest}: nothing could move it. Compare higher blocks, or train lower ones."
            )
