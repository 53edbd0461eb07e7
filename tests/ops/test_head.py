"""Compare the head with a plain float64 twin that builds the full logits."""

import itertools
import platform
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trl_emguard.ops import ce_divergence_head, head, tiles


N, H, V = 13, 24, 97
DEVICE = "cpu"
# The test extra installs Triton on platforms with wheels. A missing Triton is a failure there, not a reason to skip.
HAS_TRITON = sys.platform == "linux" and platform.machine() == "x86_64"
NO_TRITON = "the test extra has Triton on Linux and x86-64 alone; elsewhere the package takes torch's own calls"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def twin(hidden, weight, bias, labels, ce_weight, divergence_weight, reference, direction, softcap, logit_scale):
    """Return loss, CE, divergence and entropy, computed from all logits at once with autograd."""

    def log_probs(hidden, weight, bias):
        z = hidden @ weight.T
        if bias is not None:
            z = z + bias
        z = z * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return z.log_softmax(-1)

    log_p = log_probs(hidden, weight, bias)
    kept = labels != -100
    ce = torch.where(kept, -log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    loss = (ce_weight * ce).sum()
    divergence = torch.zeros_like(ce)
    if reference is not None:
        log_q = log_probs(*reference)
        a, b = (log_p, log_q) if direction == "reverse" else (log_q, log_p)
        divergence = (a.exp() * (a - b)).sum(-1)
        loss = loss + (divergence_weight * divergence).sum()
    return loss, ce, divergence, -(log_p.exp() * log_p).sum(-1)


def make_inputs(dtype, bias=False, reference="same_head", mask="some", tokens=N):
    g = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)

    hidden, weight = random(tokens, H), random(V, H) * 0.5
    b = random(V) if bias else None
    labels = torch.randint(V, (tokens,), generator=g).to(DEVICE)
    if mask == "some":
        labels[::3] = -100
    elif mask == "all":
        labels[:] = -100
    kept = (labels != -100).double()
    ce_weight = kept / kept.sum().clamp(min=1)
    divergence_weight = torch.rand(tokens, generator=g, dtype=torch.float64).to(DEVICE)
    ref_hidden = hidden + 0.3 * random(tokens, H)
    ref = None
    if reference == "same_head":
        ref = (ref_hidden, weight, b)
    elif reference == "other_head":
        ref = (ref_hidden, weight + 0.1 * random(V, H), b)
    return hidden, weight, b, labels, ce_weight, divergence_weight, ref


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def compare(dtype, *, bias, reference, mask, tokens, direction, softcap, scale, train_head):
    hidden, weight, b, labels, ce_weight, divergence_weight, ref = make_inputs(dtype, bias, reference, mask, tokens)
    leaves = [hidden.requires_grad_()]
    if train_head:
        leaves += [weight.requires_grad_()] + ([b.requires_grad_()] if bias else [])
    # A frozen reference has the same numbers, but gets no gradient.
    ours_ref = None if ref is None else tuple(None if x is None else x.detach() for x in ref)
    output = ce_divergence_head(
        hidden, weight, b, labels, ce_weight.float(), divergence_weight.float(), ours_ref, direction, softcap, scale
    )
    ours = torch.autograd.grad(3.0 * output.loss, leaves)

    doubles = [x.detach().double().requires_grad_() for x in leaves]
    h64 = doubles[0]
    w64 = doubles[1] if train_head else weight.double()
    b64 = None if not bias else doubles[2] if train_head else b.double()
    r64 = None if ref is None else tuple(None if x is None else x.detach().double() for x in ref)
    expected = twin(h64, w64, b64, labels, ce_weight, divergence_weight, r64, direction, softcap, scale)
    theirs = torch.autograd.grad(3.0 * expected[0], doubles, allow_unused=True)

    tolerance = TOLERANCE[dtype]
    for value, twin_value in zip((output.loss, output.ce, output.divergence, output.entropy), expected, strict=True):
        assert relative(value, twin_value) < tolerance
    for grad, twin_grad in zip(ours, theirs, strict=True):
        if twin_grad.norm() == 0:
            assert grad.norm() == 0
        else:
            assert relative(grad, twin_grad) < tolerance
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("direction", "softcap", "scale", "bias", "reference", "train_head"),
    [
        *itertools.product(
            ["reverse", "forward"], [None, 2.0], [1.0, 0.3], [False, True], ["same_head", "other_head"], [False, True]
        ),
        ("reverse", 2.0, 0.3, True, None, True),
    ],
)
def test_equals_float64_twin(dtype, direction, softcap, scale, bias, reference, train_head, monkeypatch):
    # With chunks of five tokens and blocks of two, the last chunk and the last block of a chunk are not full.
    monkeypatch.setattr(head, "TILE_BYTES", 5 * 2 * 4 * V)
    monkeypatch.setattr(tiles, "BLOCK_BYTES", 2 * 4 * V)
    compare(
        dtype,
        bias=bias,
        reference=reference,
        mask="some",
        tokens=N,
        direction=direction,
        softcap=softcap,
        scale=scale,
        train_head=train_head,
    )


@pytest.mark.parametrize("mask", ["none", "all"])
@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("reference", [None, "same_head"])
def test_few_tokens_and_no_labels(mask, tokens, reference):
    output = compare(
        torch.float32,
        bias=False,
        reference=reference,
        mask=mask,
        tokens=tokens,
        direction="reverse",
        softcap=None,
        scale=1.0,
        train_head=True,
    )
    assert output.loss.requires_grad
    if tokens == 0 or (mask == "all" and reference is None):
        assert output.loss == 0


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction):
    hidden, weight, _, labels, ce_weight, divergence_weight, ref = make_inputs(torch.float64, tokens=3)
    hidden.requires_grad_()
    ref = tuple(None if x is None else x.detach().clone() for x in ref)
    weight = weight.clone().requires_grad_()

    def loss(hidden, weight):
        return ce_divergence_head(
            hidden, weight, None, labels, ce_weight, divergence_weight, ref, direction, 2.0, 0.7
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_of_equal_states_is_exactly_zero(direction, dtype):
    hidden, weight, _, labels, ce_weight, divergence_weight, _ = make_inputs(dtype)
    hidden.requires_grad_()
    output = ce_divergence_head(
        hidden,
        weight,
        None,
        labels,
        0 * ce_weight,
        divergence_weight,
        (hidden.detach().clone(), weight, None),
        direction,
    )
    assert output.divergence.abs().max() == 0
    assert output.divergence_evidence == 0
    assert torch.autograd.grad(output.loss, hidden)[0].abs().max() == 0


def test_evidence_is_the_divergence_gradient_of_the_logits():
    hidden, weight, _, labels, ce_weight, divergence_weight, ref = make_inputs(torch.float64)
    output = ce_divergence_head(hidden, weight, None, labels, ce_weight, divergence_weight, ref)
    z = (hidden @ weight.T).requires_grad_()
    log_p, log_q = z.log_softmax(-1), (ref[0] @ ref[1].T).log_softmax(-1)
    (divergence_weight * (log_p.exp() * (log_p - log_q)).sum(-1)).sum().backward()
    torch.testing.assert_close(output.divergence_evidence, z.grad.abs().sum())


def test_top1_counts_labels_alone():
    hidden, weight, _, labels, ce_weight, *_ = make_inputs(torch.float32)
    top = (hidden @ weight.T).argmax(-1)
    labels = torch.where(torch.arange(N) % 2 == 0, top, (top + 1) % V)
    labels[0] = -100
    output = ce_divergence_head(hidden, weight, None, labels, ce_weight)
    assert output.is_top1.tolist() == [float(i % 2 == 0 and i > 0) for i in range(N)]


@pytest.mark.parametrize(
    ("reference", "train_head", "products"),
    [("same_head", False, 3), ("same_head", True, 4), ("other_head", False, 3), (None, False, 2), (None, True, 3)],
)
def test_matrix_products_with_the_head(reference, train_head, products):
    """Count the products: the divergence adds one, and the total is TRL's own (3; 4 with a trained head)."""
    hidden, weight, _, labels, ce_weight, divergence_weight, ref = make_inputs(torch.float32, reference=reference)
    leaves = [hidden.requires_grad_()] + ([weight.requires_grad_()] if train_head else [])
    ref = None if ref is None else tuple(None if x is None else x.detach() for x in ref)
    multiplied = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                multiplied.append(func)
            return func(*args, **(kwargs or {}))

    with Counter():
        output = ce_divergence_head(hidden, weight, None, labels, ce_weight.float(), divergence_weight.float(), ref)
        torch.autograd.grad(output.loss, leaves)
    assert len(multiplied) == products


@pytest.mark.parametrize("with_reference", [True, False])
def test_no_tile_is_larger_than_the_budget(monkeypatch, with_reference):
    """Check that a budget of two tokens never makes a tensor of more than two rows of logits."""
    monkeypatch.setattr(head, "TILE_BYTES", 2 * (2 if with_reference else 1) * 4 * V)
    rows = []
    original = head.torch_tile_pass

    def spy(products, *args):
        rows.append(len(products))
        return original(products, *args)

    monkeypatch.setattr(head, "torch_tile_pass", spy)
    hidden, weight, _, labels, ce_weight, divergence_weight, ref = make_inputs(torch.float32)
    ce_divergence_head(hidden, weight, None, labels, ce_weight, divergence_weight, ref if with_reference else None)
    assert max(rows) == 2
    assert sum(rows) == N


class CudaProducts(TorchDispatchMode):
    """Emulate on a CPU products of bf16 or fp16 with fp32 results, which torch has only on CUDA.

    The checks are those of `_mm_dtype_out_cuda` and `_addmm_dtype_out_cuda` in ATen's Blas.cpp.
    """

    def __init__(self):
        super().__init__()
        self.products = 0
        self.tiles = {}  # function -> bytes of the largest tensor with a row of logits that it made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out):
            *total, a, b, dtype = args
            out = kwargs.get("out", a.new_empty(len(a), b.shape[1], dtype=dtype))
            assert a.dtype == b.dtype in (torch.bfloat16, torch.float16)
            assert dtype == out.dtype == torch.float32
            assert out.shape == (len(a), b.shape[1])
            assert all(x.dtype == dtype and x.shape == out.shape for x in total)
            self.products += 1
            return out.copy_(a.float() @ b.float() + sum(total))
        result = func(*args, **kwargs)
        if func in (aten.new_empty.default, aten._to_copy.default) and result.dim() > 1 and result.shape[-1] == V:
            self.tiles[func] = max(result.nbytes, self.tiles.get(func, 0))
        return result


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("reference", [None, "other_head"])
def test_products_of_low_precision_as_on_cuda(monkeypatch, reference, train_head):
    monkeypatch.setattr(head, "matmul_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(head, "TILE_BYTES", 5 * 2 * 4 * V)
    with CudaProducts() as cuda:
        compare(
            torch.bfloat16,
            bias=True,
            reference=reference,
            mask="some",
            tokens=N,
            direction="reverse",
            softcap=None,
            scale=1.0,
            train_head=train_head,
        )
        assert cuda.products > 0
        hidden, weight, b, labels, *_ = make_inputs(torch.bfloat16, bias=True)
        labels = labels.clamp(min=0)
        nll = head.token_nll(hidden, weight, b, labels)
    expected = -(hidden.double() @ weight.double().T + b.double()).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert relative(nll, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("with_reference", [True, False])
def test_budget_holds_the_gradient_in_the_products_dtype(monkeypatch, with_reference):
    monkeypatch.setattr(head, "matmul_dtype", lambda hidden: hidden.dtype)
    # torch's own calls need scratch memory, which CUDA does not use: keep it small.
    monkeypatch.setattr(tiles, "BLOCK_BYTES", 1)
    monkeypatch.setattr(head, "TILE_BYTES", 8 * 4 * V * (2 if with_reference else 1))
    hidden, weight, b, labels, ce_weight, divergence_weight, ref = make_inputs(torch.bfloat16)
    with CudaProducts() as cuda:
        ce_divergence_head(hidden, weight, b, labels, ce_weight, divergence_weight, ref if with_reference else None)
    assert len(cuda.tiles) == 2
    assert sum(cuda.tiles.values()) <= head.TILE_BYTES


def test_autocast_leaves_fp64_alone(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ]:
        with FakeTensorMode():
            assert head.matmul_dtype(torch.empty(2, H, dtype=dtype, device="cuda")) == expected


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
@pytest.mark.parametrize("starts", [True, False])
def test_cuda_without_a_compiler_takes_torchs_own_calls(monkeypatch, starts):
    from triton.runtime import driver

    class Driver:
        @property
        def utils(self):
            if not starts:
                raise RuntimeError("Failed to find C compiler.")
            return SimpleNamespace()

    monkeypatch.setattr(driver, "_active", Driver())
    forget, chosen = head.triton_starts.cache_clear, head.choose_tile_pass
    forget()
    with FakeTensorMode():
        hidden = torch.empty(2, H, device="cuda")
    if starts:
        assert chosen(hidden, torch.float32) is not head.torch_tile_pass
    else:
        with pytest.warns(UserWarning, match="C compiler"):
            assert chosen(hidden, torch.float32) is head.torch_tile_pass
    assert chosen(hidden, torch.float64) is head.torch_tile_pass
    forget()


def test_torchs_own_calls_take_many_rows_at_once_on_a_gpu(monkeypatch):
    """Bound the number of blocks: each costs about twenty launches on a GPU."""
    blocks = []
    original = tiles.to_logits_

    def spy(z, *args):
        blocks.append(len(z))
        return original(z, *args)

    monkeypatch.setattr(tiles, "to_logits_", spy)
    for device, rows in [("cpu", 1), ("meta", 8)]:
        products, weights = torch.empty(8, 300_000, device=device), torch.empty(8, device=device)
        target = torch.zeros(8, dtype=torch.long, device=device)
        tiles.torch_tile_pass(products, None, None, None, target, weights, None, "reverse", None, 1.0)
        assert max(blocks) == rows
        blocks.clear()


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("count", [0, 1, 20, 37])
def test_a_reference_at_some_positions(count, train_head):
    """Compare with a reference everywhere that counts nowhere else."""
    hidden, weight, b, labels, ce_weight, divergence_weight, ref = make_inputs(
        torch.float32, True, "other_head", "some", 37
    )
    compared = torch.zeros(37, dtype=torch.bool, device=DEVICE)
    compared[torch.randperm(37, generator=torch.Generator().manual_seed(3))[:count].to(DEVICE)] = True
    divergence_weight = divergence_weight.float() * compared
    leaves = [hidden.requires_grad_(), *((weight.requires_grad_(), b.requires_grad_()) if train_head else ())]
    given = (hidden, weight, b, labels, ce_weight.float(), divergence_weight)
    everywhere = ce_divergence_head(*given, ref)
    some = (ref[0][compared], *ref[1:])
    there = ce_divergence_head(*given, some, compared=compared)
    for ours, theirs in zip(
        torch.autograd.grad(there.loss, leaves), torch.autograd.grad(everywhere.loss, leaves), strict=True
    ):
        assert relative(ours, theirs.double()) < 1e-6
    for name in ("loss", "ce", "entropy", "divergence_evidence"):
        assert relative(getattr(there, name), getattr(everywhere, name).double()) < 1e-6
    assert relative(there.divergence, (everywhere.divergence * compared).double()) < 1e-6
    assert torch.equal(there.is_top1, everywhere.is_top1)
