"""A whole run whose fake is exact: the teacher is a Gaussian, the student m + L z, and an update takes milliseconds."""

import torch
from gaussians import Affine, D, flat, spd, unflat, vector

from fewstep.config import Config, ReuseConfig, StudentConfig
from fewstep.denoiser import Denoiser
from fewstep.prompts import Batches
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow
from fewstep.student import Student
from fewstep.trainer import Trainer
from fewstep.types import Term

FLOW = Flow()


def denoiser_of(law):
    """E[x0 | xt] where law() -> (mean, covariance) is what x0 is drawn from now."""

    def network(xt, timestep, cond):
        (mean, cov), t = law(), FLOW.t_of(timestep)
        alpha, sigma = FLOW.alpha(t).to(mean)[:, None], FLOW.sigma(t).to(mean)[:, None]
        marginal = alpha[..., None] ** 2 * cov + sigma[..., None] ** 2 * torch.eye(D, dtype=mean.dtype)
        return unflat(mean + alpha * torch.linalg.solve(marginal, flat(xt).to(mean) - alpha * mean) @ cov)

    return Denoiser(network, FLOW, "sample")


class Run(Trainer):
    """The student starts at N(0, I). `follows`: whether the fake is the student's own denoiser still, or that of when it was set false."""

    def __init__(self, seed, lr=0.1):
        torch.manual_seed(seed)
        teacher = (vector(0).float(), spd(1).float())
        self.network = Affine(torch.zeros(D), torch.eye(D))
        self.law, self.follows = self.law_now(), True
        matching = DistributionMatching(denoiser_of(lambda: teacher), denoiser_of(self.known), FLOW)
        student = Student(Denoiser(self.network, FLOW, "sample"), FLOW, [1.0])
        config = Config(steps=1, student=StudentConfig(lr=lr, decay=0.0), reuse=ReuseConfig(rollout=1))
        super().__init__(
            student, dict(self.network.named_parameters()), {"dm": Term(matching, anchor=True)},
            Batches(["dummy"], groups=16, group_size=8, seed=seed),
            encode=lambda prompts: {}, decode=lambda x0: x0, latent_shapes=[(D, 1, 1)], config=config,
        )  # fmt: skip

    def law_now(self):
        return self.network.m.detach().clone(), (self.network.L @ self.network.L.T).detach().clone()

    def known(self):
        if self.follows:
            self.law = self.law_now()
        return self.law
