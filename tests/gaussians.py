"""Gaussian teachers and students with exact denoisers, and sigma points that integrate them without sampling."""

import torch
from torch import nn

from fewstep.denoiser import Denoiser
from fewstep.schedule import Flow, bcast

D = 4
SHAPE = (D, 1, 1)


def flat(x):
    return x.reshape(len(x), -1)


def unflat(x):
    return x.reshape(len(x), *SHAPE)


def spd(seed):
    a = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / D + 0.3 * torch.eye(D, dtype=torch.float64)


def vector(seed):
    return torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def marginal(cov, t, schedule):
    """alpha^2 S + sigma^2 I, (D, D)."""
    return schedule.alpha(t) ** 2 * cov + schedule.sigma(t) ** 2 * torch.eye(D, dtype=torch.float64)


def gaussian_denoiser(mean, cov, schedule=None):
    """E[x0 | xt] = mu + alpha S C^-1 (xt - alpha mu) as a library Denoiser, one sample's time at a time."""
    schedule = schedule or Flow()

    def network(xt, timestep, cond):
        out = []
        for x, t in zip(flat(xt), schedule.t_of(timestep), strict=True):
            alpha = schedule.alpha(t)
            out.append(mean + alpha * cov @ torch.linalg.solve(marginal(cov, t, schedule), x - alpha * mean))
        return unflat(torch.stack(out))

    return Denoiser(network, schedule, "sample")


class Affine(nn.Module):
    """The generator m + L z as a network that predicts x0 from pure noise."""

    def __init__(self, mean, factor):
        super().__init__()
        self.m, self.L = nn.Parameter(mean.clone()), nn.Parameter(factor.clone())

    def forward(self, xt, timestep, cond):
        return unflat(self.m + flat(xt) @ self.L.T)


def sigma_points(dimensions):
    """(2n, n) points +-sqrt(n) e_i: the mean over them is exact for polynomials of degree 3 of a standard normal."""
    root = torch.eye(dimensions, dtype=torch.float64) * dimensions**0.5
    return torch.cat([root, -root])


def joint_points():
    """(z, eps), each (4D, D, 1, 1): sigma points of both noises together."""
    points = sigma_points(2 * D)
    return unflat(points[:, :D]), unflat(points[:, D:])


def scaled(x, value):
    return bcast(value, x) * x


def guided_by(conditional, unconditional):
    """A Denoiser that is the one where cond["on"] says so and the other under its empty prompt, which guidance leads away from."""

    def network(xt, timestep, cond):
        t = Flow().t_of(timestep)
        return torch.where(cond["on"].view(-1, 1, 1, 1) > 0, conditional(xt, t, {}), unconditional(xt, t, {}))

    return Denoiser(network, Flow(), "sample", uncond={"on": torch.zeros(1)})
