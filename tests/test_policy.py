"""The student as a policy: exact log-probabilities and the clipped policy gradient (docs/method.md: the student is a policy)."""

import pytest
import torch
from torch import nn

from fewstep import losses
from fewstep.denoiser import Denoiser
from fewstep.schedule import Flow
from fewstep.student import Student

TIMES = [1.0, 0.7, 0.3]


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    def forward(self, xt, timestep, cond):
        return self.gain * xt


def student_of(times=TIMES):
    network = Linear()
    return network, Student(Denoiser(network, Flow(), "sample"), Flow(), times)


def rollout_of(student, batch=5):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, 2, 3, 3, dtype=torch.float64, generator=generator)
    return student.rollout(noise, {}, generator=generator)


def test_log_prob_is_that_of_the_normal_distribution():
    _, student = student_of()
    rollout = rollout_of(student)
    columns = []
    for k in range(2):
        t = torch.tensor(TIMES[k + 1], dtype=torch.float64)
        law = torch.distributions.Normal((1 - t) * rollout.x0[k], t)
        columns.append(law.log_prob(rollout.states[k + 1]).flatten(1).sum(1))
    torch.testing.assert_close(student.log_prob(rollout), torch.stack(columns, 1), rtol=1e-12, atol=1e-12)


def test_log_prob_follows_todays_weights():
    network, student = student_of()
    rollout = rollout_of(student)
    old = student.log_prob(rollout).detach()
    assert torch.equal(student.log_prob(rollout), old)
    network.gain.data.add_(0.1)
    assert not torch.allclose(student.log_prob(rollout), old)
    student.log_prob(rollout).sum().backward()
    assert network.gain.grad is not None and float(network.gain.grad) != 0


def test_what_is_deterministic_has_no_log_probability():
    _, one = student_of([1.0])
    with pytest.raises(ValueError, match="deterministic"):
        one.log_prob(rollout_of(one))
    _, student = student_of()
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    for k in (-1, 2):
        with pytest.raises(ValueError, match="deterministic"):
            student.transition_log_prob(x, x, k)


def reference(log_prob, old, advantage, clip):
    ratio = (log_prob - old).exp()
    a = advantage[:, None]
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).mean()


def case(size=0.3):
    generator = torch.Generator().manual_seed(3)
    log_prob, old = (torch.randn(40, 3, dtype=torch.float64, generator=generator) * size for _ in range(2))
    return log_prob.requires_grad_(), old, torch.randn(40, dtype=torch.float64, generator=generator)


def test_value_and_gradient_are_those_of_the_clipped_objective():
    log_prob, old, advantage = case()
    torch.testing.assert_close(losses.policy(log_prob, old, advantage, clip=0.2), reference(log_prob, old, advantage, 0.2))
    (ours,) = torch.autograd.grad(losses.policy(log_prob, old, advantage, clip=0.2), log_prob)
    (theirs,) = torch.autograd.grad(reference(log_prob, old, advantage, 0.2), log_prob)
    torch.testing.assert_close(ours, theirs)
    share = losses.clip_fraction(log_prob, old, advantage, clip=0.2)
    assert share == pytest.approx(float((theirs == 0).double().mean())) and 0 < share < 1


def test_gradcheck_inside_the_clip():
    log_prob, old, advantage = case(size=0.01)
    assert torch.autograd.gradcheck(lambda p: losses.policy(p, old, advantage, clip=0.2), (log_prob,))
    assert losses.clip_fraction(log_prob, old, advantage, clip=0.2) == 0


def test_on_policy_it_is_the_policy_gradient():
    log_prob, _, advantage = case()
    (gradient,) = torch.autograd.grad(losses.policy(log_prob, log_prob.detach(), advantage, clip=0.2), log_prob)
    torch.testing.assert_close(gradient, -advantage[:, None].expand(40, 3) / 120)  # - mean of A grad log p


def test_ratios_beyond_every_number_have_no_gradient_where_they_are_clipped():
    log_prob = torch.tensor([[1e4, -1e4]], dtype=torch.float64, requires_grad=True)
    losses.policy(log_prob, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64), clip=0.2).backward()
    assert torch.equal(log_prob.grad, torch.zeros(1, 2, dtype=torch.float64))


def test_samples_without_an_advantage_are_left_out():
    log_prob, old, advantage = case()
    known = torch.arange(40) % 3 != 0
    masked = advantage.masked_fill(~known, float("nan"))
    torch.testing.assert_close(
        losses.policy(log_prob, old, masked, clip=0.2), losses.policy(log_prob[known], old[known], advantage[known], clip=0.2)
    )
    nothing = losses.policy(log_prob, old, torch.full((40,), float("nan")), clip=0.2)
    assert float(nothing) == 0
    nothing.backward()
    assert torch.equal(log_prob.grad, torch.zeros_like(log_prob))
    assert losses.clip_fraction(log_prob, old, torch.full((40,), float("nan")), clip=0.2) == 0
    assert losses.policy(torch.zeros(4, 3), torch.zeros(4, 3), torch.full((4,), float("nan")), clip=0.2) == 0


@pytest.mark.parametrize("bad", [[[0.1, float("nan")], [0.0, 0.05]], [[0.1, 0.0], [float("nan"), 0.05]]])
def test_a_log_probability_that_is_nan_is_not_taken_for_a_clipped_one(bad):
    advantage = torch.tensor([1.0, -1.0])
    assert torch.isnan(losses.policy(torch.tensor(bad), torch.zeros(2, 2), advantage, clip=0.2))
    assert losses.clip_fraction(torch.tensor(bad), torch.zeros(2, 2), advantage, clip=0.2) == 0


def test_only_todays_log_probability_is_trained():
    """The old policy made the samples and the advantage is a score of them: neither is a way to lower the loss."""
    log_prob, old, advantage = (value.detach().requires_grad_(True) for value in case())
    losses.policy(log_prob, old, advantage, clip=0.2).backward()
    assert log_prob.grad.abs().sum() > 0 and old.grad is None and advantage.grad is None


def test_shapes_that_do_not_belong_together_are_refused():
    a = torch.zeros(4, 3)
    for arguments in ((a, a[:, :2], torch.zeros(4)), (a, a, torch.zeros(3)), (a[:, 0], a[:, 0], torch.zeros(4))):
        with pytest.raises(ValueError, match=r"\(B, K-1\)"):
            losses.policy(*arguments, clip=0.2)
    with pytest.raises(ValueError, match="one-step student"):
        losses.policy(a[:, :0], a[:, :0], torch.zeros(4), clip=0.2)
    with pytest.raises(ValueError, match="clip"):
        losses.policy(a, a, torch.zeros(4), clip=0.0)
