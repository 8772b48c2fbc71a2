"""What guidance inside R_dm leads to, and what a guided sampler does: on Gaussians, in closed form.

The teacher's density of a prompt is N(mu, s^2), over all prompts N(0, 1); guidance at scale w is D_u + w (D_c - D_u). A sampler
follows the guided denoiser along the probability-flow ODE. A student of R_dm comes to rest where the direction (5) vanishes for
its mean and for its spread, averaged over noise levels. At the same w the student goes farther, at a lower one it stays more
diverse, and at none do the two agree: a student of a guided teacher has a distance to that teacher's pictures that no training
removes.

    python examples/guidance.py

A few seconds. Prints the table of docs/method.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq, minimize_scalar

from fewstep.evaluate.tables import markdown_table
from fewstep.schedule import Flow

SAMPLER = 3.0  # guidance of the sampler
LEVELS = torch.linspace(0.02, 0.98, 193, dtype=torch.float64)  # of R_dm, evenly spread as a run's are
OVER_ALL = 1.0  # variance over all prompts
FLOW = Flow()


class Gaussian(NamedTuple):
    mean: float
    std: float


def gain(variance: float, alpha: np.ndarray | float, sigma: np.ndarray | float) -> np.ndarray | float:
    """k in E[x0 | xt] = m + k (xt - alpha m), for x0 ~ N(m, variance)."""
    return alpha * variance / (alpha**2 * variance + sigma**2)


def sampled(prompt: Gaussian, w: float) -> Gaussian:
    """Where the guided probability-flow ODE ends: with y = xt / alpha and r = sigma / alpha it is dy/dr = (y - D) / r."""

    def rate(log_r: float, state: np.ndarray) -> list[float]:
        mean, spread = state  # y = mean + spread z
        alpha = 1 / math.hypot(1, math.exp(log_r))
        sigma = math.exp(log_r) * alpha
        own, over_all = (gain(variance, alpha, sigma) * alpha for variance in (prompt.std**2, OVER_ALL))
        slope = w * own + (1 - w) * over_all  # of the guided denoiser in y
        return [mean - (slope * mean + w * prompt.mean * (1 - own)), spread - slope * spread]

    start = 1000.0  # noise over signal
    end = solve_ivp(rate, (math.log(start), math.log(1e-4)), [0.0, start], rtol=1e-9, atol=1e-12).y[:, -1]
    return Gaussian(*map(float, end))


def student(prompt: Gaussian, w: float) -> Gaussian:
    """Where R_dm's direction at guidance w vanishes, with levels of equal weight (gamma = 0): for the mean E[d] = 0, for the spread
    E[d (x0 - m)] = 0. The standard deviation is 0 where guidance leaves none."""
    alpha, sigma = FLOW.alpha(LEVELS).numpy(), FLOW.sigma(LEVELS).numpy()
    guided = w * gain(prompt.std**2, alpha, sigma) + (1 - w) * gain(OVER_ALL, alpha, sigma)

    def pull(variance: float) -> float:
        return float(np.sum(alpha * (guided - gain(variance, alpha, sigma))))

    variance = brentq(pull, 1e-9, 10.0, xtol=1e-12) if pull(1e-9) > 0 else 0.0
    towards = np.sum(w * prompt.mean * (1 - alpha * gain(prompt.std**2, alpha, sigma)))
    return Gaussian(float(towards / np.sum(1 - alpha * guided)), math.sqrt(variance))


def distance(a: Gaussian, b: Gaussian) -> float:
    """Of Wasserstein, order 2."""
    return math.hypot(a.mean - b.mean, a.std - b.std)


def nearest(prompt: Gaussian) -> float:
    """The guidance inside R_dm whose student lies nearest to the sampler's pictures."""
    target = sampled(prompt, SAMPLER)
    return float(minimize_scalar(lambda w: distance(student(prompt, w), target), bounds=(1.0, SAMPLER), method="bounded").x)


def main() -> None:
    rows = []
    for std in (0.5, 0.7, 0.85):
        prompt = Gaussian(math.sqrt(OVER_ALL - std**2), std)
        target = sampled(prompt, SAMPLER)
        best = nearest(prompt)
        for w in (SAMPLER, best):
            own = student(prompt, w)
            rows.append([f"{std:g}", *(f"{x:.2f}" for x in (target.mean, target.std, w, own.mean, own.std, distance(own, target)))])
    heads = ["std of a prompt", f"sampler at {SAMPLER:g}: mean", "std", "R_dm at", "student: mean", "std", "distance"]
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
