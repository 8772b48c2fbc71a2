"""Advantages, weights and projections over groups."""

import pytest
import torch

from fewstep.transforms import advantages, group_rms, modulate, project, pull, weigh

GROUP = torch.tensor([3, 7, 3, 7, 7, 0])  # unequal, in no order
SHAPE = (2, 3, 3)


def random(seed=0, dtype=torch.float64):
    return torch.randn(len(GROUP), *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def plain_rms(direction):
    return torch.stack([direction[g == GROUP].pow(2).mean().sqrt() for g in GROUP])


def test_advantages_by_hand():
    score = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0, 5.0], dtype=torch.float64)
    std = torch.tensor([2.0, 4.0, 9.0], dtype=torch.float64).std(unbiased=False)
    wide = 1 / (std + 0.1)
    expected = torch.tensor([-1 / 1.1, -3 * wide, 1 / 1.1, -1 * wide, 4 * wide, 0.0], dtype=torch.float64)
    torch.testing.assert_close(advantages(score, GROUP, eps=0.1), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(advantages(score, GROUP), advantages(score, GROUP, eps=1e-4))


@pytest.mark.parametrize("size", [1, 6, 7])
@pytest.mark.parametrize("value", [0.1, 1e8 / 3, -7.7])
def test_a_constant_group_has_no_advantage(size, value):
    for dtype in (torch.float32, torch.float64):
        out = advantages(torch.full((size,), value, dtype=dtype), torch.zeros(size, dtype=torch.long))
        assert torch.equal(out, torch.zeros(size, dtype=dtype)) and out.dtype == dtype


def test_shifts_do_nothing_and_order_does_not_matter():
    score = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0, 5.0], dtype=torch.float64)
    base = advantages(score, GROUP)
    assert torch.equal(advantages(score + 2.0**20, GROUP), base)  # a shift that rounds nothing
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    torch.testing.assert_close(advantages(score[order], GROUP[order]), base[order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_touches_its_own_sample_alone(bad):
    score = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0, 5.0], dtype=torch.float64)
    others = torch.arange(6) != 3
    broken = score.masked_fill(~others, bad)
    out = advantages(broken, GROUP)
    assert torch.isnan(out[3])
    assert torch.equal(out[others], advantages(score[others], GROUP[others]))
    assert bool(torch.isnan(advantages(torch.full((6,), bad), GROUP)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_size_of_score_overflows(dtype):
    """As of a black box that says of a picture which it cannot read the smallest number there is: its squares are inf."""
    most, group = torch.finfo(dtype).max, torch.zeros(4, dtype=torch.long)
    for low in (-most, -(most**0.8)):
        score = torch.tensor([low, 0.2, 0.5, 0.9], dtype=dtype)
        expected = torch.tensor([-(3**0.5), *[3**-0.5] * 3], dtype=dtype)
        torch.testing.assert_close(advantages(score, group), expected, rtol=4e-3 if dtype == torch.float16 else 1e-6, atol=0)
    ends = torch.tensor([-most, most, -most, most], dtype=dtype)
    torch.testing.assert_close(advantages(ends, group), torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=dtype))
    assert torch.equal(advantages(torch.full((4,), -most, dtype=dtype), group), torch.zeros(4, dtype=dtype))


def test_group_rms_is_over_the_group_and_all_elements():
    direction = random()
    for one in (direction, direction[:, :1, :1, :1]):  # a sample of one element too
        torch.testing.assert_close(group_rms(one, GROUP), plain_rms(one), rtol=1e-12, atol=0)
    valid = torch.tensor([True, False, True, True, True, True])
    poisoned = torch.where(valid.view(-1, 1, 1, 1), direction, torch.full_like(direction, float("nan")))
    expected = direction[(GROUP == 7) & valid].pow(2).mean().sqrt()
    torch.testing.assert_close(group_rms(poisoned, GROUP, valid)[3], expected, rtol=1e-12, atol=0)
    assert group_rms(poisoned, GROUP, GROUP != 0)[5] == 0  # a group with no valid row


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_no_size_of_direction_over_or_underflows(size):
    """In fp32 the squares of these are inf and 0; and a sample's smallest element, here zero, says nothing of the largest."""
    direction = torch.tensor([0.0, 6.0, -8.0, 0.0]).view(2, 2, 1, 1) * size
    torch.testing.assert_close(group_rms(direction, torch.zeros(2, dtype=torch.long)), torch.full((2,), 5 * size), rtol=1e-6, atol=0)
    anchor, against = torch.tensor([[0.0, 1.0]]) * size, torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(project(anchor, against), torch.tensor([[3.0, 0.0]]), rtol=1e-6, atol=0)


def test_equation_6():
    anchor, a, b = random(1), random(2), random(3)
    expected = anchor + 0.3 * a / plain_rms(a).view(-1, 1, 1, 1) + 2.0 * b / plain_rms(b).view(-1, 1, 1, 1)
    torch.testing.assert_close(weigh(anchor, {"a": a, "b": b}, {"a": 0.3, "b": 2.0}, GROUP), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_a_rewards_units_do_not_matter(scale):
    anchor, direction = random(1, torch.float32), random(2, torch.float32)
    one, other = (weigh(anchor, {"a": d}, {"a": 0.3}, GROUP) for d in (direction, direction * scale))
    torch.testing.assert_close(one, other)
    assert one.dtype == torch.float32


def test_a_zero_direction_stays_zero_and_a_masked_row_follows_the_anchor():
    anchor, direction = random(1), random(2)
    assert torch.equal(weigh(anchor, {"a": torch.zeros_like(anchor)}, {"a": 5.0}, GROUP), anchor)
    valid = torch.tensor([True, False, True, True, True, True])
    poisoned = torch.where(valid.view(-1, 1, 1, 1), direction, torch.full_like(direction, float("nan")))
    out = weigh(anchor, {"a": poisoned}, {"a": 0.3}, GROUP, valid={"a": valid})
    assert torch.equal(out[1], anchor[1]) and bool(torch.isfinite(out).all()) and not torch.equal(out[3], anchor[3])


def test_a_direction_without_a_weight_is_named():
    with pytest.raises(KeyError, match="no weight for b"):
        weigh(random(1), {"a": random(2), "b": random(3)}, {"a": 1.0}, GROUP)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_project_drops_what_opposes(scale):
    anchor, direction = random(1, torch.float32) * scale, random(2, torch.float32)
    out = project(anchor, direction)
    a, d, o = (x.flatten(1).double() for x in (anchor, direction, out))
    opposed = (a * d).sum(1) < 0
    assert 0 < int(opposed.sum()) < len(GROUP)
    assert torch.equal(out[~opposed], direction[~opposed])
    cosine = torch.nn.functional.cosine_similarity(a / scale, o)
    assert float(cosine[opposed].abs().max()) < 1e-6
    unit = a / a.norm(dim=1, keepdim=True)
    torch.testing.assert_close(o[opposed], (d - (d * unit).sum(1, keepdim=True) * unit)[opposed], rtol=1e-5, atol=1e-5)
    assert torch.equal(project(torch.zeros_like(anchor), direction), direction)


def test_each_mode_pulls_by_its_own_rule():
    anchor, direction = random(1), random(2)
    unit = direction / plain_rms(direction).view(-1, 1, 1, 1)
    wanted = {
        ("fixed", False): 0.3 * unit,  # its term of eq. (6)
        ("adaptive", False): 0.3 * unit,
        ("sum", False): 0.3 * direction,  # in the reward's units
        ("fixed", True): 0.3 * project(anchor, unit),
    }
    for (mode, projected), expected in wanted.items():
        out = pull(anchor, direction, 0.3, GROUP, mode=mode, projected=projected)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        whole = weigh(anchor, {"a": direction}, {"a": 0.3}, GROUP)
        assert torch.allclose(anchor + out, whole) == (mode != "sum" and not projected)
    assert torch.equal(pull(anchor, direction, 0.3, GROUP), pull(anchor, direction, 0.3, GROUP, mode="fixed", projected=False))


@pytest.mark.parametrize("mode, projected", [("fixed", False), ("fixed", True), ("sum", False)])
def test_a_sample_without_a_score_is_not_pulled_and_weakens_no_other(mode, projected):
    anchor, direction = random(1), random(2)
    valid = torch.tensor([True, False, True, True, True, True])
    poisoned = torch.where(valid.view(-1, 1, 1, 1), direction, torch.full_like(direction, float("nan")))
    out = pull(anchor, poisoned, 0.3, GROUP, valid, mode=mode, projected=projected)
    alone = pull(anchor[valid], direction[valid], 0.3, GROUP[valid], mode=mode, projected=projected)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out[valid], alone, rtol=1e-12, atol=1e-12)


def test_modulate_scales_and_never_reverses():
    anchor = random(1)
    advantage = torch.tensor([0.0, 1.0, -1.0, -100.0, 100.0, float("nan")], dtype=torch.float64)
    factor = torch.tensor([1.0, 1.5, 0.5, 0.0, 3.5, 1.0], dtype=torch.float64)  # 3.5: an advantage is at most 5
    torch.testing.assert_close(modulate(anchor, {"a": advantage}, {"a": 0.5}), factor.view(-1, 1, 1, 1) * anchor, rtol=1e-14, atol=0)
    assert torch.equal(modulate(anchor, {}, {}), anchor)


def test_advantages_are_clipped_one_by_one_and_a_missing_one_takes_no_other_with_it():
    anchor, nan = random(1), float("nan")
    a = torch.tensor([4.0, 6.0, -6.0, nan, 2.0, nan], dtype=torch.float64)
    b = torch.tensor([4.0, 6.0, 5.5, 3.0, nan, nan], dtype=torch.float64)
    factor = torch.tensor([13.0, 16.0, 0.0, 4.0, 5.0, 1.0], dtype=torch.float64)  # 1 + 2 a + b, together beyond the clip of each
    out = modulate(anchor, {"a": a, "b": b}, {"a": 2.0, "b": 1.0})
    torch.testing.assert_close(out, factor.view(-1, 1, 1, 1) * anchor, rtol=1e-14, atol=0)
