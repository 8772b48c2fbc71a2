"""R_dm: distribution matching as a reward (docs/method.md: R_dm, GNDM)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Prediction, guide, target, to_x0
from fewstep.errors import NumericalError
from fewstep.levels import Density, DensityName, Levels, density_named, noise_levels
from fewstep.losses import denoising
from fewstep.schedule import Schedule, bcast
from fewstep.transforms import group_mean, scale_direction
from fewstep.types import Evaluation, Moments, Sample, Signal

Normalize = Literal["group", "sample", "batch", "channel", "none"]
ScoreWeight = Literal["likelihood", "matching"]


class Lag(NamedTuple):
    """How much worse the fake knows the newest outputs than those it was trained on."""

    loss: float  # in its denoising loss
    kl: float | None  # in the unit of R_dm's score, when asked for


def matching_integral(schedule: Schedule, t_range: tuple[float, float], density: Density) -> Tensor:
    """W_t of score_weight "matching" on an even grid over t_range, float64. Raises ValueError where a noise level has no signal."""
    # trapezoids of w = 1 / SNR on a grid finer than any native timestep
    grid = torch.linspace(*t_range, 4097, dtype=torch.float64)
    # drawn more often is weighed more: against uniform levels, by pi times the length of the range
    w = (t_range[1] - t_range[0]) / density.spacing(grid, t_range) / schedule.snr(grid)
    if not bool(torch.isfinite(w).all()):
        raise ValueError(
            f"score_weight='matching' needs some signal at every noise level, and t = {t_range[1]} has none: end t_range below it"
        )
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(w, grid)])


class DistributionMatching:
    """An OnlineReward from a frozen teacher and a fake that learns the student's own distribution.

    teacher, fake: each a `Denoiser`, or any module called as one, (xt, t, cond, *, guidance) -> x0.
    guidance: the teacher's scale; None: each sample's own, cond["guidance"] (B,), the same for all of a group.
    direction: d_i = (D_teacher - D_fake)(xt_i) / scale, eq. (5), with D_teacher guided by `guidance` and the scale
        group    mean over the group of n_j = mean |x0_j - D_teacher(xt_j)|   (GNDM)
        sample   the sample's own n_i                                         (DMD, arXiv 2311.18828)
        batch    mean over the batch
        channel  per channel, RMS over the group of x0 - D_teacher
        none     1
      times n(t)^-gamma, with n(t) = sigma / sqrt(alpha^2 + sigma^2) the denoising scale of unit-variance data at that level:
      gamma = 0 keeps the raw size of the difference over noise levels, gamma = 1 evens it out.
    levels: how a group's t are drawn; level_density, shift: where on t_range, here and in the fake's training. A level that is drawn
      more often weighs more in what the direction ascends.
    score: one draw of eq. (4), from the unguided conditional teacher, and
        score_weight "likelihood"  W = 1: log p/q of x0, whose draws at low noise are huge
                     "matching"    W_t = integral of w from t_min to t, for the w ~ pi / SNR of a direction that keeps its raw size
                                   over noise levels: the value of (2) that the direction ascends (up to the group's scale), and
                                   steady, since -1/2 dSNR/dt W_t stays bounded where W = 1 explodes

    draws: noise levels and noises at which each sample is compared, by calling it; a group's scale and its strata are over all of them.

    With `step_condition` the fake is told which of the student's K steps made the sample (cond["step"]).
    """

    def __init__(
        self,
        teacher: Denoiser,
        fake: Denoiser,
        schedule: Schedule,
        *,
        guidance: float | None = 1.0,
        normalize: Normalize = "group",
        leave_one_out: bool = False,
        gamma: float = 0.0,
        t_range: tuple[float, float] = (0.02, 0.98),
        levels: Levels = "stratified",
        level_density: DensityName = "uniform",
        shift: float = 3.0,
        step_condition: bool = False,
        score_weight: ScoreWeight = "likelihood",
        draws: int = 1,
    ):
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")
        if levels not in get_args(Levels):
            raise ValueError(f"levels must be one of {', '.join(get_args(Levels))}, got {levels!r}")
        if not 0 < t_range[0] < t_range[1] <= 1:
            raise ValueError(f"t_range must satisfy 0 < low < high <= 1, got {t_range}")
        if leave_one_out and normalize not in ("group", "batch"):
            raise ValueError(f"leave_one_out needs a scale shared by several samples: normalize='group' or 'batch', not {normalize!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        if leave_one_out and draws > 1:
            raise ValueError("leave_one_out needs draws=1: another draw of the same sample is not another sample")
        self.teacher, self.fake, self.schedule, self.draws = teacher, fake, schedule, draws
        self.guidance, self.normalize, self.leave_one_out, self.gamma = guidance, normalize, leave_one_out, gamma
        self.t_range, self.levels, self.step_condition = (float(t_range[0]), float(t_range[1])), levels, step_condition
        self.density = density_named(level_density, shift=shift)
        if score_weight not in get_args(ScoreWeight):
            raise ValueError(f"score_weight must be one of {', '.join(get_args(ScoreWeight))}, got {score_weight!r}")
        self.score_weight = score_weight
        if score_weight == "matching":
            self._integral = matching_integral(schedule, self.t_range, self.density)
        self.module = fake

    def score_coefficient(self, t: Tensor) -> Tensor:
        """(1 / pi(t)) (-1/2 dSNR/dt) W_t of eq. (4), pi the density of the levels on t_range. t (B,) float64 -> (B,)."""
        low, high = self.t_range
        coefficient = self.density.spacing(t, self.t_range) * self.schedule.snr_decay(t)
        if self.score_weight == "likelihood":
            return coefficient
        place = ((t.double() - low) / (high - low)).clamp(0, 1) * (len(self._integral) - 1)
        index = place.floor().long().clamp(max=len(self._integral) - 2)
        integral = self._integral.to(t.device)
        return coefficient * (integral[index] + (place - index) * (integral[index + 1] - integral[index])).to(coefficient)

    def noise_levels(self, group: Tensor, levels: Levels) -> Tensor:
        """Times (B,) float64 in this object's range, of its density."""
        return noise_levels(group, self.t_range, levels, self.density)

    def fake_cond(self, cond: Any, k: Tensor | None) -> Any:
        if not self.step_condition:
            return cond
        if k is None:
            raise ValueError("a fake conditioned on the step needs k, the index of the step that made each sample")
        return {**cond, "step": k}

    def fake_prediction(self, xt: Tensor, t: Tensor, sample: Sample) -> tuple[Tensor, Prediction]:
        """(what the fake's network says of a sample renoised to xt (B, C, H, W) at t (B,), which kind that is); x0 where the fake has only
        a denoiser's call."""
        cond = self.fake_cond(sample.cond, sample.k)
        if hasattr(self.fake, "predict"):
            return self.fake.predict(xt, t, cond), self.fake.prediction
        return self.fake(xt, t, cond), "sample"

    @torch.no_grad()
    def evaluate(
        self, x0: Tensor, cond: Any, group: Tensor, *, k: Tensor | None = None, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Evaluation:
        """Direction and score of R_dm at x0 (B, C, H, W) from the same network calls: one of the teacher, one of the fake.

        Given t (B,) and noise (B, C, H, W) it is deterministic; otherwise both are drawn. No gradient flows: eq. (3) is
        already the gradient in x0, and the dependence of q on the student adds nothing (E_q[grad log q] = 0). Raises ValueError for
        a t without noise, where (4) has no value, and NumericalError where a network predicts what is not finite.
        """
        if t is not None and not bool((self.schedule.sigma(t) > 0).all()):
            raise ValueError(f"R_dm needs some noise at every level, and t = {t.min().item():g} has none")
        t = self.noise_levels(group, self.levels) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        xt = self.schedule.noised(x0, t, noise)
        scale = cond["guidance"] if self.guidance is None else self.guidance
        if self.guidance == 1.0:
            conditional = guided = self.teacher(xt, t, cond)
        elif hasattr(self.teacher, "pair"):  # both from one network call
            conditional, unconditional = self.teacher.pair(xt, t, cond)
            guided = guide(conditional, unconditional, scale)
        else:
            conditional, guided = self.teacher(xt, t, cond), self.teacher(xt, t, cond, guidance=scale)
        fake = self.fake(xt, t, self.fake_cond(cond, k))
        for name, value in (("teacher", guided), ("fake", fake)):
            if not bool(torch.isfinite(value).all()):
                raise NumericalError(f"the {name}'s prediction holds NaN or inf")

        error = x0 - guided
        magnitude = error.abs().flatten(1).mean(1)
        direction = self.scale(guided - fake, error, magnitude, group)  # towards the teacher, away from the fake: eq. (3)
        if self.gamma:
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            direction = direction * bcast((sigma / (alpha**2 + sigma**2).sqrt()) ** -self.gamma, direction)

        moments = Moments(*(value.square().flatten(1).mean(1) for value in (x0, guided, x0 - conditional, x0 - fake)))
        return Evaluation(xt, t, direction, self.score(x0, fake, conditional, t), magnitude, moments)

    def score(self, x0: Tensor, fake: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
        """One draw of eq. (4), (B,), from both denoisers' x0 (B, C, H, W) at times t (B,)."""
        # log p - log q, so the error of q's own denoiser enters with a plus
        gap = ((x0 - fake) ** 2 - (x0 - teacher) ** 2).flatten(1).sum(1)
        return self.score_coefficient(t).to(gap) * gap

    def scale(self, difference: Tensor, error: Tensor, magnitude: Tensor, group: Tensor) -> Tensor:
        if self.normalize == "none":
            return difference
        if self.normalize == "sample":
            return scale_direction(difference, magnitude, torch.arange(len(group), device=group.device))
        if self.normalize == "batch":
            return scale_direction(difference, magnitude, torch.zeros_like(group), leave_one_out=self.leave_one_out)
        if self.normalize == "channel":
            square = group_mean(error.pow(2).flatten(2).mean(2), group)  # (B, C): averaged over the group, then rooted
            return scale_direction(difference, square.sqrt(), torch.arange(len(group), device=group.device))
        return scale_direction(difference, magnitude, group, leave_one_out=self.leave_one_out)

    def __call__(self, sample: Sample) -> Signal:
        """Score and direction of each sample, the mean over its `draws`; xt and t only where one draw says where that was."""
        n = self.draws
        if n == 1:
            return Signal(**self.evaluate(sample.x0, sample.cond, sample.group, k=sample.k)._asdict())
        # draw by draw, so that the strata of a group, counted in this order, spread each sample's draws over the range
        cond = {key: torch.cat([value] * n) for key, value in sample.cond.items()}
        k = None if sample.k is None else torch.cat([sample.k] * n)
        result = self.evaluate(torch.cat([sample.x0] * n), cond, torch.cat([sample.group] * n), k=k)
        score, magnitude, *moments = (value.view(n, -1).mean(0) for value in (result.score, result.magnitude, *result.moments))
        return Signal(score, result.direction.unflatten(0, (n, -1)).mean(0), magnitude=magnitude, moments=Moments(*moments))

    def draw(self, sample: Sample) -> dict[str, Tensor]:
        """Times t (B,), stratified over the batch in a random order, and noise (B, C, H, W) for the fake's loss."""
        t = self.noise_levels(torch.zeros_like(sample.group), "stratified")[torch.randperm(len(sample.group))]
        return {"t": t, "noise": torch.randn_like(sample.x0)}

    def loss(self, sample: Sample, *, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The fake's denoising loss on the student's outputs, in the fake's own parametrisation."""
        x0 = sample.x0.detach()
        if t is None or noise is None:
            drawn = self.draw(sample)
            t, noise = drawn["t"] if t is None else t, drawn["noise"] if noise is None else noise
        prediction, kind = self.fake_prediction(self.schedule.noised(x0, t, noise), t, sample)
        return denoising(prediction, target(x0, noise, self.schedule.alpha(t), self.schedule.sigma(t), kind))

    @torch.no_grad()
    def known(self, sample: Sample, xt: Tensor, t: Tensor, noise: Tensor, *, teacher: Tensor | None) -> tuple[float, float | None]:
        """(the fake's loss on a sample renoised to xt (B, C, H, W) at t (B,), the mean score there by that same pass of the fake).

        teacher: its unguided x0 (B, C, H, W) at xt, without which there is no score.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        prediction, kind = self.fake_prediction(xt, t, sample)
        loss = float(denoising(prediction, target(sample.x0, noise, alpha, sigma, kind)))
        if teacher is None:
            return loss, None
        return loss, float(self.score(sample.x0, to_x0(prediction, xt, alpha, sigma, kind), teacher, t).mean())

    @torch.no_grad()
    def lag(self, new: Sample, old: Sample, *, kl: bool = False) -> Lag:
        """The fake's held-out error on the newest outputs minus its error on those it was trained on, at the same (t, noise).

        new and old are of one size.

        kl: also in the unit of the score, two more calls of the teacher: its own error on each output is subtracted, since how hard
        an output is to denoise varies far more between batches than how well the fake knows it.
        """
        t = self.noise_levels(torch.zeros_like(new.group), "stratified")
        noise = torch.randn_like(new.x0)
        losses, gaps = [], []
        for sample in (new, old):
            xt = self.schedule.noised(sample.x0, t, noise)
            loss, score = self.known(sample, xt, t, noise, teacher=self.teacher(xt, t, sample.cond) if kl else None)
            losses.append(loss)
            gaps.append(score)
        return Lag(losses[0] - losses[1], gaps[0] - gaps[1] if kl else None)
