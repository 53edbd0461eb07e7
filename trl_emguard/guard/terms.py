"""Terms that defenses add to the loss of a micro-batch."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..defenses.base import Defense, ModelDefense, ReferenceDefense, TermDefense
from ..models.blocks import decoder_blocks
from ..ops import with_gradient
from .scopes import LABELS, positions_in_scope


@dataclass
class Term:
    """Loss term, in one micro-batch, of a defense that compares policy and reference ([`ReferenceDefense`]).

    Attributes:
        defense: defense that defines the distance per token.
        positions: `(B, T - 1)`, mask of the positions over which the distance is summed.
        scale: `()`, factor of this sum: coefficient · number of ranks / number of positions in the step.
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
    """Return the factor of the summed cross-entropy, `()`, and each defense's loss term with its positions and factor.

    The factor of cross-entropy is the number of ranks divided by the number of label tokens in the whole step. It
    contains the number of ranks because DDP averages gradients over the ranks.

    Args:
        defenses: active reference defenses.
        batch: collated micro-batch.
        marks: name of a scope → mask of its tokens, `(B, T)` boolean.
        counts: name of a scope → its number of positions in the step, summed over `ranks` ranks. For a scope that
            is missing here, the mean is taken over the micro-batch, and Trainer divides it by the number of
            accumulation steps.
        ranks: number of ranks over which gradients are averaged; 1 if `counts` are those of this rank alone.
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
    """Return a mask, `(B, T - 1)`, of all terms' positions; with `with_labels`, also of the positions with a label."""
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
    """Compute a loss term that compares block outputs, together with its gradient.

    Args:
        term: the term. Its defense computes the distances ([`~ReferenceDefense.token_loss`]).
        layers: blocks whose outputs the term compares.
        policy: layer → the policy's states, `(P, H)`.
        reference: layer → the reference's states, `(R, H)`.
        kept: `(B, T - 1)`, mask of the P positions of the policy's states.
        referenced: `(B, T - 1)`, mask of the R positions of the reference's states, among them the term's positions.

    Returns:
        1. The weighted term scale · Σ distance, `()`, connected to `policy` by autograd.
        2. Σ distance, `()`, detached.
        3. Evidence that the term has a gradient: Σ |∂ (scale · Σ distance) / ∂ states|, `()`. This sum is exactly 0 if
           the term has no gradient.
        4. True if any of the policy's states requires grad.
    """
    rows, reference_rows = term.positions[kept], term.positions[referenced]
    states = [policy[layer][rows.to(policy[layer].device)] for layer in layers]
    leaves = [x.detach().requires_grad_() for x in states]
    targets = [
        reference[layer].to(x.device)[reference_rows.to(x.device)] for layer, x in zip(layers, leaves, strict=True)
    ]
    with _graph_of_a_term():
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
    """Compute the part of a [`ModelDefense`]'s loss term that one micro-batch adds, together with its gradient.

    The term is coef · d. The distance d, from [`~ModelDefense.model_loss`], does not depend on the batch. So each
    micro-batch adds only `share` times the term.

    Returns:
        1. The weighted share of the term, share · coef · d, `()`, connected to the weights by autograd.
        2. Four numbers to be summed over the step: share · d; `share`; evidence that the term has a gradient,
           Σ |∂ (share · coef · d) / ∂ states|; 1 if any of the compared states requires grad, else 0.
    """
    states = defense.model_states(model, batch)
    # Detached leaves give the gradient with respect to each state alone. In the model's graph, higher blocks' states
    # depend on lower blocks' states, so a lower state's gradient would include its effect on the higher states. The
    # later backward pass through the model adds this effect as well, so the effect would count more than once.
    leaves = [x.detach().requires_grad_() for x in states]
    with _graph_of_a_term():
        distance = defense.model_loss(leaves)
        weighted = share * defense.coef * distance
        gradients, evidence = _gradients(weighted, leaves)
    connected = any(x.requires_grad for x in states)
    sums = [share * distance.detach(), torch.tensor(share), evidence, torch.tensor(connected)]
    return with_gradient(weighted, states, gradients), sums


@contextmanager
def _graph_of_a_term() -> Iterator[None]:
    """Record an autograd graph in the `with` block, hidden from `saved_tensors_hooks` that were set outside the block.

    TRL's `activation_offloading` sets such hooks around a step. They take the first read of a saved tensor for the
    start of the step's backward pass. If a term's graph were read before, they would free no memory until the step's
    end.
    """
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def _gradients(
    weighted: torch.Tensor, leaves: Sequence[torch.Tensor]
) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
    """Return a term's gradient with respect to each compared state, and Σ |gradient|, `()`, over all states.

    The sum is evidence: if it is above 0, the term has a gradient.
    """
    gradients: Sequence[torch.Tensor | None] = [None] * len(leaves)
    # A defense may detach its distance from the graph by mistake. Then no gradient can be computed, and the evidence
    # stays 0.
    if weighted.requires_grad:
        gradients = torch.autograd.grad(weighted, leaves, allow_unused=True)
    evidence = torch.zeros((), device=weighted.device)
    for gradient in gradients:
        if gradient is not None:
            evidence += gradient.abs().sum(dtype=torch.float32).to(evidence.device)
    return gradients, evidence


def term_values(defenses: Sequence[Defense], sums: Mapping[str, float]) -> dict[str, float]:
    """Return the summed distance of each defense that adds a term to the loss: name of the defense → Σ distance.

    Args:
        defenses: active defenses.
        sums: a step's sums over micro-batches and ranks, by name.

    Raises:
        FloatingPointError: a term's gradient is not finite, although its distance is.
    """
    values = {d.name: sums[f"{d.name}/value"] for d in defenses if isinstance(d, TermDefense)}
    for name, value in values.items():
        if math.isfinite(value) and not math.isfinite(sums[f"{name}/evidence"]):
            raise FloatingPointError(
                f"defense {name!r}: its distance is finite, and the gradient of its distance is not. A square root or "
                "a norm has no gradient at 0, and the distance is 0 before the policy has moved: add a small number "
                "below the root, as in (x + 1e-12).sqrt()."
            )
    return values


def wanted_layers(defenses: Sequence[ReferenceDefense], model: PreTrainedModel) -> list[int]:
    """Return the numbers of all blocks whose outputs some defense compares, in ascending order.

    Raises:
        ValueError: a defense names a layer outside 1 … L (the number of blocks), or has nothing to compare: it names
            no layers and sets no `divergence`.
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
    """Refuse loss terms that compare block outputs which no trained weight can change.

    The outputs' `requires_grad` cannot show this: with gradient checkpointing, every block's output requires grad.

    Args:
        defenses: active reference defenses.
        policy: the model with its adapters.
        bare: the causal language model inside `policy`, without the PEFT wrapper.

    Raises:
        ValueError: a defense compares the output of a block below the lowest trained weight.
    """
    layers_of = {defense.name: wanted_layers([defense], bare) for defense in defenses}
    if not any(layers_of.values()):
        return
    # Each weight gets a number n: training the weight is taken to change the outputs of block n and all higher blocks,
    # and no other outputs. A weight in a block gets the block's number, from 1. The output head changes no block's
    # output, and gets a number above all blocks. Any other weight gets 0, and counts as changing the outputs of all
    # blocks. Examples are the embeddings, also if they are tied to the head.
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
