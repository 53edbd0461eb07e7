"""Statistics of a tile of logits, and the loss's gradient with respect to the tile, computed by torch's operations.

A tile is the product of some tokens' hidden states and the output head, `(tokens, vocabulary)`. `tiles_triton.py` does
the same with kernels on CUDA, and `head.py` chooses between the two.
"""

from typing import NamedTuple

import torch


# Torch's operations work on a tile block by block, and each block is some rows of the tile. These are the sizes of a
# block in bytes. A CPU keeps a block of `BLOCK_BYTES` in its cache. `GPU_BLOCK_BYTES` is larger, so that little time
# goes into launching the operations.
BLOCK_BYTES = 2**20
GPU_BLOCK_BYTES = 2**24


class TileStatistics(NamedTuple):
    """Statistics of a tile's C positions: each is a tensor `(C,)`, with a number also for positions without a label.

    Attributes:
        ce: cross-entropy of the target token, in nats.
        entropy: entropy of the policy's distribution, in nats.
        is_top1: 1 where no token has a larger logit than the target, else 0.
        divergence: divergence from the reference in nats; 0 without a reference.
        evidence: Σ |∂(divergence_weight · divergence) / ∂ logits|, summed over the vocabulary.
    """

    ce: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    divergence: torch.Tensor
    evidence: torch.Tensor


def torch_tile_pass(
    products: torch.Tensor,
    bias: torch.Tensor | None,
    ref_products: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    target: torch.Tensor,
    ce_weight: torch.Tensor,
    divergence_weight: torch.Tensor | None,
    direction: str,
    softcap: float | None,
    logit_scale: float,
) -> TileStatistics:
    """Return a tile's statistics, and overwrite the tile (`products`) with the gradient of its weighted loss.

    The weighted loss is Σ (ce_weight · CE + divergence_weight · divergence) over the C positions of the tile.

    Args:
        products: `(C, V)`, hidden states times the head. Overwritten with their gradient.
        bias: `(V,)` or `None`.
        ref_products, ref_bias: products and bias of the reference, or `None`. `ref_products` are overwritten.
        target: `(C,)`, label of each position; any token id where there is no label.
        ce_weight: `(C,)`, weight of each position's cross-entropy; 0 where there is no label.
        divergence_weight: `(C,)`, weight of each position's divergence; needed with a reference.
        direction, softcap, logit_scale: see [`~trl_emguard.ops.head.ce_divergence_head`].
    """
    count, vocab = products.shape
    statistics = TileStatistics(*products.new_zeros(5, count))
    # Each block of `block` rows goes through all operations before the next block begins. On a CPU the rows are so few
    # that they can stay in the cache. On a GPU there are more, so that the operations are launched less often.
    block = max(1, (BLOCK_BYTES if products.device.type == "cpu" else GPU_BLOCK_BYTES) // (products.itemsize * vocab))
    scratch = products.new_empty(2, min(block, count), vocab)
    for start in range(0, count, block):
        rows = slice(start, start + block)
        z = products[rows]  # (B, V), for the B tokens of this block
        p, spare = scratch[:, : len(z)]
        label = target[rows].unsqueeze(-1)  # (B, 1)
        top, log_total, at_label = _distribution_(z, p, bias, softcap, logit_scale, label)
        statistics.ce[rows] = (log_total - at_label).squeeze(-1)
        statistics.is_top1[rows] = (at_label == 0).squeeze(-1).to(z)
        statistics.entropy[rows] = -torch.mul(p, z, out=spare).sum(-1)

        grad_divergence = None
        if ref_products is not None and divergence_weight is not None:
            log_q, q = ref_products[rows], spare
            _distribution_(log_q, q, ref_bias, softcap, logit_scale, label)
            statistics.divergence[rows], grad_divergence = _divergence_(z, p, log_q, q, direction)
            grad_divergence.mul_(divergence_weight[rows].unsqueeze(-1))
            statistics.evidence[rows] = torch.linalg.vector_norm(grad_divergence, ord=1, dim=-1)

        w = ce_weight[rows].unsqueeze(-1)
        grad = p.mul_(w).scatter_add_(-1, label, -w)
        if grad_divergence is not None:
            grad.add_(grad_divergence)
        if softcap is not None:
            # The gradient with respect to uncapped logits x has a further factor, 1 − tanh(x / softcap)². `z` holds
            # log-probabilities; adding `top + log_total` restores the capped logits, softcap · tanh(x / softcap).
            capped = z.add_(top + log_total).div_(softcap)
            grad.mul_(capped.square_().neg_().add_(1))
        torch.mul(grad, logit_scale, out=z)
    return statistics


def to_logits_(products: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float) -> None:
    """Turn products of hidden states and head, `(C, V)`, into logits in place: add the bias, scale and cap them."""
    if bias is not None:
        products.add_(bias)
    if logit_scale != 1.0:
        products.mul_(logit_scale)
    if softcap is not None:
        products.div_(softcap).tanh_().mul_(softcap)


def _distribution_(
    z: torch.Tensor,
    probs: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    label: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn `z`, products of states and head `(B, V)`, into log-probabilities in place; write probabilities to `probs`.

    Sums over the vocabulary use torch's own reduction. A batched matrix product would need no scratch memory, but its
    sum of fifty thousand fp32 products has a relative error of 1e-4.

    Returns:
        The largest logit, the log of Σ exp(logit − largest), and the label's logit minus the largest, `(B, 1)` each.
    """
    to_logits_(z, bias, softcap, logit_scale)
    top = z.amax(-1, keepdim=True)
    at_label = z.sub_(top).gather(-1, label)
    total = torch.exp(z, out=probs).sum(-1, keepdim=True)
    probs.div_(total)
    log_total = total.log()
    z.sub_(log_total)
    return top, log_total, at_label


def _divergence_(
    log_p: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor, direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of policy p and reference q, `(B,)`, and its gradient with respect to p's logits `(B, V)`.

    All tensors given are `(B, V)`. `log_q` and `q` are overwritten, and the gradient is returned in one of them.
    """
    # The normaliser Σ exp of a row's logits is rounded. Every log p of the row therefore has the same error ε,
    # and every log q an error δ. This makes the reverse divergence wrong by about ε − δ, and the forward one by δ − ε.
    # Σ p is about 1 + ε instead of 1, and Σ q about 1 + δ. Adding `shift` cancels the error: it is Σ q − Σ p for the
    # reverse divergence, and Σ p − Σ q for the forward one.
    if direction == "reverse":
        shift = q.sub_(p).sum(-1)
        difference = log_q.neg_().add_(log_p)
        mean = torch.mul(p, difference, out=q).sum(-1)
        gradient = difference.sub_(mean.unsqueeze(-1)).mul_(p)
    else:
        mean = log_q.sub_(log_p).mul_(q).sum(-1)
        gradient = q.neg_().add_(p)
        shift = gradient.sum(-1)
    return (mean + shift).clamp(min=0), gradient
