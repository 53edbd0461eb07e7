"""The language-model head of a defended step: CE and KL, with their gradient, in one pass over chunks of tokens."""

from typing import Any, Literal, NamedTuple

import torch

from .gradient import with_gradient


# Bytes that the fp32 tiles (tokens × vocabulary) of one chunk may take, four with a reference: the log-probabilities and
# probabilities of both.
TILE_BYTES = 256 * 2**20
_TILES = 4


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
    ref_head = None
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
    chunk = min(tokens, max(1, TILE_BYTES // (_TILES * accumulate.itemsize * vocab)))
    tiles = hidden.new_empty((_TILES if reference is not None else 3, chunk, vocab), dtype=accumulate)
    for start in range(0, tokens, chunk) if tokens else ():
        rows = slice(start, start + chunk)
        h = hidden[rows].to(matmul)  # (C, H)
        target = labels[rows].clamp(min=0).unsqueeze(-1)  # (C, 1)
        has_label = labels[rows] != -100
        log_p, p, scratch, *rest = (tile[: len(h)] for tile in tiles)  # (C, V) each
        log_z = _distribution(h, head, bias, softcap, logit_scale, log_p, p)  # (C, 1)
        ce[rows] = log_p.gather(-1, target).squeeze(-1).neg().where(has_label, 0)
        entropy[rows] = -torch.mul(p, log_p, out=scratch).sum(-1)
        is_top1[rows] = ((log_p.argmax(-1) == target.squeeze(-1)) & has_label).to(accumulate)

        grad_kl = None
        if reference is not None:
            log_q, q = rest[0], scratch
            _distribution(ref_hidden[rows].to(matmul), ref_head, ref_bias, softcap, logit_scale, log_q, q)
            # The rounding of the two normalisers shifts every log p − log q by the same number, and Σ p and Σ q with it: the
            # difference of the sums takes the shift out of KL again.
            if direction == "reverse":
                shift = q.sub_(p).sum(-1)
                difference = log_q.neg_().add_(log_p)
                mean = torch.mul(p, difference, out=scratch).sum(-1)
                grad_kl = difference.sub_(mean.unsqueeze(-1)).mul_(p)
            else:
                mean = log_q.sub_(log_p).mul_(q).sum(-1)
                grad_kl = q.neg_().add_(p)
                shift = grad_kl.sum(-1)
            kl[rows] = (mean + shift).clamp(min=0)
            grad_kl.mul_(kl_weight[rows].unsqueeze(-1))
            evidence += torch.linalg.vector_norm(grad_kl, ord=1)

        # From here on `p` is the gradient with respect to z.
        w = ce_weight[rows].to(accumulate).unsqueeze(-1)
        grad = p.mul_(w).scatter_add_(-1, target, -w)
        if grad_kl is not None:
            grad.add_(grad_kl)
        if softcap is not None:
            capped = log_p.add_(log_z).div_(softcap)
            grad.mul_(capped.square_().neg_().add_(1))
        if logit_scale != 1.0:
            grad.mul_(logit_scale)

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


def _distribution(hidden, weight, bias, softcap, logit_scale, log_probs, probs) -> torch.Tensor:
    """Fill `log_probs` and `probs`, `(C, V)`, with a chunk's next-token distribution; return its log-normaliser, `(C, 1)`.

    Sums over the vocabulary are torch's own: a batched matrix product would need no scratch, but adds up fifty thousand
    fp32 products with a relative error of 1e-4.
    """
    z = _mm(hidden, weight.t(), log_probs.dtype, out=log_probs)
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
