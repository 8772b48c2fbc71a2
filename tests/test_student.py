"""The student's transitions against diffusers' own schedulers."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from fewstep.denoiser import Denoiser
from fewstep.schedule import DDPM, Flow
from fewstep.student import Student


class Small(torch.nn.Module):
    def forward(self, xt, timestep, cond):
        return torch.tanh(xt) * (1 + timestep.view(-1, 1, 1, 1).to(xt) / 1000)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_rollout_equals_the_stock_lcm_scheduler(steps, kind):
    scheduler = LCMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=kind, rescale_betas_zero_snr=True, timestep_spacing="trailing",
        original_inference_steps=steps, clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    schedule, network = DDPM(scheduler.alphas_cumprod), Small()
    times = schedule.t_of(scheduler.timesteps.double())
    student = Student(Denoiser(network, schedule, kind), schedule, times)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    rollout = student.rollout(noise, {}, generator=torch.Generator().manual_seed(2))
    x, generator = noise, torch.Generator().manual_seed(2)
    for k, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(rollout.states[k], x, rtol=1e-5, atol=1e-5)
        x, denoised = scheduler.step(network(x, timestep.expand(3), {}), timestep, x, generator=generator, return_dict=False)
        torch.testing.assert_close(rollout.x0[k], denoised, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.x0[-1], x, rtol=1e-5, atol=1e-5)


def test_rollout_equals_the_stock_stochastic_flow_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1, shift_terminal=0.25, stochastic_sampling=True)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    network = Small()
    student = Student(Denoiser(network, Flow(), "flow"), Flow(), scheduler.sigmas[:-1])
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    mine = student.rollout(noise, {}).x0[-1]
    torch.manual_seed(2)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep.expand(3), {}), timestep, x).prev_sample
    torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-5)


def student(times=(1.0, 0.5)):
    return Student(Denoiser(Small(), Flow(), "flow"), Flow(), list(times))


def test_a_transition_has_the_stated_mean_and_spread():
    x0 = torch.full((20000, 1, 1, 1), 2.0)
    x1 = student().step(x0, 0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)))
    assert x1.mean().item() == pytest.approx(0.5 * 2, abs=0.02)
    assert x1.std().item() == pytest.approx(0.5, abs=0.02)


def test_the_last_step_has_no_next_state():
    for k in (1, 2, -1):
        with pytest.raises(ValueError, match="no next state"):
            student().step(torch.zeros(1, 1, 1, 1), k, torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("times", [[], [0.5, 1.0], [1.0, 1.0], [1.0, 0.0], [1.5, 0.5], [[1.0]]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="times"):
        student(times)


def test_mixed_steps_predict_as_each_alone():
    one = student((1.0, 0.6, 0.3))
    x = torch.randn(3, 2, 2, 2)
    mixed = one.predict(x, torch.tensor([2, 0, 1]), {})
    alone = torch.cat([one.predict(x[i : i + 1], k, {}) for i, k in enumerate((2, 0, 1))])
    torch.testing.assert_close(mixed, alone)


def test_rollout_has_no_gradient_and_keeps_every_state():
    network = torch.nn.Conv2d(2, 2, 1)
    denoiser = Denoiser(lambda xt, timestep, cond: network(xt), Flow(), "flow")
    rollout = Student(denoiser, Flow(), [1.0, 0.5, 0.25]).rollout(torch.randn(2, 2, 2, 2), {})
    assert rollout.states.shape == rollout.x0.shape == (3, 2, 2, 2, 2)
    assert not rollout.x0.requires_grad
    assert rollout.group.tolist() == [0, 1]


def test_a_rollout_knows_its_times_its_condition_and_its_prompts():
    cond, prompts = {"embedding": torch.zeros(2, 3)}, ["a", "b"]
    denoiser = Denoiser(lambda xt, timestep, cond: xt, Flow(), "flow")
    one = Student(denoiser, Flow(), [1.0, 0.5, 0.25])
    whole = one.rollout(torch.randn(2, 2, 2, 2), cond, group=torch.tensor([4, 4]), prompts=prompts)
    assert torch.equal(whole.times, one.times) and whole.cond is cond and whole.prompts == prompts and whole.group.tolist() == [4, 4]
    part = one.rollout(torch.randn(2, 2, 2, 2), cond, until=1)
    assert part.times.tolist() == [1.0, 0.5] and len(part.states) == len(part.x0) == 2 and part.prompts == []


def test_a_batch_of_one_has_a_log_probability():
    one = student()
    x0, following = torch.randn(2, 1, 2, 2, 2)
    t = one.times[1]
    expected = torch.distributions.Normal(Flow().alpha(t) * x0, Flow().sigma(t)).log_prob(following).flatten(1).sum(1)
    torch.testing.assert_close(one.transition_log_prob(x0, following, 0), expected, check_dtype=False)


def test_a_log_probability_of_many_dimensions_keeps_its_digits():
    """Their sum is near 10^6, where float32 has one digit behind the point."""
    one = student()
    x0, following = torch.randn(2, 3, 16, 128, 128, generator=torch.Generator().manual_seed(0))
    exact = one.transition_log_prob(x0.double(), following.double(), 0)
    torch.testing.assert_close(one.transition_log_prob(x0, following, 0), exact, rtol=0, atol=1e-3)
