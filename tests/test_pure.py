"""Group functions and losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import losses
from fewstep.transforms import group_mean, scale_direction


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 2**31))
def test_group_mean_is_the_mean_of_each_group(ids, seed):
    group = torch.tensor(ids)
    value = torch.randn(len(ids), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([value[group == g].mean(0) for g in group])
    torch.testing.assert_close(group_mean(value, group), expected)


def test_leave_one_out_excludes_the_sample_itself():
    value, group = torch.tensor([1.0, 2.0, 4.0, 10.0, 30.0]), torch.tensor([0, 0, 0, 7, 7])
    torch.testing.assert_close(group_mean(value, group, leave_one_out=True), torch.tensor([3.0, 2.5, 1.5, 30.0, 10.0]))
    with pytest.raises(ValueError, match="at least two"):
        group_mean(value, torch.tensor([0, 0, 0, 7, 8]), leave_one_out=True)


@pytest.mark.parametrize("size", [6, 7])
def test_constant_groups_of_large_values_scale_exactly(size):
    magnitude = torch.full((size,), 1e30)
    direction = torch.randn(size, 1, 2, 2)
    torch.testing.assert_close(scale_direction(direction * 1e30, magnitude, torch.zeros(size, dtype=torch.long)), direction)


def test_scaling_never_centres_and_keeps_the_input_dtype():
    direction = torch.full((4, 1, 1, 1), 3.0, dtype=torch.float64)
    out = scale_direction(direction, torch.full((4,), 2.0, dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    assert out.dtype == torch.float64 and torch.equal(out, torch.full_like(out, 1.5))


def test_zero_directions_stay_zero_and_a_zero_scale_is_named():
    zero, group = torch.zeros(2, 1, 1, 1), torch.tensor([0, 0])
    assert torch.equal(scale_direction(zero, torch.zeros(2), group), zero)
    with pytest.raises(ValueError, match="scale is zero"):
        scale_direction(zero + 1, torch.zeros(2), group)


def test_one_scale_per_channel():
    direction = torch.ones(2, 2, 1, 1)
    out = scale_direction(direction, torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(out[:, :, 0, 0], torch.tensor([[0.5, 0.25], [0.5, 0.25]]))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_pathwise_gradient_is_exactly_minus_direction_over_numel(offset):
    x0 = (torch.randn(2, 2, 4, 4) + offset).requires_grad_(True)
    direction = torch.randn(2, 2, 4, 4, requires_grad=True)
    losses.pathwise(x0, direction).backward()
    assert torch.equal(x0.grad, -direction.detach() / x0.numel())
    assert direction.grad is None


def test_pathwise_value_and_weights():
    x0, direction = torch.randn(2, 1, 2, 2, requires_grad=True), torch.randn(2, 1, 2, 2)
    torch.testing.assert_close(losses.pathwise(x0, direction).detach(), 0.5 * direction.pow(2).mean())
    weight = torch.tensor([0.0, 2.0], requires_grad=True)
    losses.pathwise(x0, direction, weight).backward()
    torch.testing.assert_close(x0.grad, -weight.detach().view(-1, 1, 1, 1) * direction / 8)
    assert weight.grad is None


def test_denoising_loss():
    prediction = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: losses.denoising(p, goal), (prediction,))
    losses.denoising(prediction, goal).backward()
    assert goal.grad is None
    torch.testing.assert_close(losses.denoising(prediction, goal).detach(), (prediction - goal).pow(2).mean().detach())
