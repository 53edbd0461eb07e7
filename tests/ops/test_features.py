"""Test the distance between states, and gradients that are attached to a value."""

import pytest
import torch

from trl_emguard.ops import feature_distance, with_gradient


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_float64_twin(normalize, dtype, tolerance):
    policy = [torch.randn(7, 16).to(dtype).requires_grad_() for _ in range(3)]
    reference = [torch.randn(7, 16).to(dtype) for _ in range(3)]
    ours = feature_distance(policy, reference, normalize)
    grads = torch.autograd.grad(ours.sum(), policy)

    doubles = [x.detach().double().requires_grad_() for x in policy]
    expected = 0
    unit = (lambda v: v / v.norm(dim=-1, keepdim=True)) if normalize else (lambda v: v)
    for x, x0 in zip(doubles, reference, strict=True):
        expected = expected + (unit(x) - unit(x0.double())).pow(2).sum(-1) / 3
    theirs = torch.autograd.grad(expected.sum(), doubles)

    assert ours.shape == (7,)
    assert ((ours.double() - expected).norm() / expected.norm()) < tolerance
    for grad, twin in zip(grads, theirs, strict=True):
        assert ((grad.double() - twin).norm() / twin.norm()) < tolerance


def test_equal_states_have_no_distance_and_no_gradient():
    x = torch.randn(5, 8, requires_grad=True)
    distance = feature_distance([x], [x.detach().clone()])
    assert distance.abs().max() == 0
    assert torch.autograd.grad(distance.sum(), x)[0].abs().max() == 0


def test_opposite_unit_states_are_four_apart():
    x = torch.eye(4)
    torch.testing.assert_close(feature_distance([3 * x], [-2 * x]), torch.full((4,), 4.0))


def test_with_gradient_returns_the_given_gradients():
    x, y = torch.randn(3, requires_grad=True), torch.randn(2)
    value = with_gradient(torch.tensor(5.0), [x, y, None], [torch.ones(3), torch.ones(2), None])
    assert value == 5
    (2 * value).backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert y.grad is None


def test_without_a_gradient_the_value_does_not_depend_on_its_inputs():
    x = torch.randn(3, requires_grad=True)
    value = with_gradient(torch.tensor(5.0), [x], [None])
    assert torch.autograd.grad(value, x, allow_unused=True)[0] is None
