"""The adaptive weight, eq. (7): one dual variable for one fidelity budget."""

import json
import math
import warnings
from pathlib import Path

import pytest

from fewstep.config import WeightsConfig
from fewstep.weights import Adaptive, Fixed, dual_step


def test_the_weight_grows_below_the_budget_and_shrinks_above():
    assert dual_step(0.0, 0.5, 1.0, eta=0.2, cap=10) == pytest.approx(0.1)
    assert dual_step(0.0, 1.0, 1.0, eta=0.2, cap=10) == 0
    assert dual_step(0.0, 1.5, 1.0, eta=0.2, cap=10) == pytest.approx(-0.1)
    assert dual_step(0.0, 99.0, 1.0, eta=0.2, cap=10) == pytest.approx(-0.2)  # clipped
    assert dual_step(0.0, -99.0, 1.0, eta=0.2, cap=10) == pytest.approx(0.2)
    assert dual_step(math.log(10), 0.0, 1.0, eta=0.2, cap=10) == math.log(10)


def test_shares_are_of_one_weight():
    weights = Adaptive({"a": 3.0, "b": 1.0}, budget=1.5, warmup=1)
    assert weights.now() == {"a": 0.0, "b": 0.0}
    weights.observe(-2.0, None)
    now = weights.now()
    assert now["a"] == pytest.approx(3 * now["b"]) and sum(now.values()) == pytest.approx(weights.now_total()) and now["a"] > 0
    assert weights.b == pytest.approx(3.0)


def test_the_warm_up_measures_the_mean_kl_and_the_lag_corrects_it():
    weights = Adaptive({"a": 1.0}, budget=2.0, warmup=4)
    for score in (-1.0, -2.0, -3.0):
        weights.observe(score, None)
        assert weights.now_total() == 0 and weights.b is None
    weights.observe(-4.0, None)
    assert weights.b == pytest.approx(2 * 2.5)  # the plain mean of the warm-up
    lagging = Adaptive({"a": 1.0}, budget=2.0, warmup=1)
    assert lagging.observe(-1.0, 0.5)["kl"] == pytest.approx(1.5)


def test_the_weight_never_grows_while_the_fake_lags():
    weights = Adaptive({"a": 1.0}, budget=1.0, warmup=1, lag_limit=0.5)
    weights.observe(-1.0, 0.0)
    weights.lag, weights.kl = 0.6, 0.0
    before = weights.log_weight
    weights.observe(-0.0, None)
    assert weights.log_weight == before
    weights.kl = 5.0  # but it may shrink
    weights.observe(-5.0, None)
    assert weights.log_weight < before


@pytest.mark.filterwarnings("ignore:the KL to the teacher")  # it falls to nothing here
def test_what_a_lagging_fake_withholds_is_not_made_up_for_later():
    weights = Adaptive({"a": 1.0}, budget=1.0, warmup=1, eta=0.1)
    weights.observe(-1.0, 0.0)
    weights.lag, weights.kl = 0.6, 0.0
    for _ in range(50):
        weights.observe(-0.0, None)
    weights.lag = 0.0
    weights.observe(-0.0, None)
    assert weights.log_weight == pytest.approx(math.log(weights.start) + 0.1 * (1 + 20))  # one step and its lead


def test_the_lag_is_a_running_mean_that_starts_at_its_first_value():
    weights = Adaptive({"a": 1.0}, budget=2.0, warmup=50)
    weights.observe(-1.0, None)  # no lag before the second rollout
    for lag, mean in ((4.0, 4.0), (9.0, 5.0), (None, 5.0), (0.0, 4.0)):
        assert weights.observe(-1.0, lag)["kl"] == pytest.approx(1.0 + mean)


@pytest.mark.parametrize("lag, grows", [(1.9, True), (2.1, False)])
def test_the_limit_of_the_lag_is_a_share_of_the_budget(lag, grows):
    weights = Adaptive({"a": 1.0}, budget=1.0, warmup=1, lag_limit=0.5)
    weights.observe(-4.0, None)  # b = 4
    weights.lag, weights.kl, before = lag, 0.0, weights.log_weight
    weights.observe(-0.0, None)
    assert (weights.log_weight > before) == grows


@pytest.mark.filterwarnings("ignore:the KL to the teacher")  # it falls to nothing here
def test_the_cap_is_logged():
    weights = Adaptive({"a": 1.0}, budget=1.0, warmup=1, cap=0.1)
    assert weights.observe(-1.0, None)["weight_at_cap"] == 0
    for _ in range(100):
        logs = weights.observe(-0.0, None)
    assert logs["weight_at_cap"] == 1 and logs["weight"] == pytest.approx(0.1)


def test_its_defaults_are_those_a_run_is_told():
    config, weights = WeightsConfig(), Adaptive({"a": 1.0}, budget=1.5, warmup=1)
    assert (weights.eta, weights.cap, weights.lag_limit) == (config.eta, config.cap, config.lag_limit)


def test_a_budget_below_what_can_be_reached_and_a_kl_without_a_sign_are_refused():
    for budget in (0.9, math.nan):
        with pytest.raises(ValueError, match="at least 1"):
            Adaptive({"a": 1.0}, budget=budget, warmup=1)
    with pytest.raises(ValueError, match="shares"):
        Adaptive({"a": 0.0}, budget=1.5, warmup=1)
    for nothing in ({}, {"a": -1.0, "b": 2.0}):
        with pytest.raises(ValueError, match="shares"):
            Adaptive(nothing, budget=1.5, warmup=1)
    assert Adaptive({"a": 0.5, "b": 0.0}, budget=1.5, warmup=1).shares == {"a": 1.0, "b": 0.0}
    for cap in (0.01, 0.05):  # there it would stand from the first step on
        with pytest.raises(ValueError, match=r"cap must be above 0\.05"):
            Adaptive({"a": 1.0}, budget=1.5, warmup=1, cap=cap)
    for score in (0.3, 0.0):
        with pytest.raises(FloatingPointError, match="1 evaluations of weights"):
            Adaptive({"a": 1.0}, budget=1.5, warmup=1).observe(score, None)


@pytest.mark.parametrize("score, lag", [(math.nan, None), (-math.inf, 0.0), (-1.0, math.nan)])
def test_what_is_not_finite_is_refused_before_a_running_mean_keeps_it(score, lag):
    weights = Adaptive({"a": 1.0}, budget=1.5, warmup=1)
    weights.observe(-1.0, 0.0)
    before = weights.state()
    with pytest.raises(FloatingPointError, match="cannot be followed"):
        weights.observe(score, lag)
    assert weights.state() == before


def test_fixed_weights_are_those_given_whatever_is_observed():
    weights = Fixed({"a": 0.3})
    assert weights.observe(-5.0, 1.0) == {} and weights.now() == {"a": 0.3} and weights.state() == {}


def test_what_it_measures_is_no_argument():
    """A fresh one has measured nothing, and starts with its sum of errors where the weight starts."""
    weights = Adaptive({"a": 1.0}, budget=1.5, warmup=1, start=0.2)
    assert weights.log_weight == weights.integral == math.log(0.2) and weights.told is weights.outgrown.found is False
    assert weights.kl is weights.lag is weights.b is None
    for name in ("observed", "log_weight", "integral", "kl", "lag", "b", "told", "outgrown"):
        with pytest.raises(TypeError, match=name):
            Adaptive({"a": 1.0}, budget=1.5, warmup=1, **{name: getattr(weights, name)})


def test_state_round_trip_goes_on_alike():
    one = Adaptive({"a": 1.0}, budget=1.2, warmup=3)
    for i in range(5):
        one.observe(-1.0 - 0.1 * i, 0.05)
    two = Adaptive({"a": 1.0}, budget=1.2, warmup=3)
    two.load_state(one.state())
    assert one.observe(-1.3, 0.01) == two.observe(-1.3, 0.01) and one.now() == two.now()


@pytest.mark.parametrize("share, says", [(0.5, "Raise weights.warmup"), (30.0, "they do not push any more")])
def test_alarms_go_on_across_a_resume_and_come_once(share, says):
    """As of a run that never stopped: at the same update, and not again after it."""
    found = {}
    for parts in (1, 2):
        weights = Adaptive({"a": 1.0}, budget=1.5, warmup=1)
        weights.observe(-10.0, None)
        weights.kl = 10 * share
        heard = found[parts] = []
        for update in range(120):
            if parts > 1 and update % 7 == 3:
                state, weights = json.loads(json.dumps(weights.state())), Adaptive({"a": 1.0}, budget=1.5, warmup=1)
                weights.load_state(state)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                weights.observe(-10 * share, None)
            heard += [(update, str(one.message)) for one in said]
    assert found[1] == found[2] and len(found[1]) == 1 and says in found[1][0][1]


def test_a_state_that_lacks_something_is_refused_by_its_name():
    one = Adaptive({"a": 1.0}, budget=1.2, warmup=3)
    state = one.state()
    for key in state:
        with pytest.raises(KeyError, match=key):
            one.load_state({name: value for name, value in state.items() if name != key})


def test_on_a_gaussian_the_weight_settles_at_its_budget():
    """Under the tilt lambda a, the optimum lies at m(lambda) = c lambda a, where KL = kl_0 + |m|^2 / 2.

    The student follows the gradient of beta KL - lambda a.m, one small step an update; the dual variable must bring KL to b.
    """
    for pull in (0.3, 1.0, 4.0):  # rewards of different strength
        weights = Adaptive({"a": 1.0}, budget=1.5, warmup=50, eta=0.05)
        m, kl_0, tail = 0.0, 0.8, []
        for update in range(4000):
            kl = kl_0 + 0.5 * m * m
            weights.observe(-kl, None)
            m += 0.05 * (-m + weights.now_total() * pull)
            if update >= 3000:
                tail.append(kl)
        assert abs(sum(tail) / len(tail) / weights.b - 1) < 0.1 and max(tail) / weights.b < 1.1
        assert weights.log_weight < math.log(weights.cap)
        assert weights.now_total() * pull == pytest.approx(math.sqrt(2 * (weights.b - kl_0)), rel=0.1)


def test_the_weight_follows_the_errors_of_the_updates_themselves():
    """The mean is late; with the lead the log weight is eta times the sum of the errors, not of their late mean."""
    weights = Adaptive({"a": 1.0}, budget=2.0, warmup=100, eta=0.1)
    for _ in range(100):
        weights.observe(-1.0, None)
    assert weights.log_weight == pytest.approx(math.log(weights.start) + 0.1 * (1 + 20) * 0.5)  # the first error, and the lead
    before, total = weights.log_weight, 0.0
    for n in range(60):
        kl = 2.0 + math.sin(n / 4)  # of a budget of 2
        weights.observe(-kl, None)
        total += 1 - kl / 2.0
        late = 0.5 * 0.95 ** (n + 1)  # what the mean still remembers of the warm-up's error
        assert weights.log_weight - before == pytest.approx(0.1 * (total + late - 0.5 * 0.95), abs=0.03)
    assert weights.log_weight - before < weights.integral - math.log(weights.start) - 0.5


@pytest.mark.parametrize("pull", [0.3, 1.0])
def test_with_its_lead_the_weight_does_not_swing_around_the_budget(pull):
    """A student that answers a weight within some twelve updates; the sum of the errors alone overshoots."""
    highest = {}
    for what in ("log_weight", "integral"):
        weights, kl, seen = Adaptive({"a": 1.0}, budget=1.3, warmup=60, eta=0.2), 10.0, []
        for _ in range(300):
            weights.observe(-kl, None)
            pushed = math.exp(getattr(weights, what)) if weights.b else 0.0
            kl += (10.0 * (1 + pull * pushed) - kl) / 12
            seen.append(kl / (weights.b or math.inf))
        highest[what] = max(seen)
        assert seen[-1] == pytest.approx(1, abs=0.04)
    assert highest["log_weight"] < 1.01 and highest["integral"] > 1.08


def test_a_budget_out_of_reach_is_told_once():
    """A KL that no weight can bring under the budget takes the weight to nothing, which would look like a reward that does not help."""
    weights = Adaptive({"a": 1.0}, budget=1.0, warmup=1)
    weights.observe(-1.0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            weights.observe(-1.6, None)
    with pytest.warns(UserWarning, match=r"stays above its budget 1 .*Raise weights.budget") as told:
        for _ in range(200):
            weights.observe(-1.6, None)
    assert len(told) == 1


@pytest.mark.parametrize("share, told", [(0.99, 0), (0.999, 0), (1.001, 1), (1.01, 1)])
def test_a_budget_is_out_of_reach_once_the_weight_is_a_hundredth_of_its_start(share, told):
    weights = Adaptive({"a": 1.0}, budget=1.0, warmup=1)
    weights.observe(-1.0, None)
    eta = weights.eta * (1 + 1 / (1 - weights.decay))  # of the sum and its lead, for a KL beyond the clip
    weights.kl = 100.0
    weights.integral = weights.log_weight = math.log(weights.start) - share * math.log(100) + eta
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        weights.observe(-100.0, None)
    assert weights.log_weight == pytest.approx(math.log(weights.start) - share * math.log(100)) and len(found) == told
    assert all(Path(each.filename) == Path(__file__) for each in found)  # it points at who observes, not into the library


@pytest.mark.filterwarnings("ignore:.*stays above its budget")
def test_a_weight_that_has_moved_nothing_for_long_comes_back_as_after_a_short_while():
    back = []
    for above in (200, 2000):
        weights = Adaptive({"a": 1.0}, budget=1.0, warmup=1)
        weights.observe(-1.0, None)
        for _ in range(above):
            weights.observe(-1.3, None)
        assert weights.told and weights.integral == math.log(weights.start) - math.log(100)
        updates = 0
        while weights.now_total() < 0.1:
            weights.observe(-0.7, None)
            updates += 1
        back.append(updates)
    assert back[0] == back[1] < 200


@pytest.mark.parametrize("budget", [1.0, 1.5])
@pytest.mark.parametrize("share, told", [(0.61, 0), (0.59, 1)])
def test_a_budget_that_matching_has_left_behind_is_told_once(budget, share, told):
    """Taken while the KL still fell, it would let other rewards go as far as the student had come from."""
    weights = Adaptive({"a": 1.0}, budget=budget, warmup=1)
    weights.observe(-10.0, None)
    weights.kl = 10 * share
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a mean of twenty updates may be off for some
        for _ in range(19):
            weights.observe(-10 * share, None)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(20):
            weights.observe(-10 * share, None)
    assert len(found) == told
    for each in found:
        assert f"{10 * share:.3g}, has fallen to {share:.0%}" in str(each.message) and "Raise weights.warmup" in str(each.message)
        assert Path(each.filename) == Path(__file__)


def test_the_lag_counts_where_a_budget_is_left_behind():
    weights = Adaptive({"a": 1.0}, budget=1.5, warmup=1)
    weights.observe(-5.0, 5.0)
    weights.kl = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            weights.observe(-1.0, 5.5)
