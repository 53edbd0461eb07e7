"""Statistics of a tile of logits, and the loss's gradient with respect to the tile, computed by Triton kernels.

A tile is the product of some tokens' hidden states and the output head, `(tokens, vocabulary)`, on a CUDA device.
Each of torch's operations in `tiles.py` reads or writes all rows of a block (some rows of the tile). The kernels here
go over a row only three times: for its normalisers, for its statistics and for its gradient.
"""

import torch
import triton
import triton.language as tl

from .tiles import TileStatistics


BLOCK = 4096  # largest number of a row's logits that a kernel loads and processes at once
WARPS = 8


@triton.jit
def _logits(products, bias, columns, inside, softcap, scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Return a row's logits in some columns (token ids); -inf in columns beyond the vocabulary."""
    z = tl.load(products + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if HAS_CAP:
        # Triton does not have tanh on every device, so tanh(x) is computed as 1 − 2 / (e^2x + 1).
        z = softcap * (1 - 2 / (tl.exp(2 * z / softcap) + 1))
    return tl.where(inside, z, -float("inf"))


@triton.jit
def _normaliser(products, bias, V, softcap, scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest logit of a row, and the log of Σ exp(logit − largest)."""
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _logits(products, bias, columns, columns < V, softcap, scale, HAS_BIAS, HAS_CAP)
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    return top, tl.log(total)


# A kernel is launched once for each tile. The number of rows C may differ from tile to tile, and so may the memory
# alignment of tensors with one number per row (such as `target`). The options of `jit` here keep Triton from compiling
# the kernel again in such a case.
@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target"])
def _statistics(
    products, ref_products, bias, ref_bias, target, out, norms, V, C, softcap, scale,
    HAS_REF: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    products += row * V
    ref_products += row * V
    top, log_total = _normaliser(products, bias, V, softcap, scale, HAS_BIAS, HAS_CAP, BLOCK)
    ref_top, ref_log_total = 0.0, 0.0
    if HAS_REF:
        ref_top, ref_log_total = _normaliser(ref_products, ref_bias, V, softcap, scale, HAS_REF_BIAS, HAS_CAP, BLOCK)
    label = tl.load(target + row)
    # `at_label` is exactly 0 if no token has a larger logit than the label. From this the statistic `is_top1` (1 or 0)
    # is computed, and stored, below.
    at_label = _logits(products, bias, label, label < V, softcap, scale, HAS_BIAS, HAS_CAP) - top
    entropy, mean, shift = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        log_p = _logits(products, bias, columns, inside, softcap, scale, HAS_BIAS, HAS_CAP) - top - log_total
        p = tl.exp(log_p)
        log_p = tl.where(inside, log_p, 0.0)
        entropy -= tl.sum(p * log_p, 0)
        if HAS_REF:
            log_q = (
                _logits(ref_products, ref_bias, columns, inside, softcap, scale, HAS_REF_BIAS, HAS_CAP)
                - ref_top
                - ref_log_total
            )
            q = tl.exp(log_q)
            log_q = tl.where(inside, log_q, 0.0)
            if REVERSE:
                mean += tl.sum(p * (log_p - log_q), 0)
                shift += tl.sum(q - p, 0)
            else:
                mean += tl.sum(q * (log_q - log_p), 0)
                shift += tl.sum(p - q, 0)
    tl.store(out + row, log_total - at_label)
    tl.store(out + C + row, entropy)
    tl.store(out + 2 * C + row, tl.where(at_label == 0, 1.0, 0.0))
    # The reported divergence is `mean + shift`, because `shift` cancels the rounding error of the normalisers (see
    # `_divergence_` in `tiles.py`). The gradient needs `mean` alone, so `mean` is stored as well. The maximum keeps
    # NaN, like torch's clamp, because 0 would hide that policy or reference has NaN logits.
    tl.store(out + 3 * C + row, tl.maximum(mean + shift, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(norms + row, top)
    tl.store(norms + C + row, log_total)
    tl.store(norms + 2 * C + row, ref_top)
    tl.store(norms + 3 * C + row, ref_log_total)
    tl.store(norms + 4 * C + row, mean)


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target", "ce_weight", "divergence_weight"])
def _gradient(
    products, ref_products, bias, ref_bias, target, ce_weight, divergence_weight, norms, evidence, V, C, softcap,
    scale,
    HAS_REF: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    products += row * V
    ref_products += row * V
    label = tl.load(target + row)
    w = tl.load(ce_weight + row)
    top, log_total = tl.load(norms + row), tl.load(norms + C + row)
    ref_top, ref_log_total, mean = (
        tl.load(norms + 2 * C + row),
        tl.load(norms + 3 * C + row),
        tl.load(norms + 4 * C + row),
    )
    w_divergence = 0.0
    if HAS_REF:
        w_divergence = tl.load(divergence_weight + row)
    seen = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = _logits(products, bias, columns, inside, softcap, scale, HAS_BIAS, HAS_CAP)
        log_p = z - top - log_total
        p = tl.exp(log_p)
        log_p = tl.where(inside, log_p, 0.0)
        grad = w * (p - tl.where(columns == label, 1.0, 0.0))
        if HAS_REF:
            log_q = (
                _logits(ref_products, ref_bias, columns, inside, softcap, scale, HAS_REF_BIAS, HAS_CAP)
                - ref_top
                - ref_log_total
            )
            if REVERSE:  # known at compile time, so Triton compiles only one of the two branches
                grad_divergence = w_divergence * p * (log_p - tl.where(inside, log_q, 0.0) - mean)
            else:
                grad_divergence = w_divergence * (p - tl.exp(log_q))
            seen += tl.sum(tl.abs(grad_divergence), 0)
            grad += grad_divergence
        if HAS_CAP:
            capped = tl.where(inside, z, 0.0) / softcap
            grad *= 1 - capped * capped
        tl.store(products + columns, grad * scale, mask=inside)
    tl.store(evidence + row, seen)


def tile_pass(
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

    The arguments and the weighted loss are those of [`~trl_emguard.ops.tiles.torch_tile_pass`], which computes the
    same statistics and gradient by torch's operations. Here `products` must be fp32 and all results are fp32, and
    `ref_products` are not overwritten.
    """
    count, vocab = products.shape
    out = products.new_zeros(4, count)
    norms = products.new_empty(5, count)
    evidence = products.new_empty(count)
    ref = products if ref_products is None else ref_products
    block = min(BLOCK, triton.next_power_of_2(vocab))
    kinds = {
        "HAS_REF": ref_products is not None,
        "REVERSE": direction == "reverse",
        "HAS_BIAS": bias is not None,
        "HAS_REF_BIAS": ref_bias is not None,
        "HAS_CAP": softcap is not None,
        "BLOCK": block,
        # With at least 32 columns per warp no column belongs to two threads. Otherwise one thread could read the
        # column's product after the other thread has overwritten it with the gradient.
        "num_warps": max(1, min(WARPS, block // 32)),
        # With fused multiply-adds, the same logit could be rounded differently at two places in the kernels. But if
        # the label has the largest logit, this logit must equal the row's maximum exactly (`is_top1`). If policy and
        # reference have the same logits, log p − log q must be exactly 0.
        "enable_fp_fusion": False,
    }
    # The kernels expect contiguous tensors. In place of a missing tensor (a bias, `ref_products` above, or
    # `divergence_weight`) they get another one, because they need some pointer. The flags in `kinds` tell the kernels
    # not to read this pointer.
    bias = products if bias is None else bias.contiguous()
    ref_bias = products if ref_bias is None else ref_bias.contiguous()
    given = (products, ref, bias, ref_bias, target.contiguous())
    ce_weight = ce_weight.contiguous()
    divergence_weight = ce_weight if divergence_weight is None else divergence_weight.contiguous()
    numbers = (vocab, count, float(softcap or 1.0), float(logit_scale))
    # Triton launches on the current device. If a model is spread over devices, the tensors may be on another device.
    with torch.cuda.device_of(products):
        _statistics[(count,)](*given, out, norms, *numbers, **kinds)
        _gradient[(count,)](*given, ce_weight, divergence_weight, norms, evidence, *numbers, **kinds)
    ce, entropy, is_top1, divergence = out.unbind()
    return TileStatistics(ce, entropy, is_top1, divergence, evidence)
