"""Compare the head with Triton's kernels with the same float64 twin, on a GPU or else in Triton's interpreter."""

import pytest
import torch
from ops import test_head as plain
from torch._subclasses.fake_tensor import FakeTensorMode

from trl_emguard.ops import ce_divergence_head, head


if not plain.HAS_TRITON:
    pytest.skip(plain.NO_TRITON, allow_module_level=True)
from trl_emguard.ops import tiles_triton


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Send every chunk through the kernels, in blocks that do not divide the vocabulary."""
    calls = []

    def spy(*args):
        calls.append(len(args[0]))
        return tiles_triton.tile_pass(*args)

    monkeypatch.setattr(head, "choose_tile_pass", lambda hidden, accumulate: spy)
    monkeypatch.setattr(tiles_triton, "BLOCK", 32)
    monkeypatch.setattr(plain, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    yield calls
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.3)])
@pytest.mark.parametrize(("bias", "reference"), [(False, "same_head"), (True, "other_head"), (True, None)])
def test_equals_float64_twin(monkeypatch, dtype, direction, softcap, scale, bias, reference):
    monkeypatch.setattr(head, "TILE_BYTES", 3 * 2 * 4 * plain.V)
    plain.compare(
        dtype,
        bias=bias,
        reference=reference,
        mask="some",
        tokens=plain.N,
        direction=direction,
        softcap=softcap,
        scale=scale,
        train_head=bias,
    )


@pytest.mark.parametrize("mask", ["none", "all"])
@pytest.mark.parametrize("reference", [None, "same_head"])
def test_one_token_and_no_labels(mask, reference):
    plain.compare(
        torch.float32,
        bias=False,
        reference=reference,
        mask=mask,
        tokens=1,
        direction="reverse",
        softcap=None,
        scale=1.0,
        train_head=True,
    )


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_divergence_of_equal_states_is_exactly_zero(direction):
    hidden, weight, _, labels, ce_weight, divergence_weight, _ = plain.make_inputs(torch.float32)
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


def test_top1_and_evidence_are_those_of_torchs_calls(monkeypatch):
    hidden, weight, b, labels, ce_weight, divergence_weight, ref = plain.make_inputs(torch.float32, bias=True)
    ours = ce_divergence_head(hidden, weight, b, labels, ce_weight.float(), divergence_weight.float(), ref)
    monkeypatch.setattr(head, "choose_tile_pass", lambda hidden, accumulate: head.torch_tile_pass)
    theirs = ce_divergence_head(hidden, weight, b, labels, ce_weight.float(), divergence_weight.float(), ref)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    torch.testing.assert_close(ours.divergence_evidence, theirs.divergence_evidence)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy, in the interpreter
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_nan_is_kept(direction):
    hidden, weight, _, labels, ce_weight, divergence_weight, ref = plain.make_inputs(torch.float32)
    ref[0][1, 0] = float("nan")
    output = ce_divergence_head(hidden, weight, None, labels, ce_weight, divergence_weight, ref, direction)
    assert output.divergence.isnan().tolist() == [i == 1 for i in range(plain.N)]
    assert output.loss.isnan()


def test_strided_arguments(monkeypatch):
    """Accept strided inputs: weights expanded from one number, bias and labels as columns of a matrix."""
    hidden, weight, b, labels, *_ = plain.make_inputs(torch.float32, bias=True)
    b, labels = torch.stack([b, -b], 1)[:, 0], torch.stack([labels, -labels], 1)[:, 0]
    same = hidden.new_tensor(0.1).expand(plain.N)
    arguments = (hidden.requires_grad_(), weight, b, labels, same, same, (hidden.detach() + 0.1, weight, b))
    ours = ce_divergence_head(*arguments)
    monkeypatch.setattr(head, "choose_tile_pass", lambda hidden, accumulate: head.torch_tile_pass)
    theirs = ce_divergence_head(*arguments)
    torch.testing.assert_close(ours.divergence, theirs.divergence)
    torch.testing.assert_close(*(torch.autograd.grad(output.loss, hidden)[0] for output in (ours, theirs)))


def test_kernels_are_launched_on_the_tensors_device(monkeypatch, kernels):
    """Run on the tensors' device: Triton itself launches on the current one."""
    kernels.append("launched by the test itself")
    current, launched = [0], []

    def exchange(device):
        current.append(device)
        return current[-2]

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(current[-1])

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    for name in ("_statistics", "_gradient"):
        monkeypatch.setattr(tiles_triton, name, Kernel())
    with FakeTensorMode():
        products, weights = (torch.empty(*shape, device="cuda:1") for shape in ((plain.N, plain.V), (plain.N,)))
        target = torch.empty(plain.N, dtype=torch.long, device="cuda:1")
        tiles_triton.tile_pass(products, None, products, None, target, weights, weights, "reverse", None, 1.0)
    assert launched == [1, 1]
    assert current[-1] == 0
