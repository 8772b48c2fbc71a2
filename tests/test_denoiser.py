"""Schedules and parametrisations against closed forms and against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from fewstep.denoiser import Denoiser, guide, join, score, target, to_x0
from fewstep.schedule import DDPM, Flow

KINDS = ["epsilon", "v_prediction", "sample", "flow"]


def ddpm():
    return DDPM(LCMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True).alphas_cumprod)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_between_parametrisations(kind):
    schedule = Flow() if kind == "flow" else ddpm()
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    xt = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * eps
    torch.testing.assert_close(to_x0(target(x0, eps, alpha, sigma, kind), xt, alpha, sigma, kind), x0, rtol=1e-12, atol=1e-12)


def test_pure_noise_has_no_x0_for_an_eps_prediction():
    x = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="alpha = 0"):
        to_x0(x, x, torch.tensor([0.5, 0.0]), torch.tensor([0.5, 1.0]), "epsilon")
    v = torch.full((1, 1, 1, 1), 2.0)
    assert to_x0(v, v, torch.zeros(1), torch.ones(1), "v_prediction").item() == -2.0


def test_data_has_no_score():
    x = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="sigma = 0"):
        score(x, x, torch.ones(2), torch.tensor([0.1, 0.0]))


def test_score_of_a_standard_normal():
    xt = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    alpha, sigma = torch.full((3,), 0.6, dtype=torch.float64), torch.full((3,), 0.8, dtype=torch.float64)
    torch.testing.assert_close(score(0.6 * xt, xt, alpha, sigma), -xt)  # E[x0 | xt] = alpha xt when alpha^2 + sigma^2 = 1


def test_unknown_prediction_is_refused():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="unknown prediction"):
        to_x0(x, x, torch.ones(1), torch.ones(1), "velocity")
    with pytest.raises(ValueError, match="unknown prediction"):
        target(x, x, torch.ones(1), torch.ones(1), "velocity")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_is_what_the_stock_scheduler_predicts(kind):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False)
    schedule = DDPM(scheduler.alphas_cumprod)
    x, out = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    scheduler.set_timesteps(1000)
    for timestep in (981, 500, 7):
        t = schedule.t_of(torch.tensor([timestep]).double())
        mine = to_x0(out, x, schedule.alpha(t), schedule.sigma(t), kind)
        torch.testing.assert_close(mine, scheduler.step(out, timestep, x).pred_original_sample, rtol=1e-4, atol=1e-5)


def test_ddpm_timesteps_and_times():
    schedule = ddpm()
    timesteps = torch.tensor([999.0, 749.0, 666.0, 249.0, 0.0])
    t = schedule.t_of(timesteps)
    assert t[0] == 1 and schedule.alpha(t)[0] == 0 and schedule.sigma(t)[0] == 1
    assert torch.equal(schedule.timestep_of(t), timesteps)  # exactly the integers the network was trained on, in float32 too
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(5))
    assert schedule.alpha(torch.zeros(1)) == 1


def test_ddpm_refuses_what_is_no_schedule():
    for bad in (torch.tensor([0.5, 0.6]), torch.tensor([1.5, 0.5]), torch.rand(2, 2)):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            DDPM(bad)


def test_snr_decay_is_the_derivative():
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(Flow().snr(t).sum(), t)
    torch.testing.assert_close(Flow().snr_decay(t), -0.5 * slope)
    cosine = DDPM(torch.cos(torch.arange(1, 1001, dtype=torch.float64) / 1000 * torch.pi / 2) ** 2)
    exact = 0.5 * torch.pi / torch.tan(t * torch.pi / 2) / torch.sin(t * torch.pi / 2) ** 2  # SNR = cot^2(pi t / 2)
    torch.testing.assert_close(cosine.snr_decay(t.detach()), exact.detach(), rtol=1e-4, atol=0)


class Echo(torch.nn.Module):
    def forward(self, xt, timestep, cond):
        self.rows = len(xt)
        return xt * cond["scale"].view(-1, 1, 1, 1)


def test_guidance_identities():
    network = Echo()
    denoiser = Denoiser(network, Flow(), "sample", uncond={"scale": torch.tensor([0.5])})
    x, t = torch.randn(3, 1, 2, 2), torch.full((3,), 0.5)
    cond = {"scale": torch.tensor([1.0, 2.0, 3.0])}
    conditional = denoiser(x, t, cond)
    assert network.rows == 3
    torch.testing.assert_close(denoiser(x, t, cond, guidance=0.0), 0.5 * x)
    torch.testing.assert_close(denoiser(x, t, cond, guidance=2.5), guide(conditional, 0.5 * x, 2.5))
    assert network.rows == 6  # one call on the doubled batch
    same = {"scale": torch.full((3,), 0.5)}
    torch.testing.assert_close(denoiser(x, t, same, guidance=7.0), denoiser(x, t, same))
    with pytest.raises(ValueError, match="uncond"):
        Denoiser(network, Flow(), "sample")(x, t, cond, guidance=2.0)
    denoiser.negative = {"scale": torch.tensor([0.25])}
    torch.testing.assert_close(denoiser(x, t, cond, guidance=2.5), guide(conditional, 0.25 * x, 2.5))


def test_conditions_of_different_lengths_are_filled_and_their_masks_say_so():
    def cond(n):
        mask = torch.ones(1, n, dtype=torch.bool)
        return {"text": torch.ones(1, n, 3), "mask": mask, "pooled": torch.full((1, 2), float(n)), "step": torch.tensor([n])}

    short, long = cond(2), cond(4)
    joined = join([short, long])
    assert joined["mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert torch.equal(joined["text"], joined["mask"].unsqueeze(-1).expand(2, 4, 3).float())
    assert joined["pooled"].tolist() == [[2, 2], [4, 4]] and joined["step"].tolist() == [2, 4]
    for i, cond in enumerate((short, long)):
        assert torch.equal(joined["text"][i][joined["mask"][i]], cond["text"][0])
