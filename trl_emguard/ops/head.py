"""Fused LM head: cross-entropy, divergence from a reference model and their gradient, in one pass over the tokens."""

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from .gradient import with_gradient
from .tiles import BLOCK_BYTES, TileStatistics, to_logits_, torch_tile_pass


# Limit in bytes on the tiles (tensors of shape tokens × vocabulary) of one chunk of tokens. It sets how many tokens a
# chunk has. A chunk needs a tile for the policy's hidden states times head and, with a reference model, a tile for the
# reference's states times head. The gradient of the loss needs no tile of its own: it overwrites the policy's tile. If
# matrix products take bf16 or fp16 factors and give fp32 results, this gradient is copied to bf16 or fp16 for further
# products, and the copy counts as well.
TILE_BYTES = 256 * 2**20


class HeadOutput(NamedTuple):
    """Results of the head for N positions. Only `loss` has a gradient.

    Attributes:
        loss: `()`. Σ_i ce_weight_i · CE_i + divergence_weight_i · D_i.
        ce: `(N,)`. Cross-entropy in nats; 0 where the label is -100.
        divergence: `(N,)`. Divergence from the reference in nats; 0 without a reference.
        entropy: `(N,)`. Entropy of the policy's next-token distribution, in nats.
        is_top1: `(N,)`. 1 where the policy's most probable token is the label.
        divergence_evidence: `()`. Σ |∂(Σ divergence_weight · D) / ∂ logits|, summed over positions and vocabulary:
            exactly 0 if the divergence has no gradient.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    divergence_evidence: torch.Tensor


def ce_divergence_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ce_weight: torch.Tensor,
    divergence_weight: torch.Tensor | None = None,
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    direction: Literal["reverse", "forward"] = "reverse",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    compared: torch.Tensor | None = None,
) -> HeadOutput:
    """Compute a weighted sum of cross-entropy and divergence from a reference, and statistics, in chunks of tokens.

    Logits are `z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)`. p is the policy's distribution and q the
    reference's. The divergence D is Kullback-Leibler's. The reverse one is D = Σ p (log p − log q), and its gradient
    with respect to z is p (log p − log q − D). The forward one is D = Σ q (log q − log p), with gradient p − q. The
    gradient of cross-entropy is p − onehot.

    All these values and gradients follow from the logits of a chunk. So the gradient is computed together with the
    values, and then the chunk's logits are dropped. No N × V tensor ever exists, and the head costs three matrix
    products a step (four if it is trained). Everything is accumulated in fp32 (fp64 for fp64 inputs). The logits leave
    the matrix product in that dtype, because bf16 logits cause a gradient error of 4 to 23 %
    (linkedin/Liger-Kernel#1432).

    Args:
        hidden: `(N, H)`, the policy's last hidden states.
        weight: `(V, H)`, the policy's head.
        bias: `(V,)` or `None`.
        labels: `(N,)`, the token that each position predicts; -100 for positions without cross-entropy.
        ce_weight: `(N,)`, weight of each position's cross-entropy; must be 0 where the label is -100.
        divergence_weight: `(N,)`, weight of each position's divergence. Needed with `reference`.
        reference: the reference's hidden states `(R, H')`, head `(V, H')` and bias `(V,)` or `None`; they get no
            gradient.
        direction: `"reverse"` or `"forward"`.
        softcap: `final_logit_softcapping` of the model's config (Gemma 2).
        logit_scale: factor by which the model multiplies its logits (Cohere, Granite).
        compared: `(N,)` boolean, the R positions that have a reference; all by default. The other positions cost no
            product with the reference's head.
    """
    matmul = matmul_dtype(hidden)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        per_token, options = (labels, ce_weight, divergence_weight), (direction, (softcap, logit_scale), matmul)
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        of_head = [
            None if x is None or not x.requires_grad else torch.zeros_like(x, dtype=accumulate) for x in (weight, bias)
        ]
        if reference is None or compared is None or bool(compared.all()):
            output, of_hidden = _forward(hidden, weight, bias, per_token, reference, of_head, *options)
        else:
            parts = []
            for rows, of_reference in ((compared, reference), (~compared, None)):
                own = [None if x is None else x[rows] for x in per_token]
                parts.append(_forward(hidden[rows], weight, bias, own, of_reference, of_head, *options))
            output, of_hidden = _joined(parts, compared)
        gradients = [of_hidden, *(None if x is None else x.to(weight.dtype) for x in of_head)]
    return output._replace(loss=with_gradient(output.loss, (hidden, weight, bias), gradients))


@torch.no_grad()
def token_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """Return the negative log-likelihood of each label, in chunks and without gradient: no N × V tensor ever exists.

    Args:
        hidden: `(N, H)`, last hidden states.
        weight: `(V, H)`, the head.
        bias: `(V,)` or `None`.
        labels: `(N,)`, the token that each position predicts.
        softcap, logit_scale: see [`ce_divergence_head`].

    Returns:
        `(N,)`, nats, in fp32 (fp64 for fp64 inputs).
    """
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        matmul = matmul_dtype(hidden)
        head = weight.to(matmul).t()
        vocab, tokens = len(weight), len(hidden)
        nll = hidden.new_empty(tokens, dtype=accumulate)
        chunk = min(tokens, max(1, TILE_BYTES // (accumulate.itemsize * vocab)))
        tile = hidden.new_empty(chunk, vocab, dtype=accumulate)
        # On a CPU, the chunk's rows go through the steps after the matrix product block by block, so that each block
        # stays in the CPU's cache (see `torch_tile_pass`). On a CUDA device, the whole chunk is one block.
        block = chunk if hidden.is_cuda else max(1, BLOCK_BYTES // (accumulate.itemsize * vocab))
        for start in range(0, tokens, chunk) if tokens else ():
            h = hidden[start : start + chunk].to(matmul)
            products = _mm(h, head, accumulate, out=tile[: len(h)])
            for first in range(0, len(h), block):
                z = products[first : first + block]  # (B, V), with B tokens in the block
                rows = slice(start + first, start + first + len(z))
                to_logits_(z, bias, softcap, logit_scale)
                z.sub_(z.amax(-1, keepdim=True))
                at_label = z.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
                nll[rows] = z.exp_().sum(-1).log() - at_label
    return nll


def logit_transform(config: Any) -> tuple[float | None, float]:
    """Return the soft-cap and the scale that a model applies to its logits, read from its (text) config."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        scale = 1.0 if scaling is None else scaling if config.model_type == "hyperclovax" else 1 / scaling
    return getattr(config, "final_logit_softcapping", None), float(scale)


def _forward(hidden, weight, bias, per_token, reference, of_head, direction, logits, matmul):
    """Return loss and statistics of the output head, and the gradient of this loss with respect to `hidden`.

    The gradients with respect to weight and bias are added to the tensors in `of_head`.
    """
    labels, ce_weight, divergence_weight = per_token
    tokens = len(hidden)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.to(matmul)
    given: Any = reference or (None, None, None)
    ref_hidden, ref_weight, ref_bias = given
    if reference is not None:
        ref_head = head if ref_weight is weight else ref_weight.to(matmul)

    grad_hidden = torch.empty_like(hidden)
    grad_weight, grad_bias = of_head
    ce, divergence, entropy, is_top1 = (hidden.new_zeros(tokens, dtype=accumulate) for _ in range(4))
    evidence = hidden.new_zeros((), dtype=accumulate)

    tile_pass = choose_tile_pass(hidden, accumulate)
    tiles = _new_tiles(hidden, len(weight), 1 if reference is None else 2, accumulate, matmul)
    chunk = tiles.size(1)
    for start in range(0, tokens, chunk) if tokens else ():
        rows = slice(start, start + chunk)
        h = hidden[rows].to(matmul)  # (C, H), with C tokens in the chunk
        z = _mm(h, head.t(), accumulate, out=tiles[0, : len(h)])  # (C, V)
        y = w = None
        if reference is not None:
            y = _mm(ref_hidden[rows].to(matmul), ref_head.t(), accumulate, out=tiles[1, : len(h)])
            w = divergence_weight[rows].to(accumulate)
        target, ce_w = labels[rows].clamp(min=0), ce_weight[rows].to(accumulate)
        # This call overwrites `z` (hidden states times head) with the gradient of the loss with respect to `z`.
        statistics = tile_pass(z, bias, y, ref_bias, target, ce_w, w, direction, *logits)
        has_label = labels[rows] != -100
        ce[rows] = statistics.ce.where(has_label, 0)
        entropy[rows] = statistics.entropy
        is_top1[rows] = statistics.is_top1.where(has_label, 0)
        divergence[rows] = statistics.divergence
        evidence += statistics.evidence.sum()

        if grad_bias is not None:
            grad_bias += z.sum(0)
        z = z.to(matmul)
        grad_hidden[rows] = _mm(z, head, accumulate).to(hidden.dtype)
        if grad_weight is not None:
            _addmm(grad_weight, z.t(), h)

    loss = (ce * ce_weight).sum()
    if reference is not None:
        loss = loss + (divergence * divergence_weight).sum()
    return HeadOutput(loss, ce, divergence, entropy, is_top1, evidence), grad_hidden


def _joined(parts: list[tuple[HeadOutput, torch.Tensor]], compared: torch.Tensor) -> tuple[HeadOutput, torch.Tensor]:
    """Merge the results for positions that have a reference (`compared`) with the results for all other positions."""
    (first, first_gradient), (second, second_gradient) = parts

    def merged(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not x.dim():
            return x + y
        both = x.new_empty(len(compared), *x.shape[1:])
        both[compared], both[~compared] = x, y
        return both

    return HeadOutput(*map(merged, first, second)), merged(first_gradient, second_gradient)


def _new_tiles(
    hidden: torch.Tensor, vocab: int, count: int, accumulate: torch.dtype, matmul: torch.dtype
) -> torch.Tensor:
    """Return `count` empty tiles, `(count, chunk, vocab)`, with as many tokens in a chunk as `TILE_BYTES` allows.

    Every chunk uses the same tiles, because the first access to new memory takes longer than the arithmetic on it
    (several times longer on a CPU).
    """
    itemsize = count * accumulate.itemsize + (0 if matmul == accumulate else matmul.itemsize)
    chunk = min(len(hidden), max(1, TILE_BYTES // (itemsize * vocab)))
    return hidden.new_empty((count, chunk, vocab), dtype=accumulate)


def matmul_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype to which both factors of a matrix product in the head are cast.

    CUDA can multiply matrices of low precision with a result in fp32. So on CUDA the dtype is autocast's, or
    that of `hidden` without autocast. On other devices it is the dtype of sums (fp32, or fp64 for fp64 inputs).
    """
    device = hidden.device.type
    # fp64 states are multiplied in fp64 even under autocast, which leaves fp64 tensors alone. The result must be fp64,
    # and no device multiplies bf16 or fp16 matrices into an fp64 result.
    if device == "cuda" and hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype if device == "cuda" else torch.promote_types(hidden.dtype, torch.float32)


def _mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.mm(a, b, out=out) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype, out=out)


def _addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def choose_tile_pass(hidden: torch.Tensor, accumulate: torch.dtype) -> Callable[..., TileStatistics]:
    """Return the function that computes a tile's statistics and gradient, by Triton kernels or by torch's operations.

    Triton computes fp32 tiles on CUDA if it is installed and can run.
    """
    if hidden.is_cuda and accumulate == torch.float32 and find_spec("triton") is not None and triton_starts():
        from .tiles_triton import tile_pass

        return tile_pass
    return torch_tile_pass


@functools.cache
def triton_starts() -> bool:
    """Return whether Triton can run: it needs a C compiler and Python's headers, which small Docker images lack."""
    from triton.runtime import driver

    try:
        return driver.active.utils is not None
    except Exception as error:
        warnings.warn(
            f"Triton does not start: the head is computed by torch's own calls, which take longer. {error!r}",
            stacklevel=2,
        )
        return False
