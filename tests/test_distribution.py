"""Truths of distribution matching as a reward, in closed form on Gaussians."""

import numpy as np
import pytest
import scipy.stats
import torch
from gaussians import Affine, D, flat, gaussian_denoiser, guided_by, joint_points, marginal, scaled, sigma_points, spd, unflat, vector

from fewstep import losses
from fewstep.denoiser import Denoiser
from fewstep.levels import density_named, noise_levels, rank_in_group
from fewstep.rewards.base import OnlineReward
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import DDPM, Flow
from fewstep.student import Student
from fewstep.types import Sample

COSINE = DDPM(torch.cos(torch.arange(1, 1001, dtype=torch.float64) / 1000 * torch.pi / 2) ** 2)


def parts(schedule, shift=0.0):
    """Teacher N(mu, S_p), student m + L z, fake the student's own density with its mean moved by `shift`."""
    mu, cov_p, m, factor = vector(0), spd(1), vector(2), torch.linalg.cholesky(spd(3))
    student = Affine(m, factor)
    fake = gaussian_denoiser(m + shift, factor @ factor.T, schedule)
    teacher = gaussian_denoiser(mu, cov_p, schedule)
    return mu, cov_p, m, factor, student, teacher, fake


def loss_gradient(schedule, t, shift=0.0):
    """Gradient in (m, L) of the library's own loss, with SNR in place of eq. (5)'s scale, by sigma points."""
    *_, network, teacher, fake = parts(schedule, shift)
    student = Student(Denoiser(network, schedule, "sample"), schedule, [1.0])
    matching = DistributionMatching(teacher, fake, schedule, normalize="none")
    z, eps = joint_points()
    x0 = student.predict(z, 0, {})
    time = torch.full((len(z),), t, dtype=torch.float64)
    result = matching.evaluate(x0.detach(), {}, torch.arange(len(z)), t=time, noise=eps)
    loss = losses.pathwise(x0, result.direction, weight=schedule.snr(time))
    loss.backward()
    # pathwise takes the mean over the D elements of a sample too; the expectation does not
    return network.m.grad * D, network.L.grad * D


@pytest.mark.parametrize("schedule", [Flow(), COSINE], ids=["flow", "ddpm"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_gradient_is_that_of_the_kl(schedule, t):
    mu, cov_p, m, factor, *_ = parts(schedule)
    time = torch.tensor(t, dtype=torch.float64)
    alpha = schedule.alpha(time)
    precision_p, precision_q = (torch.linalg.inv(marginal(c, time, schedule)) for c in (cov_p, factor @ factor.T))
    grad_m, grad_L = loss_gradient(schedule, t)
    torch.testing.assert_close(grad_m, alpha**2 * precision_p @ (m - mu), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_L, alpha**2 * (precision_p - precision_q) @ factor, rtol=1e-10, atol=1e-10)


def test_a_moved_fake_shifts_the_gradient_by_its_own_precision():
    schedule, t, delta = Flow(), 0.6, vector(9)
    _, _, _, factor, *_ = parts(schedule)
    time = torch.tensor(t, dtype=torch.float64)
    moved, exact = loss_gradient(schedule, t, delta)[0], loss_gradient(schedule, t)[0]
    expected = schedule.alpha(time) ** 2 * torch.linalg.inv(marginal(factor @ factor.T, time, schedule)) @ delta
    torch.testing.assert_close(moved - exact, expected, rtol=1e-10, atol=1e-10)


def kl(mean_q, cov_q, mean_p, cov_p):
    """Of Gaussians, (...,); means (..., D), covariances (..., D, D)."""
    inverse = torch.linalg.inv(cov_p)
    gap = (mean_p - mean_q)[..., None]
    trace = (inverse @ cov_q).diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + (gap.mT @ inverse @ gap)[..., 0, 0] - D + torch.logdet(cov_p) - torch.logdet(cov_q))


@pytest.mark.parametrize("levels", [{}, {"level_density": "logit-normal"}, {"level_density": "shifted", "shift": 2.0}], ids=str)
def test_score_is_the_log_density_ratio_between_the_ends(levels):
    """Whatever the density of the levels: (4) divides by it."""
    schedule = Flow()
    mu, cov_p, m, factor, network, teacher, fake = parts(schedule)
    low, high = 0.02, 0.98
    matching = DistributionMatching(teacher, fake, schedule, t_range=(low, high), **levels)
    z, eps = joint_points()
    x0 = network(z, None, None).detach()
    # Gauss-Legendre in log t: the integrand is steep near t_min
    nodes, node_weights = np.polynomial.legendre.leggauss(60)
    edge = np.log(low), np.log(high)
    times = np.exp((nodes + 1) / 2 * (edge[1] - edge[0]) + edge[0])
    total = 0.0
    for t, weight in zip(times, node_weights, strict=True):
        time = torch.full((len(z),), float(t), dtype=torch.float64)
        score = matching.evaluate(x0, {}, torch.zeros(len(z), dtype=torch.long), t=time, noise=eps).score.mean()
        pi = 1 / float(matching.density.spacing(time[:1], (low, high)))
        total += float(score) * pi * t * weight * (edge[1] - edge[0]) / 2
    expected = []
    for t in (low, high):
        time = torch.tensor(t, dtype=torch.float64)
        a = schedule.alpha(time)
        expected.append(-kl(a * m, marginal(factor @ factor.T, time, schedule), a * mu, marginal(cov_p, time, schedule)))
    assert total == pytest.approx(float(expected[0] - expected[1]), rel=1e-6)


def leave_one_out_mean(normalize, leave_one_out, others=3):
    """E over (x0_i, eps_i) of d_i with the rest of the group held fixed, by sigma points; and the others' mean scale."""
    schedule, t = Flow(), 0.5
    *_, network, teacher, fake = parts(schedule)
    z, eps = joint_points()
    generator = torch.Generator().manual_seed(4)
    fixed_z, fixed_eps = (torch.randn(others, *z.shape[1:], dtype=torch.float64, generator=generator) for _ in range(2))
    x0 = network(torch.cat([z, *[fixed_z] * len(z)]), None, None).detach()
    noise = torch.cat([eps, *[fixed_eps] * len(z)])
    group = torch.cat([torch.arange(len(z)), torch.arange(len(z)).repeat_interleave(others)])
    time = torch.full((len(x0),), t, dtype=torch.float64)
    matching = DistributionMatching(teacher, fake, schedule, normalize=normalize, leave_one_out=leave_one_out)
    result = matching.evaluate(x0, {}, group, t=time, noise=noise)
    return flat(result.direction[: len(z)]).mean(0), result.magnitude[len(z) : len(z) + others].mean()


def kl_gradient(t=0.5):
    schedule = Flow()
    mu, cov_p, m, *_ = parts(schedule)
    time = torch.tensor(t, dtype=torch.float64)
    return schedule.alpha(time) ** 2 * torch.linalg.inv(marginal(cov_p, time, schedule)) @ (m - mu) / schedule.snr(time)


def test_leave_one_out_is_an_unbiased_gradient_of_a_weighted_kl():
    mean, scale = leave_one_out_mean("group", True)
    torch.testing.assert_close(-mean, kl_gradient() / scale, rtol=1e-10, atol=1e-10)


def off_the_kl_gradient(normalize, others):
    """1 - cosine of the expected direction and that gradient."""
    mean, _ = leave_one_out_mean(normalize, False, others)
    return 1 - float(torch.nn.functional.cosine_similarity(-mean, kl_gradient(), dim=0))


def test_dmds_scale_is_no_multiple_of_the_kl_gradient_and_a_group_takes_most_of_that_away():
    """As docs/method.md says: a sample's own error has a share of 1/G in its group's mean."""
    dmd, two, four = off_the_kl_gradient("sample", 1), off_the_kl_gradient("group", 1), off_the_kl_gradient("group", 3)
    assert (dmd, two, four) == (pytest.approx(3.4e-4, rel=0.02), pytest.approx(4.5e-5, rel=0.02), pytest.approx(2.1e-5, rel=0.02))


def random_case(normalize, group, **options):
    *_, teacher, fake = parts(Flow())
    generator = torch.Generator().manual_seed(5)
    x0, eps = (torch.randn(len(group), D, 1, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.linspace(0.1, 0.9, len(group), dtype=torch.float64)
    matching = DistributionMatching(teacher, fake, Flow(), normalize=normalize, **options)
    return matching, x0, eps, t


def evaluate(normalize, group, order=None, **options):
    matching, x0, eps, t = random_case(normalize, group, **options)
    if order is None:
        order = torch.arange(len(group))
    return matching.evaluate(x0[order], {}, group[order], t=t[order], noise=eps[order])


def test_group_of_one_is_dmd():
    group = torch.arange(6)
    torch.testing.assert_close(evaluate("group", group).direction, evaluate("sample", group).direction, rtol=0, atol=0)


def test_one_group_is_the_batch():
    group = torch.zeros(7, dtype=torch.long)
    torch.testing.assert_close(evaluate("group", group).direction, evaluate("batch", group).direction, rtol=0, atol=0)


@pytest.mark.parametrize("normalize", ["group", "sample", "batch", "channel", "none"])
def test_order_of_the_batch_does_not_matter(normalize):
    group = torch.tensor([3, 1, 3, 1, 1, 3, 8])
    order = torch.tensor([6, 2, 0, 4, 1, 5, 3])
    torch.testing.assert_close(evaluate(normalize, group).direction[order], evaluate(normalize, group, order).direction)


def test_definition_of_the_scales():
    group = torch.tensor([0, 0, 1, 1])
    raw, (matching, x0, _, t) = evaluate("none", group), random_case("none", group)
    error = x0 - matching.teacher(raw.xt, t, {})
    n = error.abs().flatten(1).mean(1)
    torch.testing.assert_close(raw.magnitude, n)
    expected = raw.direction / torch.stack([n[:2].mean(), n[:2].mean(), n[2:].mean(), n[2:].mean()]).view(-1, 1, 1, 1)
    torch.testing.assert_close(evaluate("group", group).direction, expected)
    square = error.pow(2).flatten(2).mean(2)
    rms = torch.stack([square[:2].mean(0), square[:2].mean(0), square[2:].mean(0), square[2:].mean(0)]).sqrt()
    torch.testing.assert_close(evaluate("channel", group).direction, raw.direction / rms[:, :, None, None])
    weight = (t / ((1 - t) ** 2 + t**2).sqrt()).view(-1, 1, 1, 1)
    torch.testing.assert_close(evaluate("none", group, gamma=0.5).direction, raw.direction / weight**0.5)


def test_a_location_scale_student_arrives_and_a_centred_one_never_leaves():
    """Directions are scaled, never centred: centring deletes what moves the whole group."""

    def distance(centred):
        torch.manual_seed(0)
        mu, cov_p, *_ = parts(Flow())
        network = Affine(vector(2), torch.linalg.cholesky(spd(3)))
        student = Student(Denoiser(network, Flow(), "sample"), Flow(), [1.0])
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        group = torch.arange(64) // 8
        start = float((network.m - mu).detach().norm())
        for _ in range(150):
            fake = gaussian_denoiser(network.m.detach(), (network.L @ network.L.T).detach())
            matching = DistributionMatching(gaussian_denoiser(mu, cov_p), fake, Flow())
            x0 = student.predict(torch.randn(64, D, 1, 1, dtype=torch.float64), 0, {})
            direction = matching.evaluate(x0.detach(), {}, group).direction
            if centred:
                direction = direction - direction.view(8, 8, *direction.shape[1:]).mean(1).repeat_interleave(8, 0)
            optimizer.zero_grad()
            losses.pathwise(x0, direction).backward()
            optimizer.step()
        return float((network.m - mu).detach().norm()) / start

    assert distance(centred=False) < 0.1
    assert distance(centred=True) > 0.9


def test_guidance_pushes_along_the_condition():
    """With guidance w the direction's teacher is D_u + w (D_c - D_u), while the score keeps the conditional one."""
    group = torch.arange(3)
    conditional, unconditional, fake = (gaussian_denoiser(vector(s), spd(s + 1)) for s in (0, 5, 7))
    teacher = guided_by(conditional, unconditional)
    x0, eps = (torch.randn(3, D, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    t, cond = torch.full((3,), 0.4, dtype=torch.float64), {"on": torch.ones(3)}
    plain, guided = (
        DistributionMatching(teacher, fake, Flow(), guidance=w, normalize="none").evaluate(x0, cond, group, t=t, noise=eps)
        for w in (1.0, 3.0)
    )
    difference = conditional(plain.xt, t, {}) - unconditional(plain.xt, t, {})
    torch.testing.assert_close(guided.direction - plain.direction, 2 * difference)
    torch.testing.assert_close(guided.score, plain.score)
    torch.testing.assert_close(plain.direction, conditional(plain.xt, t, {}) - fake(plain.xt, t, {}))
    # what alarms look at: the guided prediction's size, and the errors of the two that are some density's denoiser
    away = (x0, conditional(plain.xt, t, {}) + 2 * difference, x0 - conditional(plain.xt, t, {}), x0 - fake(plain.xt, t, {}))
    for found, value in zip(guided.moments, away, strict=True):
        torch.testing.assert_close(found, flat(value).pow(2).mean(1))


DENSITIES = [density_named("uniform"), density_named("logit-normal"), density_named("shifted"), density_named("shifted", shift=0.5)]
PLACES = ["uniform", "logit-normal", "shifted", "shifted-down"]


@pytest.mark.parametrize("density", DENSITIES, ids=PLACES)
def test_a_density_is_the_derivative_of_its_ranks_and_they_invert(density):
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(density.at(density.rank(t)), t, rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(density.rank(t).sum(), t)
    torch.testing.assert_close(density.slope(t), slope, rtol=1e-8, atol=1e-12)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(density.slope(ends), density.slope((ends - 1e-12).abs()), rtol=1e-8, atol=1e-8)  # no 0 / 0
    ends = density.rank(ends)
    assert ends.tolist() == pytest.approx([0, 1])
    nodes, node_weights = np.polynomial.legendre.leggauss(60)
    at = torch.tensor((nodes + 1) / 2 * 0.6 + 0.1)
    assert float((torch.tensor(node_weights) * 0.3 / density.spacing(at, (0.1, 0.7))).sum()) == pytest.approx(1, rel=1e-10)


def test_the_densities_are_the_named_ones():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z = torch.distributions.Normal(0.0, 1.0).cdf((t / (1 - t)).log())
    torch.testing.assert_close(density_named("logit-normal").rank(t), z)
    wanted = pytest.approx([3 * u / (1 + 2 * u) for u in t.tolist()])
    assert density_named("shifted").at(t).tolist() == wanted
    assert DistributionMatching(None, None, Flow(), level_density="shifted").density.at(t).tolist() == wanted  # the same without a shift
    for bad, word in ((dict(name="cosine"), "uniform, logit-normal, shifted"), (dict(name="shifted", shift=0.0), "positive")):
        with pytest.raises(ValueError, match=word):
            density_named(**bad)


@pytest.mark.parametrize("density", ["uniform", "logit-normal", "shifted"])
def test_levels_may_reach_the_last_one_where_a_schedule_has_signal_there(density):
    """As Stable Diffusion's has."""
    schedule = DDPM((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
    matching, near = (
        DistributionMatching(None, None, schedule, level_density=density, t_range=(0.02, high), score_weight="matching")
        for high in (1.0, 1 - 1e-6)
    )
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(matching.score_coefficient(t), near.score_coefficient(t), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"needs some signal at every noise level, and t = 1.0 has none"):
        DistributionMatching(None, None, Flow(), level_density=density, t_range=(0.02, 1.0), score_weight="matching")


@pytest.mark.parametrize("density", DENSITIES, ids=PLACES)
def test_strata_are_of_equal_probability(density):
    """Member j of G lies in the j-th of G parts that are equally probable; without strata the ranks are uniform."""
    torch.manual_seed(0)
    group, low, high = torch.arange(3).repeat(4), *density.rank(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    for _ in range(5):
        t = noise_levels(group, (0.1, 0.9), "stratified", density)
        place = (density.rank(t) - low) / (high - low)
        assert bool(((t >= 0.1) & (t <= 0.9)).all())
        assert (place * 4).long().tolist() == [j for j in range(4) for _ in range(3)]
    place = (density.rank(noise_levels(torch.arange(4000), (0.1, 0.9), "uniform", density)) - low) / (high - low)
    assert scipy.stats.kstest(place.numpy(), "uniform").pvalue > 0.01


def test_strata_cover_the_range_once_a_group():
    group = torch.tensor([5, 2, 5, 2, 2, 5, 5, 2])
    torch.manual_seed(0)
    for _ in range(20):
        t = noise_levels(group, (0.02, 0.98), "stratified")
        for g in (2, 5):
            strata = ((t[group == g] - 0.02) / 0.96 * 4).long()
            assert sorted(strata.tolist()) == [0, 1, 2, 3]
    rank, size = rank_in_group(group)
    assert rank.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and size.tolist() == [4] * 8
    rank, _ = rank_in_group(torch.arange(60) % 3)  # in the batch's order, where a sort that is not stable loses it
    assert torch.equal(rank, torch.arange(60) // 3)


def test_groups_share_the_strata_out_among_themselves():
    """P groups of G: each of P x G equal parts of the range holds exactly one sample, and which group has which part is drawn anew."""
    torch.manual_seed(0)
    group = torch.tensor([5, 9, 5, 2, 9, 2, 2, 5, 9])  # three groups of three, interleaved
    firsts = set()
    for _ in range(20):
        part = (noise_levels(group, (0.1, 0.7), "stratified") - 0.1) / 0.6 * 9
        assert part.floor().long().sort().values.tolist() == list(range(9))
        firsts.add(int(part[0].floor()))
    assert firsts == {0, 1, 2}  # the first member of its group: always the first third, any place in it


def test_fake_loss_is_smallest_at_the_students_own_density():
    torch.manual_seed(0)
    _, _, m, factor, network, teacher, exact = parts(Flow())
    x0 = network(torch.randn(4000, D, 1, 1, dtype=torch.float64), None, None).detach()
    t, noise = 0.02 + 0.96 * torch.rand(4000, dtype=torch.float64), torch.randn(4000, D, 1, 1, dtype=torch.float64)
    sample = Sample(x0, t, {}, [], torch.arange(4000))

    def loss(fake):
        return float(DistributionMatching(teacher, fake, Flow()).loss(sample, t=t, noise=noise))

    best = loss(exact)
    for shift in (0.1, -0.1):
        assert loss(gaussian_denoiser(m + shift, factor @ factor.T)) > best
        assert loss(gaussian_denoiser(m, (1 + 4 * shift) * factor @ factor.T)) > best


def test_it_is_an_online_reward_and_carries_no_gradient():
    matching, x0, *_ = random_case("group", torch.zeros(4, dtype=torch.long))
    assert isinstance(matching, OnlineReward)
    x0.requires_grad_(True)
    signal = matching(Sample(x0, torch.ones(4), {}, [], torch.zeros(4, dtype=torch.long)))
    assert not signal.direction.requires_grad and not signal.score.requires_grad
    assert signal.direction.shape == x0.shape and signal.score.shape == (4,)


def test_nan_is_named_and_never_replaced():
    bad = Denoiser(lambda xt, timestep, cond: xt * float("nan"), Flow(), "sample")
    good = gaussian_denoiser(vector(0), spd(1))
    x0 = torch.randn(2, D, 1, 1, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="teacher"):
        DistributionMatching(bad, good, Flow()).evaluate(x0, {}, torch.zeros(2, dtype=torch.long))
    with pytest.raises(FloatingPointError, match="fake"):
        DistributionMatching(good, bad, Flow()).evaluate(x0, {}, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"normalize": "grp"}, "normalize"),
        ({"levels": "all"}, "levels"),
        ({"t_range": (0.5, 0.5)}, "t_range"),
        ({"t_range": (0.0, 0.5)}, "t_range"),
        ({"t_range": (-0.5, 0.5)}, "t_range"),
        ({"t_range": (0.5, 1.5)}, "t_range"),
        ({"normalize": "sample", "leave_one_out": True}, "leave_one_out"),
        ({"draws": 2, "leave_one_out": True}, "draws"),
        ({"draws": 0}, "draws"),
    ],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        DistributionMatching(None, None, Flow(), **options)


class Told(torch.nn.Module):
    """A network whose answer depends on all that it is told: the state, the time, the step."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, xt, timestep, cond):
        return self.bias * xt + scaled(torch.ones_like(xt), timestep) / 1000 + scaled(torch.ones_like(xt), cond["step"].double())


V_TARGETS = {
    "v_prediction": lambda x0, eps, a, s: a * eps - s * x0,
    "epsilon": lambda x0, eps, a, s: eps,
    "sample": lambda x0, eps, a, s: x0,
}


def told_case(kind):
    """(matching whose fake predicts `kind` and is told the step, fake's network, sample, t, noise); the teacher predicts something else."""
    network, generator = Told(), torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    t, k = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    teacher = Denoiser(lambda xt, timestep, cond: 0.5 * xt, COSINE, "epsilon" if kind == "sample" else "sample")
    fake = Denoiser(network, COSINE, kind)
    matching = DistributionMatching(teacher, fake, COSINE, step_condition=True, score_weight="matching")
    return matching, network, Sample(x0, t, {}, [""] * 4, torch.zeros(4, dtype=torch.long), k=k), t, noise


def error_by_hand(network, sample, t, noise, kind):
    """(squared error in the network's own parametrisation, elementwise; the prediction; xt)."""
    a, s = (value(t).view(-1, 1, 1, 1) for value in (COSINE.alpha, COSINE.sigma))
    xt = a * sample.x0 + s * noise
    prediction = network(xt, COSINE.timestep_of(t), {"step": sample.k})
    return (prediction - V_TARGETS[kind](sample.x0, noise, a, s)) ** 2, prediction, xt


@pytest.mark.parametrize("kind", V_TARGETS)
def test_the_fake_learns_in_its_own_parametrisation_and_nothing_else_learns(kind):
    matching, network, sample, t, noise = told_case(kind)
    sample.x0.requires_grad_(True)
    loss = matching.loss(sample, t=t, noise=noise)
    square, *_ = error_by_hand(network, sample, t, noise, kind)
    assert loss.item() == pytest.approx(square.mean().item(), rel=1e-12)
    loss.backward()
    assert network.bias.grad.abs() > 0 and sample.x0.grad is None  # the fake's loss must not move the student
    assert matching.module is matching.fake
    torch.manual_seed(0)
    drawn = torch.stack([matching.loss(sample).detach() for _ in range(20)])
    assert bool(torch.isfinite(drawn).all()) and len(drawn.unique()) == 20  # fresh noise every time


def test_what_the_fakes_loss_is_not_given_it_draws():
    matching, _, sample, t, noise = told_case("sample")

    def seeded(given):
        torch.manual_seed(1)
        return matching.loss(sample, **given).item()

    torch.manual_seed(1)
    drawn = matching.draw(sample)
    for given in ((), ("t",), ("noise",), ("t", "noise")):
        assert seeded({name: drawn[name] for name in given}) == seeded(drawn)
    state = torch.get_rng_state()
    matching.loss(sample, t=t, noise=noise)
    assert torch.equal(torch.get_rng_state(), state)  # with both given it draws nothing


@pytest.mark.parametrize("kind", V_TARGETS)
def test_the_lag_by_hand(kind):
    matching, network, old, *_ = told_case(kind)
    new = Sample(old.x0 + 0.5, old.t_k, {}, old.prompts, old.group, k=old.k.flip(0))
    torch.manual_seed(7)
    lag = matching.lag(new, old, kl=True)
    torch.manual_seed(7)
    t = noise_levels(new.group, matching.t_range, "stratified")
    noise, losses_, gaps = torch.randn_like(new.x0), [], []
    a, s = (value(t).view(-1, 1, 1, 1) for value in (COSINE.alpha, COSINE.sigma))
    for sample in (new, old):
        square, prediction, xt = error_by_hand(network, sample, t, noise, kind)
        losses_.append(float(square.mean()))
        clean = {"v_prediction": a * xt - s * prediction, "epsilon": (xt - s * prediction) / a, "sample": prediction}[kind]
        teacher = (xt - s * 0.5 * xt) / a if kind == "sample" else 0.5 * xt
        gap = ((sample.x0 - clean) ** 2 - (sample.x0 - teacher) ** 2).flatten(1).sum(1)
        gaps.append(float((matching.score_coefficient(t) * gap).mean()))
    assert lag.loss == pytest.approx(losses_[0] - losses_[1], rel=1e-10)
    assert lag.kl == pytest.approx(gaps[0] - gaps[1], rel=1e-10)


def test_a_fake_that_is_told_the_step_needs_it():
    matching, _, sample, t, noise = told_case("sample")
    assert matching.evaluate(sample.x0, {}, sample.group, k=sample.k, t=t, noise=noise).direction.shape == sample.x0.shape
    with pytest.raises(ValueError, match="needs k"):
        matching.evaluate(sample.x0, {}, sample.group, t=t, noise=noise)


def test_several_draws_are_averaged_and_their_strata_spread_over_each_sample():
    one, _, sample, *_ = told_case("sample")
    several = DistributionMatching(one.teacher, one.fake, COSINE, step_condition=True, score_weight="matching", draws=3)
    seen, evaluate = [], several.evaluate
    several.evaluate = lambda *inputs, **options: seen.append(evaluate(*inputs, **options)) or seen[-1]
    asked, network = [], several.teacher.network
    several.teacher.network = lambda xt, timestep, cond: asked.append(cond) or network(xt, timestep, cond)
    sample.cond = {"c": torch.arange(4)}
    signal = several(sample)
    assert asked[0]["c"].tolist() == [0, 1, 2, 3] * 3  # each draw with its sample's condition
    result = seen[0]
    strata = ((result.t - 0.02) / 0.96 * 12).long().view(3, 4)  # one group of 4 samples x 3 draws
    assert sorted(strata.flatten().tolist()) == list(range(12))
    assert bool((strata.diff(dim=0) == 4).all())
    torch.testing.assert_close(signal.direction, sum(result.direction.chunk(3)) / 3)
    torch.testing.assert_close(signal.score, sum(result.score.chunk(3)) / 3)
    torch.testing.assert_close(signal.magnitude, sum(result.magnitude.chunk(3)) / 3)
    for mean, each in zip(signal.moments, result.moments, strict=True):
        torch.testing.assert_close(mean, sum(each.chunk(3)) / 3)
    assert signal.xt is None and signal.t is None  # no one place to weigh
    expected = one.evaluate(
        torch.cat([sample.x0] * 3), {}, torch.zeros(12, dtype=torch.long), k=torch.cat([sample.k] * 3), t=result.t,
        noise=(result.xt - scaled(torch.cat([sample.x0] * 3), COSINE.alpha(result.t))) / COSINE.sigma(result.t).view(-1, 1, 1, 1),
    )  # fmt: skip
    torch.testing.assert_close(result.direction, expected.direction)


def test_a_signal_says_where_it_was_taken():
    matching, _, sample, *_ = told_case("sample")
    torch.manual_seed(4)
    signal = matching(sample)
    torch.manual_seed(4)
    found = matching.evaluate(sample.x0, sample.cond, sample.group, k=sample.k)
    for ours, theirs in zip(signal[:-1], (found.score, found.direction, found.xt, found.t, found.magnitude), strict=True):
        assert torch.equal(ours, theirs)
    assert all(map(torch.equal, signal.moments, found.moments))
    assert signal.xt.shape == sample.x0.shape and signal.t.shape == (4,)


def test_renoising_adds_its_noise_and_draws_it_when_none_is_given():
    matching, _, sample, t, noise = told_case("sample")
    found = matching.evaluate(sample.x0, {}, sample.group, k=sample.k, t=t, noise=noise)
    a, s = (value(t).view(-1, 1, 1, 1) for value in (COSINE.alpha, COSINE.sigma))
    torch.testing.assert_close(found.xt, a * sample.x0 + s * noise, rtol=1e-12, atol=0)
    drawn = [matching.evaluate(sample.x0, {}, sample.group, k=sample.k, t=t).xt for _ in range(2)]
    assert not torch.equal(*drawn)


def test_the_channel_scale_averages_over_the_picture():
    matching, _, sample, t, noise = told_case("sample")
    matching.normalize = "none"
    raw = matching.evaluate(sample.x0, {}, sample.group, k=sample.k, t=t, noise=noise)
    matching.normalize = "channel"
    scaled_ = matching.evaluate(sample.x0, {}, sample.group, k=sample.k, t=t, noise=noise)
    error = sample.x0 - matching.teacher(raw.xt, t, {})
    rms = error.pow(2).mean((0, 2, 3)).sqrt().view(1, 2, 1, 1)  # one group
    torch.testing.assert_close(scaled_.direction, raw.direction / rms)


class Paired:
    """A teacher whose conditional and unconditional answers are given."""

    def __init__(self, conditional, unconditional):
        self.answers = conditional, unconditional

    def pair(self, xt, t, cond):
        return self.answers


def test_the_scale_and_the_check_are_of_the_guided_teacher():
    x0 = torch.randn(2, D, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conditional, unconditional, zero = torch.full_like(x0, 2.0), torch.full_like(x0, 1.0), torch.zeros_like(x0)
    fake, group = Denoiser(lambda xt, timestep, cond: zero, Flow(), "sample"), torch.zeros(2, dtype=torch.long)
    found = DistributionMatching(Paired(conditional, unconditional), fake, Flow(), guidance=3.0).evaluate(x0, {}, group)
    torch.testing.assert_close(found.magnitude, (x0 - 4.0).abs().flatten(1).mean(1))  # 1 + 3 (2 - 1)
    with pytest.raises(FloatingPointError, match="teacher"):
        DistributionMatching(Paired(conditional, unconditional * float("nan")), fake, Flow(), guidance=3.0).evaluate(x0, {}, group)


def test_the_weight_of_a_score_at_and_beyond_the_ends_of_its_range():
    low, high = 0.1, 0.9
    matching = DistributionMatching(None, None, Flow(), t_range=(low, high), score_weight="matching")
    t = torch.tensor([0.05, low, 0.37, high, 0.95], dtype=torch.float64)
    # integral of w = (t / (1 - t))^2 from low: t - 1 + 2 log(1 - t) + 1 / (1 - t) up to a constant
    primitive = lambda t: t + 2 * (1 - t).log() + 1 / (1 - t)  # noqa: E731
    inside = t.clamp(low, high)
    expected = (high - low) * Flow().snr_decay(t) * (primitive(inside) - primitive(torch.tensor(low, dtype=torch.float64)))
    torch.testing.assert_close(matching.score_coefficient(t), expected, rtol=1e-5, atol=1e-9)
    assert float(matching.score_coefficient(t[3:4])) == float((high - low) * Flow().snr_decay(t[3:4]) * matching._integral[-1])


def test_sigma_points_integrate_a_quadratic():
    points = sigma_points(3)
    torch.testing.assert_close(points.T @ points / len(points), torch.eye(3, dtype=torch.float64))
    assert unflat(torch.zeros(2, D)).shape == (2, D, 1, 1)


@pytest.mark.parametrize("levels", [{}, {"level_density": "logit-normal"}, {"level_density": "shifted", "shift": 2.0}], ids=str)
def test_the_matching_score_is_the_value_of_the_reward_it_ascends(levels):
    """Eq. (2) with w = pi / SNR, times the range's length, up to the KL left at t_max: E[score] = -integral of w (KL_t - KL_tmax)."""
    schedule, (low, high) = Flow(), (0.02, 0.98)
    mu, cov_p, m, factor, network, teacher, fake = parts(schedule)
    matching = DistributionMatching(teacher, fake, schedule, t_range=(low, high), score_weight="matching", **levels)
    z, eps = joint_points()
    x0, group = network(z, None, None).detach(), torch.zeros(4 * 4, dtype=torch.long)
    nodes, node_weights = np.polynomial.legendre.leggauss(80)
    times = (nodes + 1) / 2 * (high - low) + low

    def divergence(t):
        time = torch.tensor(t, dtype=torch.float64)
        a = schedule.alpha(time)
        return float(kl(a * m, marginal(factor @ factor.T, time, schedule), a * mu, marginal(cov_p, time, schedule)))

    total = expected = 0.0
    for t, weight in zip(times, node_weights, strict=True):
        time = torch.full((len(z),), float(t), dtype=torch.float64)
        score = float(matching.evaluate(x0, {}, group, t=time, noise=eps).score.mean())
        pi = 1 / float(matching.density.spacing(time[:1], (low, high)))
        total += score * pi * weight * (high - low) / 2
        expected -= pi * (high - low) * (t / (1 - t)) ** 2 * (divergence(t) - divergence(high)) * weight * (high - low) / 2
    assert total == pytest.approx(expected, rel=1e-4) and total < 0


def test_matching_scores_are_refused_where_a_level_has_no_signal():
    schedule = Flow()
    *_, teacher, fake = parts(schedule)
    with pytest.raises(ValueError, match="signal"):
        DistributionMatching(teacher, fake, schedule, t_range=(0.1, 1.0), score_weight="matching")
    with pytest.raises(ValueError, match="score_weight must be"):
        DistributionMatching(teacher, fake, schedule, score_weight="both")


def test_a_level_without_noise_is_refused():
    """There the score (4) is infinity times nothing."""
    schedule = Flow()
    *_, teacher, fake = parts(schedule)
    x0 = torch.ones(2, 2, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="t = 0 has none"):
        DistributionMatching(teacher, fake, schedule).evaluate(x0, {}, torch.arange(2), t=torch.tensor([0.5, 0.0]))


def test_lag_is_zero_on_equal_outputs_and_positive_where_the_fake_is_wrong():
    schedule = Flow()
    *_, network, teacher, fake = parts(schedule)
    matching = DistributionMatching(teacher, fake, schedule, score_weight="matching")
    torch.manual_seed(0)
    z = torch.randn(256, D, 1, 1, dtype=torch.float64)
    known = network(z, None, None).detach()
    k = torch.zeros(len(z), dtype=torch.long)

    def sample(x0):
        return Sample(x0, torch.ones(len(z)), {}, [""] * len(z), k)

    same = matching.lag(sample(known), sample(known), kl=True)
    assert same.loss == 0 and same.kl == 0
    assert matching.lag(sample(known), sample(known)).kl is None
    torch.manual_seed(5)
    moved = matching.lag(sample(known + 2.0), sample(known), kl=True)
    assert moved.loss > 0
    torch.manual_seed(5)  # in the score's own unit: the same (t, noise) for both
    t, noise = noise_levels(k, matching.t_range, "stratified"), torch.randn_like(known)
    new, old = (matching.evaluate(x0, {}, k, t=t, noise=noise).score.mean() for x0 in (known + 2.0, known))
    assert moved.kl == pytest.approx(float(new - old), rel=1e-12)
    # where the teacher is the fake, no lag of the one can be told from the other: the control variate takes it away
    assert DistributionMatching(fake, fake, schedule).lag(sample(known + 2.0), sample(known), kl=True).kl == 0


class Plain(torch.nn.Module):
    """Nothing but a denoiser's call."""

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, xt, t, cond, *, guidance=1.0):
        return (self.gain + 0.1 * (guidance - 1)) * (1 + t).view(-1, 1, 1, 1) * xt


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_any_module_that_is_called_as_a_denoiser_is_one(guidance):
    """Held to the `Denoiser` of a network that says x0, here in each case the same."""

    def of(gain):
        def network(xt, timestep, cond):
            return ((gain - cond["empty"]) * (1 + timestep / 1000)).view(-1, 1, 1, 1) * xt

        return Denoiser(network, Flow(), "sample", uncond=EMPTY)

    EMPTY = {"empty": torch.full((1,), 0.1, dtype=torch.float64)}
    cond = {"empty": torch.zeros(4, dtype=torch.float64)}
    x0, noise = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, group = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    kinds = ((Plain, Plain), (Plain, of), (of, Plain), (of, of))
    plain, *mixed, own = (DistributionMatching(teacher(0.5), fake(0.3), Flow(), guidance=guidance) for teacher, fake in kinds)
    for each in (plain, *mixed):
        found, wanted = (flat_of(one.evaluate(x0, cond, group, t=t, noise=noise)) for one in (each, own))
        for value, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, other)
    sample = Sample(x0=x0, t_k=torch.ones(4), cond=cond, prompts=["a"] * 4, group=group)
    assert plain(sample).direction.shape == x0.shape
    for each in (plain, *mixed):
        torch.testing.assert_close(each.loss(sample, t=t, noise=noise), own.loss(sample, t=t, noise=noise))
    plain.loss(sample, t=t, noise=noise).backward()
    assert plain.fake.gain.grad.abs() > 0
    torch.manual_seed(0)
    found = plain.lag(sample, sample, kl=True)
    assert found == (0, 0)


def flat_of(evaluation):
    return [*evaluation[:-1], *evaluation.moments]
