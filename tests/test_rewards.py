"""Rewards of pixels, the discriminator, and what a reward that breaks its contract gets."""

import pytest
import torch

from fewstep.denoiser import Denoiser
from fewstep.rewards.base import PixelReward, RewardError, as_reward
from fewstep.rewards.discriminator import Discriminator
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
    return Sample(x0, torch.ones(batch, dtype=torch.float64), k, {}, ["p"] * batch, torch.arange(batch) // 2, decode)


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


def test_without_gradient_there_is_no_direction():
    f = PixelReward(lambda images, prompts: images.sum((1, 2, 3)), "sum")
    assert f(sample_of(gradient=False)).direction is None
    black_box = PixelReward(lambda images, prompts: images.detach().sum((1, 2, 3)).numpy(), "numpy")
    signal = black_box(sample_of())
    assert signal.direction is None and signal.score.shape == (4,)


def test_a_sample_without_a_score_has_no_direction_and_touches_no_other():
    def f(images, prompts):
        return images.pow(3).sum((1, 2, 3)) / torch.tensor([1.0, 1.0, 0.0, 1.0])

    whole, broken = PixelReward(lambda i, p: i.pow(3).sum((1, 2, 3)), "f")(sample_of()), PixelReward(f, "f")(sample_of())
    others = torch.tensor([0, 1, 3])
    assert torch.equal(whole.direction[others], broken.direction[others]) and torch.equal(whole.score[others], broken.score[others])
    assert not torch.isfinite(broken.score[2])


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


def test_an_exception_inside_a_reward_says_which():
    def f(images, prompts):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as error:
        PixelReward(f, "mine")(sample_of())
    assert any("mine" in note for note in error.value.__notes__)


def test_any_callable_becomes_a_reward():
    class Own:
        def __call__(self, sample):
            return Signal(torch.zeros(len(sample.x0)), None)

    own = Own()
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


def test_the_discriminator_refuses_a_backbone_without_the_empty_prompt():
    with pytest.raises(ValueError, match="uncond"):
        Discriminator(Denoiser(Middle(), Flow(), "flow"), Mean(), torch.zeros(1, 2, 3, 3))
