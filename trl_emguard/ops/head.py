"""The language-model head of a defended step: CE and KL, with their gradient, in one pass over chunks of tokens."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from .gradient import with_gradient


# Bytes that the fp32 tiles (tokens × vocabulary) of one chunk may take: the products of policy and reference with the head, and
# in torch's own calls two more.
TILE_BYTES = 256 * 2**20


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
        nll = hidden.new_empty(len(hidden), dtype=accumulate)
        # Two tiles: the logits, and what `cross_entropy` makes of them.
        chunk = max(1, TILE_BYTES // (2 * accumulate.itemsize * weight.size(0)))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            z = _mm(hidden[rows].to(matmul), head, accumulate)
            _transform_(z, bias, softcap, logit_scale)
            nll[rows] = torch.nn.functional.cross_entropy(z, labels[rows], reduction="none")
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
    tile_pass, scratch_tiles = _tile_pass(hidden, accumulate)
    count = (1 if reference is None else 2) + scratch_tiles
    chunk = min(tokens, max(1, TILE_BYTES // (count * accumulate.itemsize * vocab)))
    tiles = hidden.new_empty((count, chunk, vocab), dtype=accumulate)
    for start in range(0, tokens, chunk) if tokens else ():
        rows = slice(start, start + chunk)
        h = hidden[rows].to(matmul)  # (C, H)
        has_label = labels[rows] != -100
        z, *rest = (tile[: len(h)] for tile in tiles)  # (C, V) each
        _mm(h, head.t(), accumulate, out=z)
        y = None
        if reference is not None:
            y, *rest = rest
            _mm(ref_hidden[rows].to(matmul), ref_head.t(), accumulate, out=y)
        chunk_ce, entropy[rows], top1, kl[rows], chunk_evidence, grad = tile_pass(
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
            rest,
        )
        ce[rows] = chunk_ce.where(has_label, 0)
        is_top1[rows] = top1.where(has_label, 0)
        evidence += chunk_evidence

        if grad_bias is not None:
            grad_bias += grad.sum(0)
        grad = grad.to(matmul)
        grad_hidden[rows] = _mm(grad, head, accumulate).to(hidden.dtype)
        if grad_weight is not None:
            _addmm(grad_weight, grad.t(), h)

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
    if device == "cuda" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype if device == "cuda" else torch.promote_types(hidden.dtype, torch.float32)


def _mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.mm(a, b, out=out) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype, out=out)


def _addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class TileOutput(NamedTuple):
    """What a pass over a chunk's products with the head yields.

    Attributes:
        ce, entropy, is_top1, kl: `(C,)`, of every position, whether it has a label or not.
        evidence: `()`, Σ |∂(Σ kl_weight · KL) / ∂ logits|.
        gradient: `(C, V)`, of the weighted sum with respect to the products. It lies in one of the tiles.
    """

    ce: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    kl: torch.Tensor
    evidence: torch.Tensor
    gradient: torch.Tensor


def _tile_pass(hidden: torch.Tensor, accumulate: torch.dtype) -> tuple[Callable[..., TileOutput], int]:
    """The function for a chunk, and how many scratch tiles it wants: Triton's kernels on CUDA, else torch's own calls."""
    if hidden.is_cuda and accumulate == torch.float32 and find_spec("triton") is not None:
        from .head_triton import tile_pass

        return tile_pass, 0
    return torch_tile_pass, 2


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
    scratch: Sequence[torch.Tensor],
) -> TileOutput:
    """Statistics and gradient of a chunk, in torch's own calls and in the memory that is given.

    Args:
        products: `(C, V)`: hidden states times the head, overwritten.
        bias: `(V,)` or `None`.
        ref_products, ref_bias: the same of the reference, or `None`.
        target: `(C,)`, a token for each position.
        ce_weight: `(C,)`.
        kl_weight: `(C,)`; needed with a reference.
        direction, softcap, logit_scale: as for [`ce_kl_head`].
        scratch: two tiles, `(C, V)` each.
    """
    target = target.unsqueeze(-1)  # (C, 1)
    log_p, (p, spare) = products, scratch
    log_z = _distribution_(log_p, p, bias, softcap, logit_scale)  # (C, 1)
    ce = log_p.gather(-1, target).squeeze(-1).neg()
    entropy = -torch.mul(p, log_p, out=spare).sum(-1)
    is_top1 = (log_p.argmax(-1) == target.squeeze(-1)).to(p)

    grad_kl = None
    kl, evidence = torch.zeros_like(ce), p.new_zeros(())
    if ref_products is not None and kl_weight is not None:
        log_q, q = ref_products, spare
        _distribution_(log_q, q, ref_bias, softcap, logit_scale)
        # The rounding of the two normalisers shifts every log p − log q by the same number, and Σ p and Σ q with it: the
        # difference of the sums takes the shift out of KL again.
        if direction == "reverse":
            shift = q.sub_(p).sum(-1)
            difference = log_q.neg_().add_(log_p)
            mean = torch.mul(p, difference, out=spare).sum(-1)
            grad_kl = difference.sub_(mean.unsqueeze(-1)).mul_(p)
        else:
            mean = log_q.sub_(log_p).mul_(q).sum(-1)
            grad_kl = q.neg_().add_(p)
            shift = grad_kl.sum(-1)
        kl = (mean + shift).clamp(min=0)
        grad_kl.mul_(kl_weight.unsqueeze(-1))
        evidence = torch.linalg.vector_norm(grad_kl, ord=1)

    # From here on `p` is the gradient with respect to the logits, and then to the products.
    w = ce_weight.unsqueeze(-1)
    grad = p.mul_(w).scatter_add_(-1, target, -w)
    if grad_kl is not None:
        grad.add_(grad_kl)
    if softcap is not None:
        capped = log_p.add_(log_z).div_(softcap)
        grad.mul_(capped.square_().neg_().add_(1))
    if logit_scale != 1.0:
        grad.mul_(logit_scale)
    return TileOutput(ce, entropy, is_top1, kl, evidence, grad)


def _distribution_(
    z: torch.Tensor, probs: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float
) -> torch.Tensor:
    """From products with the head, `(C, V)`, to log-probabilities, in place, and to probabilities in `probs`; returns the
    log-normaliser, `(C, 1)`.

    Sums over the vocabulary are torch's own: a batched matrix product would need no scratch, but adds up fifty thousand
    fp32 products with a relative error of 1e-4.
    """
    _transform_(z, bias, softcap, logit_scale)
    top = z.amax(-1, keepdim=True)
    total = torch.exp(z.sub_(top), out=probs).sum(-1, keepdim=True)
    probs.div_(total)
    z.sub_(total.log())
    return top + total.log()


def _transform_(z: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float) -> None:
    """From the products with the head, `(C, V)`, to logits, in place."""
    if bias is not None:
        z.add_(bias)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
