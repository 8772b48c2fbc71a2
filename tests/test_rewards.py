"""Rewards of pixels, the discriminator, and what a reward that breaks its contract gets."""

import functools
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from fewstep.denoiser import Denoiser
from fewstep.rewards.base import PixelReward, RewardError, as_reward, asked
from fewstep.rewards.discriminator import Discriminator
from fewstep.rewards.heldout import HeldOut
from fewstep.schedule import Flow
from fewstep.types import Sample, Signal

MATRIX = torch.linspace(-1, 1, 3 * 2, dtype=torch.float64).view(3, 2)


def decode(x0):
    """A linear decoder (B, 2, h, w) -> (B, 3, h, w): its gradient is known."""
    return torch.einsum("ic,bchw->bihw", MATRIX.to(x0), x0)


def sample_of(batch=4, *, gradient=True):
    torch.manual_seed(0)
    x0 = torch.randn(batch, 2, 3, 3, dtype=torch.float64, requires_grad=gradient)
    k = torch.zeros(batch, dtype=torch.long)
    return Sample(x0, torch.ones(batch, dtype=torch.float64), {}, ["p"] * batch, torch.arange(batch) // 2, k=k, decode=decode)


def test_the_direction_is_the_gradient_through_the_decoder():
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    signal = PixelReward(lambda images, prompts: torch.einsum("i,bihw->b", weight, images), "linear")(sample_of())
    expected = (weight @ MATRIX).view(1, 2, 1, 1).expand(4, 2, 3, 3)
    torch.testing.assert_close(signal.direction, expected, rtol=0, atol=1e-14)
    assert not signal.score.requires_grad


def test_the_picture_is_decoded_once_for_all_rewards():
    calls = []
    sample = sample_of()
    sample._decode = lambda x0: calls.append(1) or decode(x0)
    for _ in range(3):
        assert PixelReward(lambda images, prompts: (images**2).sum((1, 2, 3)), "square")(sample).direction is not None
    assert len(calls) == 1


def test_rewards_and_judges_see_float32_where_the_autoencoder_is_in_bf16():
    def dark(images, prompts):
        assert images.dtype == torch.float32
        images.detach().numpy()  # it has no bf16
        return images.mean((1, 2, 3))

    sample = sample_of()
    sample._decode = lambda x0: decode(x0.bfloat16())
    signal = PixelReward(dark, "dark")(sample)
    torch.testing.assert_close(signal.direction, MATRIX.mean(0).view(1, 2, 1, 1).expand(4, 2, 3, 3) / 9, rtol=1e-2, atol=0)
    assert HeldOut(dark, "judge")(sample).score.dtype == sample.image.dtype == torch.float32


@pytest.mark.parametrize("kind", [PixelReward, HeldOut])
def test_rewards_and_judges_compute_in_float32_where_a_run_is_in_bf16(kind):
    """A cosine in bf16 has three digits, fewer than the differences inside a group."""
    weight = torch.linspace(0, 1, 27)

    def score(images, prompts):
        return images.flatten(1) @ weight

    x0 = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sample = Sample(x0, torch.ones(4), {}, ["p"] * 4, torch.arange(4), decode=lambda x0: x0 * 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = kind(score, "mine")(sample).score
    assert torch.equal(said, score(x0.detach(), []))


def darken(images, prompts):
    images.mul_(0)
    prompts.clear()
    return images.mean((1, 2, 3))


def darken_by_numpy(images, prompts):
    images.detach().numpy()[:] = 0  # no version counter sees it
    return images.mean((1, 2, 3))


@torch.inference_mode()
def darken_in_inference_mode(images, prompts):
    return darken(images, prompts).tolist()


@pytest.mark.parametrize("change", [darken, darken_by_numpy, darken_in_inference_mode])
def test_what_one_reward_does_to_its_pictures_no_other_sees(change):
    sample = sample_of()
    kept = sample.image.detach().clone()
    for kind in (PixelReward, HeldOut):
        assert not kind(change, "dark")(sample).score.any()
    assert torch.equal(sample.image, kept) and sample.prompts == ["p"] * 4
    signal = PixelReward(lambda images, prompts: images.clamp_(0, 1).sum((1, 2, 3)), "clamped")(sample)
    inside = ((kept >= 0) & (kept <= 1)).to(kept)
    torch.testing.assert_close(signal.direction, torch.einsum("ic,bihw->bchw", MATRIX, inside))  # of what it looked at


def test_a_score_with_a_gradient_of_its_own_parameters_alone_has_no_direction():
    own = torch.nn.Linear(1, 1, dtype=torch.float64)

    def on_arrays(images, prompts):
        return own(torch.as_tensor(images.detach().numpy().mean((1, 2, 3)))[:, None])[:, 0]

    signal = PixelReward(on_arrays, "arrays")(sample_of())
    assert signal.direction is None and not signal.score.requires_grad


def test_pictures_that_all_go_unscored_have_a_direction_of_none_of_them():
    """Beside them a part of the batch, or another process, has one."""
    nowhere = PixelReward(lambda images, prompts: [None] * len(images), "nowhere")
    signal = nowhere(sample_of())
    assert not signal.direction.any() and not torch.isfinite(signal.score).any()
    assert nowhere(sample_of(gradient=False)).direction is None


@pytest.mark.parametrize("function", [
    lambda images: images.mean((1, 2, 3)), lambda images: images[:, 0].mean((1, 2)), lambda images: torch.mean(images),
    functools.partial(lambda images, prompts: images.mean((1, 2, 3)), prompts=None),
], ids=["method", "index", "function", "partial"])  # fmt: skip
def test_a_function_of_pictures_alone_says_what_it_lacks(function):
    with pytest.raises(
        RewardError, match=r"'mine' takes one argument.* given a Sample.*; a function of pictures takes two, \(images, prompts"
    ):
        asked("mine", as_reward(function, "mine"), sample_of())
    with pytest.raises(TypeError, match="boom"):  # what has nothing to do with it comes as it is
        asked("mine", mock.Mock(side_effect=TypeError("boom")), sample_of())


def test_without_gradient_there_is_no_direction():
    f = PixelReward(lambda images, prompts: images.sum((1, 2, 3)), "sum")
    assert f(sample_of(gradient=False)).direction is None
    black_box = PixelReward(lambda images, prompts: images.detach().sum((1, 2, 3)).numpy(), "numpy")
    signal = black_box(sample_of())
    assert signal.direction is None and signal.score.shape == (4,)


def test_a_sample_without_a_score_has_no_direction_and_touches_no_other():
    def f(images, prompts):
        return images.pow(3).sum((1, 2, 3)) / torch.tensor([1.0, 1.0, 0.0, 1.0])

    def g(images, prompts):  # its NaN is of arithmetic, whose derivative is NaN too
        return images.pow(3).sum((1, 2, 3)) + 0 * torch.tensor([1.0, 1.0, math.nan, 1.0]) * images.sum((1, 2, 3))

    whole = PixelReward(lambda i, p: i.pow(3).sum((1, 2, 3)), "f")(sample_of())
    others = torch.tensor([0, 1, 3])
    for function in (f, g):
        broken = PixelReward(function, "f")(sample_of())
        assert torch.equal(whole.direction[others], broken.direction[others]) and torch.equal(whole.score[others], broken.score[others])
        assert not torch.isfinite(broken.score[2]) and not broken.direction[2].any()


@pytest.mark.parametrize("array", [
    lambda numbers: numbers[::-1], lambda numbers: numbers.astype(object), lambda numbers: numbers.astype(">f8"),
    lambda numbers: np.array([*numbers[:-1], None]),
], ids=["reversed", "objects", "other-endian", "none"])  # fmt: skip
def test_any_array_of_numbers_is_a_score(array):
    numbers = array(np.arange(4.0))
    signal = PixelReward(lambda images, prompts: numbers, "array")(sample_of())
    torch.testing.assert_close(signal.score, torch.tensor([float(n) if n is not None else math.nan for n in numbers]), equal_nan=True)


def test_a_reward_does_not_end_the_process():
    """As a script's own check does, with a code that says that all is well."""
    with pytest.raises(RewardError, match=r"reward 'mine' called sys\.exit"):
        PixelReward(lambda images, prompts: sys.exit(0), "mine")(sample_of())


@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda n: torch.zeros(n, 1), r"shape \(4, 1\) for 4 pictures"),
        (lambda n: torch.zeros(n - 1), r"shape \(3,\)"),
        (lambda n: torch.tensor(1.0), r"shape \(\)"),
        (lambda n: "good", "returned str"),
        (lambda n: None, "returned NoneType"),
        (lambda n: [1.0] * (n + 1), r"shape \(5,\)"),
        (lambda n: torch.zeros(n, device="meta"), "on meta"),
    ],
    ids=["matrix", "short", "scalar", "text", "nothing", "long-list", "device"],
)
def test_a_reward_that_breaks_its_contract_is_named(returned, message):
    with pytest.raises(RewardError, match=message) as error:
        PixelReward(lambda images, prompts: returned(len(images)), "mine")(sample_of())
    assert "'mine'" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_score_is_heard_in_float32_or_more(dtype):
    score = torch.tensor([0.3, 0.301, 300.0, 60000.0], dtype=dtype)
    heard = asked("mine", as_reward(lambda images, prompts: score, "mine"), sample_of()).score
    assert torch.equal(heard, score.to(heard)) and heard.dtype == torch.promote_types(dtype, torch.float32)


def test_an_exception_inside_a_reward_says_which():
    def f(images, prompts):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as error:
        PixelReward(f, "mine")(sample_of())
    assert any("mine" in note and "(images, prompts)" in note for note in error.value.__notes__)


def test_any_callable_becomes_a_reward():
    class Own:
        def __call__(self, sample):
            return Signal(torch.zeros(len(sample.x0)), None)

    class Module(torch.nn.Module):
        def forward(self, sample):
            return Signal(torch.zeros(len(sample.x0)), None)

    for own in (Own(), Module()):
        assert as_reward(own, "own") is own
    assert isinstance(as_reward(lambda images, prompts: 0, "f"), PixelReward)
    assert isinstance(as_reward(lambda images, prompts, scale=1: 0, "f"), PixelReward)
    with pytest.raises(RewardError, match="give a function"):
        as_reward(3, "number")


class Middle(torch.nn.Module):
    """A backbone whose features are the renoised latent itself."""

    def features(self, xt, timestep, cond):
        assert cond["e"].shape[0] == len(xt)
        return xt


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    def forward(self, features):
        return self.weight.to(features) * features.mean((1, 2, 3))


def test_the_discriminator_learns_which_is_real_and_points_there():
    backbone = Denoiser(Middle(), Flow(), "flow", uncond={"e": torch.zeros(1, 1)})
    head, real = Mean(), torch.randn(64, 2, 3, 3, generator=torch.Generator().manual_seed(1)) + 2.0
    discriminator = Discriminator(backbone, head, real)
    sample = sample_of(16)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(discriminator.loss(sample))
        losses[-1].backward()
        optimizer.step()
    assert float(losses[0]) == pytest.approx(2 * torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert float(losses[-1]) < float(losses[0]) and float(head.weight) > 0
    assert sample.x0.grad is None
    signal = discriminator(sample)
    assert bool((signal.direction > 0).all())  # real latents lie at larger values
    assert bool((signal.score < 0).all())


def test_the_discriminator_looks_in_its_range_of_noise_levels_spread_over_what_it_is_asked_about():
    """A call over each group, its learning over the batch; real and student's latents under noise of their own."""
    backbone = Denoiser(Middle(), Flow(), "flow", uncond={"e": torch.zeros(1, 1)})
    discriminator, sample = Discriminator(backbone, Mean(), torch.zeros(1, 2, 3, 3), t_range=(0.4, 0.6)), sample_of(8)
    called, learnt = discriminator.draw_for_call(sample), discriminator.draw(sample)
    stratum = {n: ((t - 0.4) / 0.2 * n).floor().tolist() for n, t in ((2, called["t"]), (8, learnt["t"]))}
    assert stratum[2] == [0, 1] * 4 and sorted(stratum[8]) == list(range(8))
    assert called["noise"].shape == sample.x0.shape and learnt["noise"].shape == (8, 2, 2, 3, 3)
    assert len(learnt["noise"].flatten(0, 1).unique(dim=0)) == 16


def test_the_discriminator_tells_real_from_made_by_nothing_but_what_they_are():
    """Both at the same noise levels, each under noise of its own; of many real latents it sees all."""
    backbone = Denoiser(Middle(), Flow(), "flow", uncond={"e": torch.zeros(1, 1)})
    real, sample = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 2, 3, 3), sample_of(8)
    discriminator, seen, first = Discriminator(backbone, Mean(), real), set(), set()
    with mock.patch.object(discriminator, "features", wraps=discriminator.features) as features:
        for _ in range(20):
            discriminator.loss(sample)
            x0, t, noise = features.call_args.args
            assert torch.equal(t[:8], t[8:]) and len(noise.unique(dim=0)) == 16 and torch.equal(x0[8:], sample.x0)
            seen |= set(x0[:8, 0, 0, 0].tolist())
            first.add(int((t[0] - 0.02) / 0.96 * 8))
    assert len(seen) > 40
    assert len(first) > 4  # and no sample has the same stratum every time


def test_the_discriminators_direction_is_the_gradient_of_each_samples_own_score():
    """However many are asked about together."""
    backbone, sample = Denoiser(Middle(), Flow(), "flow", uncond={"e": torch.zeros(1, 1)}), sample_of(4)
    discriminator = Discriminator(backbone, Mean(), torch.zeros(1, 2, 3, 3))
    torch.nn.init.ones_(discriminator.module.weight)
    drawn = discriminator.draw_for_call(sample)
    together = discriminator(sample, **drawn)
    for rows in (slice(0, 1), slice(1, 4)):
        alone = discriminator(sample.rows(rows), **{key: value[rows] for key, value in drawn.items()})
        torch.testing.assert_close(together.direction[rows], alone.direction)
        torch.testing.assert_close(together.score[rows], alone.score)


def test_the_discriminator_refuses_a_backbone_without_the_empty_prompt():
    with pytest.raises(ValueError, match="uncond"):
        Discriminator(Denoiser(Middle(), Flow(), "flow"), Mean(), torch.zeros(1, 2, 3, 3))


def test_a_sample_needs_neither_a_step_nor_a_decoder_until_one_is_asked_for():
    x0, group = torch.randn(4, 2, 3, 3), torch.tensor([0, 0, 1, 1])
    sample = Sample(x0=x0, t_k=torch.ones(4), cond={}, prompts=["a", "b", "c", "d"], group=group)
    assert sample.k is None and sample.rows(slice(1, 3)).k is None and sample.rows(slice(1, 3)).prompts == ["b", "c"]
    with pytest.raises(ValueError, match="give Sample its `decode`"):
        PixelReward(lambda images, prompts: images.mean((1, 2, 3)), "mean")(sample)
