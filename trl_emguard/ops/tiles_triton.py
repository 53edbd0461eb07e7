"""The head's elementwise passes on CUDA.

What `head.py` does in torch's own calls, each of which reads and writes whole tiles, is here one pass over a row for its
normalisers, one for its statistics, and one for its gradient.
"""

import torch
import triton
import triton.language as tl

from .head import TileStatistics


BLOCK = 4096  # columns that a program holds at once
WARPS = 8


@triton.jit
def _logits(products, bias, columns, inside, softcap, scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of some columns of a row, -inf outside of the vocabulary."""
    z = tl.load(products + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if HAS_CAP:
        # tanh, which the language does not have on every device: 1 − 2 / (e^2x + 1).
        z = softcap * (1 - 2 / (tl.exp(2 * z / softcap) + 1))
    return tl.where(inside, z, -float("inf"))


@triton.jit
def _normaliser(products, bias, V, softcap, scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit of a row, and the log of Σ exp(logit − largest)."""
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _logits(products, bias, columns, columns < V, softcap, scale, HAS_BIAS, HAS_CAP)
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    return top, tl.log(total)


# Chunks differ in their number of rows and in where their weights begin, which is no reason to compile anew.
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
    # 0 where the label is the most probable token.
    at_label = _logits(products, bias, label, label < V, softcap, scale, HAS_BIAS, HAS_CAP) - top
    entropy, kl, shift = 0.0, 0.0, 0.0
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
                kl += tl.sum(p * (log_p - log_q), 0)
                shift += tl.sum(q - p, 0)
            else:
                kl += tl.sum(q * (log_q - log_p), 0)
                shift += tl.sum(p - q, 0)
    tl.store(out + row, log_total - at_label)
    tl.store(out + C + row, entropy)
    tl.store(out + 2 * C + row, tl.where(at_label == 0, 1.0, 0.0))
    # KL's own mean is what its gradient wants; the shift takes the rounding of the normalisers out of its value.
    # A KL that is not a number stays one, as in torch's clamp: 0 would hide a reference that has diverged.
    tl.store(out + 3 * C + row, tl.maximum(kl + shift, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(norms + row, top)
    tl.store(norms + C + row, log_total)
    tl.store(norms + 2 * C + row, ref_top)
    tl.store(norms + 3 * C + row, ref_log_total)
    tl.store(norms + 4 * C + row, kl)


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target", "ce_weight", "kl_weight"])
def _gradient(
    products, ref_products, bias, ref_bias, target, ce_weight, kl_weight, norms, evidence, V, C, softcap, scale,
    HAS_REF: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    products += row * V
    ref_products += row * V
    label = tl.load(target + row)
    w = tl.load(ce_weight + row)
    top, log_total = tl.load(norms + row), tl.load(norms + C + row)
    ref_top, ref_log_total, kl = (
        tl.load(norms + 2 * C + row),
        tl.load(norms + 3 * C + row),
        tl.load(norms + 4 * C + row),
    )
    w_kl = 0.0
    if HAS_REF:
        w_kl = tl.load(kl_weight + row)
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
            if REVERSE:  # noqa: SIM108  (decided when it is compiled)
                grad_kl = w_kl * p * (log_p - tl.where(inside, log_q, 0.0) - kl)
            else:
                grad_kl = w_kl * (p - tl.exp(log_q))
            seen += tl.sum(tl.abs(grad_kl), 0)
            grad += grad_kl
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
    kl_weight: torch.Tensor | None,
    direction: str,
    softcap: float | None,
    logit_scale: float,
) -> TileStatistics:
    """What [`~trl_emguard.ops.head.torch_tile_pass`] does, with the same arguments, in fp32."""
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
        # From 32 columns on, none belongs to two threads, of which one could read what the other has already overwritten.
        "num_warps": max(1, min(WARPS, block // 32)),
        # The label's logit and the largest, p and q are compared for equality: all of them are rounded alike.
        "enable_fp_fusion": False,
    }
    # The kernels know no strides. Where there is no tensor, a pointer that is never read.
    bias = products if bias is None else bias.contiguous()
    ref_bias = products if ref_bias is None else ref_bias.contiguous()
    given = (products, ref, bias, ref_bias, target.contiguous())
    ce_weight = ce_weight.contiguous()
    kl_weight = ce_weight if kl_weight is None else kl_weight.contiguous()
    numbers = (vocab, count, float(softcap or 1.0), float(logit_scale))
    # Triton launches on the current device, which is another where a model is spread over several.
    with torch.cuda.device_of(products):
        _statistics[(count,)](*given, out, norms, *numbers, **kinds)
        _gradient[(count,)](*given, ce_weight, kl_weight, norms, evidence, *numbers, **kinds)
    ce, entropy, is_top1, kl = out.unbind()
    return TileStatistics(ce, entropy, is_top1, kl, evidence)
