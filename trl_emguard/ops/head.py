"""The language-model head of a defended step: CE and KL, with their gradient, in one pass over chunks of tokens."""

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from .gradient import with_gradient


# Bytes that the tiles (tokens × vocabulary) of one chunk may take: the products of policy and reference with the head, and the
# gradient in the dtype of the matrix products where that is another.
TILE_BYTES = 256 * 2**20
# Bytes of a tile that torch's own calls work on at once: on a CPU what stays in its cache, on a GPU what is worth a launch.
BLOCK_BYTES = 2**20
GPU_BLOCK_BYTES = 2**24


class HeadOutput(NamedTuple):
    """What the head knows of N positions. Only `loss` has a gradient.

    Attributes:
        loss: `()`. Σ_i ce_weight_i · CE_i + kl_weight_i · KL_i.
        ce: `(N,)`. Cross-entropy in nats; 0 where the label is -100.
        kl: `(N,)`. Divergence in nats; 0 where there is no reference.
        entropy: `(N,)`. Entropy of the policy's next-token distribution, in nats.
        is_top1: `(N,)`. 1 where the policy's most probable token is the label.
        kl_evidence: `()`. Σ |∂(Σ kl_weight · KL) / ∂ logits|: exactly 0 where the term teaches nothing.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    kl_evidence: torch.Tensor


def ce_kl_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ce_weight: torch.Tensor,
    kl_weight: torch.Tensor | None = None,
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    direction: Literal["reverse", "forward"] = "reverse",
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> HeadOutput:
    """Weighted sum of cross-entropy and KL to a reference, token chunk by token chunk.

    Logits are `z = softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)`. With p the policy's and q the reference's
    distribution, reverse KL is KL(p ‖ q) = Σ p (log p − log q), forward KL is KL(q ‖ p). Their gradients with respect
    to z are p (log p − log q − KL) and p − q; that of CE is p − onehot. All of them are known once the chunk's logits
    are, so the gradient is formed at once and the logits are dropped: no N × V tensor is ever alive, and the head costs
    three matrix products a step (four with a trained head). Everything is accumulated in fp32 (fp64 for fp64 inputs),
    and the logits leave the matrix product in that dtype: bf16 logits cost 4 to 23 % of gradient error
    (linkedin/Liger-Kernel#1432).

    Args:
        hidden: `(N, H)`, the policy's last hidden states.
        weight: `(V, H)`, the policy's head.
        bias: `(V,)` or `None`.
        labels: `(N,)`, the token that each position predicts; -100 where CE is not wanted.
        ce_weight: `(N,)`, weight of each position's CE; must be 0 where the label is -100.
        kl_weight: `(N,)`, weight of each position's KL. Needed with `reference`.
        reference: the reference's hidden states `(N, H')`, head `(V, H')` and bias `(V,)` or `None`. No gradient
            reaches them.
        direction: `"reverse"` for KL(policy ‖ reference), `"forward"` for KL(reference ‖ policy).
        softcap: `final_logit_softcapping` of the model's config (Gemma 2).
        logit_scale: what the model multiplies its logits with (Cohere, Granite).

    Returns:
        [`HeadOutput`]
    """
    matmul_dtype = _matmul_dtype(hidden)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        output, gradients = _forward(
            hidden,
            weight,
            bias,
            labels,
            ce_weight,
            kl_weight,
            reference,
            direction,
            softcap,
            logit_scale,
            matmul_dtype,
        )
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
    """Negative log-likelihood of each label, chunk by chunk and without gradient: no N × V tensor is ever alive.

    Args:
        hidden: `(N, H)`, last hidden states.
        weight: `(V, H)`, the head.
        bias: `(V,)` or `None`.
        labels: `(N,)`, the token that each position predicts.
        softcap, logit_scale: as for [`ce_kl_head`].

    Returns:
        `(N,)`, nats, in fp32 (fp64 for fp64 inputs).
    """
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        matmul = _matmul_dtype(hidden)
        head = weight.to(matmul).t()
        vocab, tokens = len(weight), len(hidden)
        nll = hidden.new_empty(tokens, dtype=accumulate)
        chunk = min(tokens, max(1, TILE_BYTES // (accumulate.itemsize * vocab)))
        tile = hidden.new_empty(chunk, vocab, dtype=accumulate)
        # As in `torch_tile_pass`: a few rows at a time, which stay in a processor's cache. A GPU takes the chunk as a whole.
        block = chunk if hidden.is_cuda else max(1, BLOCK_BYTES // (accumulate.itemsize * vocab))
        for start in range(0, tokens, chunk) if tokens else ():
            h = hidden[start : start + chunk].to(matmul)
            products = _mm(h, head, accumulate, out=tile[: len(h)])
            for first in range(0, len(h), block):
                z = products[first : first + block]  # (B, V)
                rows = slice(start + first, start + first + len(z))
                _transform_(z, bias, softcap, logit_scale)
                z.sub_(z.amax(-1, keepdim=True))
                at_label = z.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
                nll[rows] = z.exp_().sum(-1).log() - at_label
    return nll


def logit_transform(config: Any) -> tuple[float | None, float]:
    """Soft-cap and scale that a model's own forward applies to its logits, under the names that (text) configs give them."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        scale = 1.0 if scaling is None else scaling if config.model_type == "hyperclovax" else 1 / scaling
    return getattr(config, "final_logit_softcapping", None), float(scale)


def _forward(hidden, weight, bias, labels, ce_weight, kl_weight, reference, direction, softcap, logit_scale, matmul):
    tokens, vocab = hidden.size(0), weight.size(0)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    head = weight.to(matmul)
    ref_head: Any = None
    if reference is not None:
        ref_hidden, ref_weight, ref_bias = reference
        ref_head = head if ref_weight is weight else ref_weight.to(matmul)

    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=accumulate) if weight.requires_grad else None
    grad_bias = torch.zeros_like(bias, dtype=accumulate) if bias is not None and bias.requires_grad else None
    ce, kl, entropy, is_top1 = (hidden.new_zeros(tokens, dtype=accumulate) for _ in range(4))
    evidence = hidden.new_zeros((), dtype=accumulate)

    # The tiles are made once and used by every chunk: memory that is touched for the first time costs more than the
    # arithmetic on it (on CPU, several times more).
    tile_pass = _tile_pass(hidden, accumulate)
    count = 1 if reference is None else 2
    itemsize = count * accumulate.itemsize + (0 if matmul == accumulate else matmul.itemsize)
    chunk = min(tokens, max(1, TILE_BYTES // (itemsize * vocab)))
    tiles = hidden.new_empty((count, chunk, vocab), dtype=accumulate)
    for start in range(0, tokens, chunk) if tokens else ():
        rows = slice(start, start + chunk)
        h = hidden[rows].to(matmul)  # (C, H)
        z = _mm(h, head.t(), accumulate, out=tiles[0, : len(h)])  # (C, V)
        y = None
        if reference is not None:
            y = _mm(ref_hidden[rows].to(matmul), ref_head.t(), accumulate, out=tiles[1, : len(h)])
        # From here on `z` is the gradient with respect to the products.
        statistics = tile_pass(
            z,
            bias,
            y,
            None if reference is None else ref_bias,
            labels[rows].clamp(min=0),
            ce_weight[rows].to(accumulate),
            None if reference is None else kl_weight[rows].to(accumulate),
            direction,
            softcap,
            logit_scale,
        )
        has_label = labels[rows] != -100
        ce[rows] = statistics.ce.where(has_label, 0)
        entropy[rows] = statistics.entropy
        is_top1[rows] = statistics.is_top1.where(has_label, 0)
        kl[rows] = statistics.kl
        evidence += statistics.evidence.sum()

        if grad_bias is not None:
            grad_bias += z.sum(0)
        z = z.to(matmul)
        grad_hidden[rows] = _mm(z, head, accumulate).to(hidden.dtype)
        if grad_weight is not None:
            _addmm(grad_weight, z.t(), h)

    loss = (ce * ce_weight).sum()
    if reference is not None:
        loss = loss + (kl * kl_weight).sum()
    gradients = (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )
    return HeadOutput(loss, ce, kl, entropy, is_top1, evidence), gradients


def _matmul_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Autocast's or the states' own low precision where the device multiplies it into fp32 (CUDA), else the sums'."""
    device = hidden.device.type
    # Autocast leaves fp64 alone, and so does this: no device multiplies a lower precision into fp64.
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


class TileStatistics(NamedTuple):
    """What a pass over a chunk's products with the head yields, `(C,)` each, of every position, whether it has a label or not.

    Attributes:
        ce, entropy, is_top1, kl: as in [`HeadOutput`]; where several tokens are the most probable, each counts as such.
        evidence: Σ |∂(kl_weight · KL) / ∂ logits|.
    """

    ce: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    kl: torch.Tensor
    evidence: torch.Tensor


def _tile_pass(hidden: torch.Tensor, accumulate: torch.dtype) -> Callable[..., TileStatistics]:
    """The function for a chunk: Triton's kernels on CUDA, else torch's own calls."""
    if hidden.is_cuda and accumulate == torch.float32 and find_spec("triton") is not None and _triton_starts():
        from .tiles_triton import tile_pass

        return tile_pass
    return torch_tile_pass


@functools.cache
def _triton_starts() -> bool:
    """Whether Triton finds what it needs at run time: it builds its launcher with a C compiler and Python's headers, which slim
    images lack."""
    from triton.runtime import driver

    try:
        return driver.active.utils is not None
    except Exception as error:
        warnings.warn(
            f"Triton does not start: the head is computed by torch's own calls, which take longer. {error!r}",
            stacklevel=2,
        )
        return False


def torch_tile_pass(
    products: torch.Tensor,
    bias: torch.Tensor | None,
    ref_products: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    target: torch.Tensor,
    ce_weight: torch.Tensor,
    kl_weight: torch.Tensor | None,
    direction: str,
    softcap: float | None,
    logit_scale: float,
) -> TileStatistics:
    """Statistics of a chunk, and its gradient in place, in torch's own calls.

    Args:
        products: `(C, V)`: hidden states times the head. Becomes the gradient of the weighted sum with respect to them.
        bias: `(V,)` or `None`.
        ref_products, ref_bias: the same of the reference, or `None`. Overwritten.
        target: `(C,)`, a token for each position.
        ce_weight: `(C,)`.
        kl_weight: `(C,)`; needed with a reference.
        direction, softcap, logit_scale: as for [`ce_kl_head`].
    """
    count, vocab = products.shape
    statistics = TileStatistics(*products.new_zeros(5, count))
    # A few rows at a time go through all of the calls: they stay in the processor's cache meanwhile.
    block = max(1, (BLOCK_BYTES if products.device.type == "cpu" else GPU_BLOCK_BYTES) // (products.itemsize * vocab))
    scratch = products.new_empty(2, min(block, count), vocab)
    for start in range(0, count, block):
        rows = slice(start, start + block)
        z, y = products[rows], None if ref_products is None else ref_products[rows]  # (B, V) each
        p, spare = scratch[:, : len(z)]
        label = target[rows].unsqueeze(-1)  # (B, 1)
        top, log_total, at_label = _distribution_(z, p, bias, softcap, logit_scale, label)
        statistics.ce[rows] = (log_total - at_label).squeeze(-1)
        statistics.is_top1[rows] = (at_label == 0).squeeze(-1).to(z)
        statistics.entropy[rows] = -torch.mul(p, z, out=spare).sum(-1)

        grad_kl = None
        if y is not None and kl_weight is not None:
            log_q, q = y, spare
            _distribution_(log_q, q, ref_bias, softcap, logit_scale, label)
            # The rounding of the two normalisers shifts every log p − log q by the same number, and Σ p and Σ q with it:
            # the difference of the sums takes the shift out of KL again.
            if direction == "reverse":
                shift = q.sub_(p).sum(-1)
                difference = log_q.neg_().add_(z)
                mean = torch.mul(p, difference, out=spare).sum(-1)
                grad_kl = difference.sub_(mean.unsqueeze(-1)).mul_(p)
            else:
                mean = log_q.sub_(z).mul_(q).sum(-1)
                grad_kl = q.neg_().add_(p)
                shift = grad_kl.sum(-1)
            statistics.kl[rows] = (mean + shift).clamp(min=0)
            grad_kl.mul_(kl_weight[rows].unsqueeze(-1))
            statistics.evidence[rows] = torch.linalg.vector_norm(grad_kl, ord=1, dim=-1)

        w = ce_weight[rows].unsqueeze(-1)
        grad = p.mul_(w).scatter_add_(-1, label, -w)
        if grad_kl is not None:
            grad.add_(grad_kl)
        if softcap is not None:
            # d softcap · tanh(x) / dx = 1 − (logit / softcap)²
            capped = z.add_(top + log_total).div_(softcap)
            grad.mul_(capped.square_().neg_().add_(1))
        torch.mul(grad, logit_scale, out=z)
    return statistics


def _distribution_(
    z: torch.Tensor,
    probs: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    label: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From products with the head, `(B, V)`, to log-probabilities, in place, and to probabilities in `probs`.

    Sums over the vocabulary are torch's own: a batched matrix product would need no scratch, but adds up fifty thousand
    fp32 products with a relative error of 1e-4.

    Returns:
        The largest logit, the log of Σ exp(logit − largest), and the label's logit minus the largest, `(B, 1)` each.
    """
    _transform_(z, bias, softcap, logit_scale)
    top = z.amax(-1, keepdim=True)
    at_label = z.sub_(top).gather(-1, label)
    total = torch.exp(z, out=probs).sum(-1, keepdim=True)
    probs.div_(total)
    log_total = total.log()
    z.sub_(log_total)
    return top, log_total, at_label


def _transform_(z: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float) -> None:
    """From the products with the head, `(C, V)`, to logits, in place."""
    if bias is not None:
        z.add_(bias)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
