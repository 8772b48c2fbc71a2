"""Alarms: they come soon after a run has gone wrong, once, and stay silent in runs that have not."""

import math
import warnings

import pytest
import torch
from gaussian_run import FLOW, Run, denoiser_of
from gaussians import D, unflat

from fewstep.alarms import ALARMS, Persistence, Watch
from fewstep.metrics import health
from fewstep.rewards.distribution import DistributionMatching
from fewstep.types import Moments


def found_at(observed):
    persistence = Persistence()
    return next((i + 1 for i, so in enumerate(observed) if persistence.observe(so)), None)


def test_twenty_times_in_a_row_are_found_and_nineteen_are_not():
    assert found_at([True] * 19 + [False]) is None
    assert found_at([True] * 20) == 20
    assert found_at([False] * 50 + [True] * 20) == 70  # what went well before counts for nothing


def test_an_exception_costs_its_likelihood():
    """log(0.4 / 0.05) over log(0.95 / 0.6) is 4.5 times: five more of them make up for one exception."""
    assert found_at([True] * 10 + [False] + [True] * 15) == 26
    assert found_at([True] * 10 + [False] + [True] * 14) is None


def test_what_is_so_half_of_the_time_is_chance():
    generator = torch.Generator().manual_seed(0)
    runs = torch.rand(100, 5000, generator=generator) < 0.5
    assert sum(found_at(run) is not None for run in runs.tolist()) <= 3  # 0.5% are expected


def test_it_is_found_once():
    persistence = Persistence()
    assert sum(persistence.observe(True) for _ in range(200)) == 1


def test_health_of_r_dm_in_closed_form():
    """x0 ~ N(0, s^2) under a teacher of N(0, 1), by both exact denoisers: E (x0 - g xt)^2 for the gain g of each."""
    s, n = 2.0, 20_000
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(n, D, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.full((n,), 0.5, dtype=torch.float64)
    alpha, sigma = float(FLOW.alpha(t[:1])), float(FLOW.sigma(t[:1]))
    teacher, fake = (denoiser_of(lambda v=v: (torch.zeros(D).double(), v * torch.eye(D).double())) for v in (1.0, s**2))
    found = health(
        DistributionMatching(teacher, fake, FLOW).evaluate(unflat(s * x0), {}, torch.arange(n), t=t, noise=unflat(noise)).moments
    )
    gain = [alpha * v / (alpha**2 * v + sigma**2) for v in (1.0, s**2)]
    of_teacher, of_fake = ((1 - g * alpha) ** 2 * s**2 + g**2 * sigma**2 for g in gain)
    assert found["fake_error"] == pytest.approx(of_fake / of_teacher, rel=0.01)
    # the law of a sample's x0 and that of g xt are the same up to their size
    assert found["inflation"] == pytest.approx(s / (gain[0] * math.sqrt(alpha**2 * s**2 + sigma**2)), rel=0.01)


def test_inflation_is_a_geometric_mean():
    moments = Moments(*(torch.tensor(values) for values in ([4.0, 1.0], [1.0, 4.0], [1.0, 1.0], [1.0, 2.0])))
    assert health(moments) == {"fake_error": 1.5, "inflation": 1.0}


def run(trainer, updates):
    """Alarms by the update that raised them."""
    told = {}
    for _ in range(updates):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.step()
        if said:
            (told[trainer.update],) = (str(one.message) for one in said)
    return told


@pytest.mark.parametrize("seed", range(2))
def test_a_clean_run_raises_none(seed):
    """To its end, where student and teacher are the same and either's denoiser is the better one by chance."""
    assert run(Run(seed), 200) == {}


def test_a_fake_that_stays_behind_is_told_and_so_is_where_it_leads():
    trainer = Run(0)
    assert run(trainer, 10) == {}
    trainer.follows = False
    first, second = run(trainer, 60).items()
    assert f"update {first[0]}: the fake of 'dm'" in first[1] and "fake.updates" in first[1] and "last 20 evaluations" in first[1]
    assert f"update {second[0]}: the student's latents" in second[1] and "student.lr" in second[1] and first[0] < second[0]


def test_a_rate_a_hundred_times_too_large_is_told():
    assert ["times as large as what the teacher sees" in alarm for alarm in run(Run(0, lr=10.0), 40).values()] == [True]


def test_a_student_that_collapses_is_told():
    trainer = Run(0)
    trainer.optimizer.step = lambda: None  # it stays where it is put: at a point in the middle
    with torch.no_grad():
        trainer.network.L.mul_(1e-3)
        trainer.network.m.mul_(1e-3)
    assert any("times as large" in alarm for alarm in run(trainer, 25).values())


def test_a_policys_reward_without_differences_is_told():
    watch = Watch({"stars": "policy", "dm": "anchor"})
    told = [alarm for _ in range(30) for alarm in watch.observe({"stars/constant_groups": 0.95, "dm/fake_error": 0.9})]
    assert len(told) == 1 and "'stars'" in told[0] and "95%" in told[0] and "last 20 rollouts" in told[0]
    assert not [alarm for _ in range(60) for alarm in Watch({"stars": "policy"}).observe({"stars/constant_groups": 0.8})]
    assert not [alarm for _ in range(60) for alarm in Watch({"stars": "anchor"}).observe({"stars/constant_groups": 1.0})]


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.key)
def test_an_alarm_is_right_at_its_limits(alarm):
    wrong = {"fake_error": (1.0, 1.2, 1 - 1e-7), "inflation": (0.49, 1.51, 0.0), "constant_groups": (0.9, 1.0)}[alarm.key]
    right = {"fake_error": (0.999,), "inflation": (0.5, 1.0, 1.5), "constant_groups": (0.0, 0.89)}[alarm.key]
    assert all(map(alarm.wrong, wrong)) and not any(map(alarm.wrong, right))


def test_a_run_that_goes_on_counts_on():
    """The alarm comes at the same update in a run that was saved in the middle; where nothing was kept the count begins anew."""
    logs = {"dm/fake_error": 1.1}
    for kept, at in ((True, 8), (False, 20)):
        first, second = Watch({"dm": "anchor"}), Watch({"dm": "anchor"})
        for _ in range(12):
            assert first.observe(logs) == []
        second.load_state(first.state() if kept else {})
        assert [i + 1 for i in range(30) if second.observe(logs)] == [at]
        first.load_state(second.state())
        assert not any(first.observe(logs) for _ in range(30))  # what was told is not told again
