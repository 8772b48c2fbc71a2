"""Three ways to scale one direction, on two-dimensional teachers whose scores are known exactly.

DMD divides each sample's D_teacher - D_fake by the sample's own denoising error, GNDM by its group's mean error (eq. (5)), and
centred GNDM also subtracts the group's mean direction, as one would with a score. Centring fails: it deletes the part that moves
the whole group. The others arrive: alike on the Gaussian, DMD somewhat sooner on the mixture. Trainer, Student and
DistributionMatching are the library's own; only the networks are small.

    python examples/gaussians.py --output gaussians.png

About a minute on one core; needs matplotlib. Exits with 1 when GNDM does not arrive or centred GNDM does.
"""

from __future__ import annotations

import argparse
import copy
import sys

import matplotlib
import torch
from torch import Tensor, nn

from fewstep.config import Config, ReuseConfig, StudentConfig
from fewstep.denoiser import Denoiser
from fewstep.prompts import Batches
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow
from fewstep.student import Student
from fewstep.trainer import Trainer
from fewstep.transforms import group_mean
from fewstep.types import Sample, Signal, Term

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLOW = Flow()
RULES = {"DMD": ("sample", "#0072B2", "-"), "GNDM": ("group", "#009E73", "--"), "centred GNDM": ("group", "#D55E00", ":")}
DRAWN = 2000  # samples that a distance is measured on


class Mixture:
    """A mixture of Gaussians and its exact denoiser. weight (J,), mean (J, 2), cov (J, 2, 2)."""

    def __init__(self, weight: Tensor, mean: Tensor, cov: Tensor):
        self.weight, self.mean, self.cov = weight, mean, cov
        self.variance, self.axes = torch.linalg.eigh(cov)  # along its axes a component stays diagonal at every noise level

    def law(self) -> torch.distributions.Distribution:
        components = torch.distributions.MultivariateNormal(self.mean, self.cov)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(self.weight), components)

    def __call__(self, xt: Tensor, timestep: Tensor, cond: dict) -> Tensor:
        """E[x0 | xt] = sum_j P(j | xt) (m_j + alpha S_j C_j^-1 (xt - alpha m_j)), C = alpha^2 S + sigma^2. xt (B, 2, 1, 1)."""
        alpha, sigma = (value.to(xt).view(-1, 1, 1) for value in noise_of(timestep))
        y = torch.einsum("bjd,jde->bje", xt.flatten(1)[:, None] - alpha * self.mean, self.axes)
        variance = alpha**2 * self.variance + sigma**2
        probability = (self.weight.log() - 0.5 * (y**2 / variance + variance.log()).sum(-1)).softmax(1)  # P(j | xt), (B, J)
        each = self.mean + torch.einsum("bje,jde->bjd", alpha * self.variance / variance * y, self.axes)
        return (probability[..., None] * each).sum(1).view_as(xt)


class Affine(nn.Module):
    """The location-scale student m + L z; it starts at N(0, I)."""

    def __init__(self):
        super().__init__()
        self.m, self.L = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.eye(2))

    def output(self) -> Mixture:
        """What it gives: N(m, L L^T)."""
        return Mixture(torch.ones(1), self.m.detach()[None], (self.L @ self.L.T).detach()[None])

    def forward(self, xt: Tensor, timestep: Tensor, cond: dict) -> Tensor:
        return (self.m + xt.flatten(1) @ self.L.T).view_as(xt)


class Mlp(nn.Module):
    """skip(t) xt + a small network of (xt, t, step) that starts at zero. xt (B, 2, 1, 1) -> (B, 2, 1, 1)."""

    def __init__(self, skip, steps: int = 0, width: int = 64):
        super().__init__()
        self.skip, self.steps = skip, steps
        self.body = nn.Sequential(nn.Linear(4 + steps, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, xt: Tensor, timestep: Tensor, cond: dict) -> Tensor:
        alpha, sigma = (value.to(xt)[:, None] for value in noise_of(timestep))
        x = xt.flatten(1)
        told = [nn.functional.one_hot(cond["step"], self.steps).to(x)] if self.steps else []
        features = torch.cat([x / (alpha**2 + sigma**2).sqrt(), sigma, sigma.log(), *told], 1)
        return (self.skip(alpha, sigma) * x + self.body(features)).view_as(xt)


class Centred:
    """R_dm with each group's mean direction subtracted: right for scores, wrong for directions.

    The gradient of m is then zero in every batch; what still moves m is rounding, which Adam's division makes visible.
    """

    def __init__(self, matching: DistributionMatching):
        self.matching, self.module = matching, matching.module

    def __call__(self, sample: Sample) -> Signal:
        signal = self.matching(sample)
        return signal._replace(direction=signal.direction - group_mean(signal.direction, sample.group))

    def loss(self, sample: Sample) -> Tensor:
        return self.matching.loss(sample)


def noise_of(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), each (B,), of native timesteps (B,)."""
    t = FLOW.t_of(timestep)
    return FLOW.alpha(t), FLOW.sigma(t)


def build(teacher: Mixture, rule: str, seed: int) -> Trainer:
    """One Gaussian: location-scale student, one step, exact fake. A mixture: MLPs, two steps, a fake that is told the step."""
    torch.manual_seed(seed)
    simple = len(teacher.weight) == 1
    times = [1.0] if simple else [1.0, 0.5]
    # the MLPs start as N(0, I): the student gives it at every step, and the fake is its exact denoiser
    network = Affine() if simple else Mlp(lambda alpha, sigma: (alpha**2 + sigma**2) ** -0.5)
    known = (lambda *inputs: network.output()(*inputs)) if simple else Mlp(lambda alpha, sigma: alpha / (alpha**2 + sigma**2), len(times))
    student, fake = Student(Denoiser(network, FLOW, "sample"), FLOW, times), Denoiser(known, FLOW, "sample")
    matching = DistributionMatching(Denoiser(teacher, FLOW, "sample"), fake, FLOW, normalize=RULES[rule][0], step_condition=not simple)
    reward = Centred(matching) if rule.startswith("centred") else matching
    trained = None if simple else dict(fake.named_parameters())
    term = Term(reward, trained, lr=2e-3, updates=4, anchor=True)
    own = StudentConfig(lr=2e-2 if simple else 2e-3, decay=0.0, ema=0.98)
    config = Config(steps=len(times), student=own, reuse=ReuseConfig(rollout=len(times)))  # each state of a rollout serves once
    return Trainer(
        student, dict(student.denoiser.named_parameters()), {"dm": term}, Batches(["dummy"], groups=32, group_size=8, seed=seed),
        encode=lambda prompts: {}, decode=lambda x0: x0, latent_shapes=[(2, 1, 1)], config=config,
    )  # fmt: skip


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| without bias, a and b (N, 2) each."""
    n = len(a)
    return float(2 * torch.cdist(a, b).mean() - (torch.cdist(a, a) + torch.cdist(b, b)).sum() / (n * (n - 1)))


def measure(trainer: Trainer, teacher: Mixture, reference: Tensor) -> tuple[Tensor, float]:
    """The averaged student's samples (DRAWN, 2) and its distance: exact KL(student || teacher) in nats, or the energy distance."""
    judge = copy.deepcopy(trainer.student)
    judge.denoiser.load_state_dict(trainer.averaged())
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(DRAWN, 2, 1, 1, generator=generator)
    x = judge.rollout(noise, {}, generator=generator).x0[-1].flatten(1)
    if len(teacher.weight) > 1:
        return x, energy_distance(x, reference)
    q, p = (one.law().component_distribution for one in (judge.denoiser.network.output(), teacher))
    return x, float(torch.distributions.kl_divergence(q, p))


def train(teacher: Mixture, rule: str, seed: int, updates: int, points: int) -> tuple[Tensor, list[float]]:
    """The finished student's samples (DRAWN, 2) and its distance at the start and `points` times after it."""
    trainer, reference = build(teacher, rule, seed), teacher.law().sample((DRAWN,))
    x, distance = measure(trainer, teacher, reference)
    curve = [distance]
    for update in range(1, updates + 1):
        trainer.step()
        if update % (updates // points) == 0:
            x, distance = measure(trainer, teacher, reference)
            curve.append(distance)
    return x, curve


def teachers() -> dict[str, tuple[str, Mixture]]:
    """By name, the distance it is measured with and the teacher."""
    one = Mixture(torch.ones(1), torch.tensor([[2.0, -1.0]]), torch.tensor([[[1.0, 0.5], [0.5, 0.75]]]))
    covariances = torch.tensor([[[0.25, 0.0], [0.0, 0.25]], [[0.16, 0.0], [0.0, 0.16]], [[0.3, 0.1], [0.1, 0.12]]])
    three = Mixture(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[1.2, -2.0], [3.0, -0.2], [1.2, 1.6]]), covariances)
    return {"Gaussian": ("KL (nats)", one), "mixture": ("energy distance", three)}


def interval(values: Tensor) -> str:
    """Mean [smallest, largest]."""
    return f"{values.mean():.2g} [{values.min():.2g}, {values.max():.2g}]"


def draw(results: dict, updates: dict[str, int], output: str) -> None:
    """Teachers in rows; a column for each rule, and one with distance against updates."""
    figure, axes = plt.subplots(2, 4, figsize=(14, 7.2), layout="constrained", width_ratios=[1, 1, 1, 1.15])
    across, up = torch.linspace(-3.2, 5.2, 160), torch.linspace(-4.2, 4.2, 160)
    grid = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1)
    for row, (name, (unit, teacher)) in zip(axes, teachers().items(), strict=True):
        density = teacher.law().log_prob(grid).exp()
        levels = [float(density.max()) * share for share in (0.02, 0.1, 0.3, 0.6, 1)]
        for ax, (rule, (_, colour, style)) in zip(row[:3], RULES.items(), strict=True):
            x, curves = results[name, rule][0][0], torch.tensor([curve for _, curve in results[name, rule]])
            ax.contourf(across, up, density, levels, colors=["#f2f2f2", "#e2e2e2", "#d0d0d0", "#bbbbbb"])
            ax.contour(across, up, density, levels[:-1], colors="#777777", linewidths=0.7)
            ax.scatter(*x[:1000].T, s=5, alpha=0.5, color=colour, linewidths=0)
            ax.add_patch(plt.Circle((0, 0), 2, fill=False, linestyle="--", color="#555555"))
            ax.plot(*x.mean(0), "X", color=colour, markeredgecolor="white", markersize=12)
            ax.set(title=f"{rule}: {interval(curves[:, -1])}", aspect="equal", xlim=(-3.2, 5.2), ylim=(-4.2, 4.2))
            steps = torch.linspace(0, updates[name], curves.shape[1])
            row[3].plot(steps, curves.mean(0), style, color=colour, linewidth=2, label=rule)
            row[3].fill_between(steps, curves.amin(0), curves.amax(0), color=colour, alpha=0.2, linewidth=0)
        row[0].set_ylabel(f"{name} teacher\nnumbers: {unit}", fontsize=12)
        row[3].set(title=f"{unit} to the teacher", xlabel="student updates", yscale="log")
    axes[0, 3].legend(loc="lower left")
    seeds = len(results["Gaussian", "DMD"])
    figure.suptitle(
        "Grey: the teacher's density. Dots: samples of the student (first seed); X: their mean. Dashed circle: two standard deviations\n"
        f"of the student's start. Numbers and bands: mean [smallest, largest] of {seeds} seed{'s' if seeds > 1 else ''}.",
        fontsize=11,
    )
    figure.savefig(output, dpi=90, pil_kwargs={"optimize": True})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="gaussians.png", help="the picture")
    parser.add_argument("--quick", action="store_true", help="one seed and few updates")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, points = (1, 2) if arguments.quick else (3, 10)
    updates = {"Gaussian": 100, "mixture": 120} if arguments.quick else {"Gaussian": 300, "mixture": 500}

    results, wrong = {}, []
    print(f"{'teacher':10}{'rule':14}{'start':>6}   {'end, mean [smallest, largest]':42}way to the teacher's mean")
    for name, (unit, teacher) in teachers().items():
        mean = teacher.weight @ teacher.mean
        for rule in RULES:
            runs = results[name, rule] = [train(teacher, rule, seed, updates[name], points) for seed in range(seeds)]
            start, end = runs[0][1][0], torch.tensor([curve[-1] for _, curve in runs])
            way = sum(1 - float((x.mean(0) - mean).norm() / mean.norm()) for x, _ in runs) / seeds  # the start's mean is 0
            print(f"{name:10}{rule:14}{start:6.3g}   {unit + ' ' + interval(end):42}{way:.0%}", flush=True)
            if rule == "GNDM" and end.max() > 0.1 * start:
                wrong.append(f"{name}: GNDM should come within a tenth of its start")
            if rule == "centred GNDM" and end.min() < start / 3:
                wrong.append(f"{name}: centred GNDM should stay beyond a third of its start")
    draw(results, updates, arguments.output)
    print("\n".join(wrong) or "GNDM arrives; centred GNDM does not.", f"The picture: {arguments.output}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
