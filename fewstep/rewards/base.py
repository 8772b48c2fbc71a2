"""Everything that pushes the student is a reward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import RewardError
from fewstep.transforms import masked
from fewstep.types import Sample, Signal


@runtime_checkable
class Reward(Protocol):
    """Says of a sample how good it is, and, if it can, which way is better.

    The sample's picture is shared by all rewards: it is not to be changed in place.
    Where it also has `draw_for_call(sample) -> dict[str, Tensor]`, whatever a call takes at random, a row a sample, a call takes that as
    keywords, and a batch that is asked about in parts, or by several processes, gets the answer that it would get whole.
    """

    def __call__(self, sample: Sample) -> Signal: ...


@runtime_checkable
class OnlineReward(Reward, Protocol):
    """A reward that learns while the student learns: the fake denoiser of R_dm, a discriminator.

    Where it also has `draw(sample) -> dict[str, Tensor]`, whatever its loss takes at random, a row a sample, its loss takes that as
    keywords, and a batch that passes through the networks in parts, or in several processes, has the loss that it would have whole.
    Without `draw` each part draws its own.
    Where it also has `lag(new, old, *, kl) -> Lag`, its held-out `loss` on the newest sample minus that on the one before, which it was
    trained on, is logged; with `kl`, as an adaptive weight asks of the anchor, also in the unit of its score.
    """

    module: nn.Module

    def loss(self, sample: Sample) -> Tensor:
        """Loss of `module` on a sample of the student's outputs (scalar): a mean over samples."""
        ...


class PixelReward:
    """A Reward from `function(images, prompts) -> (B,)`: images (B, 3, H, W) in [0, 1], B prompts, higher is better.

    When the sample asks for gradients and the function is differentiable, the direction is the gradient of the score in x0,
    through the decoder. A score that is NaN or inf masks its own sample: no gradient is taken of it.
    Raises RewardError when the function returns anything but one number a sample on the sample's device.
    """

    def __init__(self, function: Callable[[Tensor, list[str]], Any], name: str):
        self.function, self.name = function, name

    def __call__(self, sample: Sample) -> Signal:
        wanted = sample.x0.requires_grad
        # scorers keep float32: a cosine in bf16 has three digits, fewer than the differences inside a group
        with torch.set_grad_enabled(wanted), torch.autocast(sample.x0.device.type, enabled=False):
            score = self.score(sample)
            valid = torch.isfinite(score.detach())
            if not wanted:
                return Signal(score.detach(), None)
            direction = torch.zeros_like(sample.x0)
            if bool(valid.any()):  # where there is no score at all, it has no graph either
                if not score.requires_grad:
                    return Signal(score.detach(), None)
                # samples do not see each other, so the sum's gradient is each one's own; other rewards share the picture's graph
                (found,) = torch.autograd.grad(score[valid].sum(), sample.x0, retain_graph=True, allow_unused=True)
                if found is None:  # the function's own parameters ask for a gradient; of the pictures its score has none
                    return Signal(score.detach(), None)
                # the sum sends a zero into the graph of a score that arithmetic made NaN, and 0 * NaN comes back
                direction = masked(found, valid)
        return Signal(score.detach(), direction)

    def score(self, sample: Sample) -> Tensor:
        return score_of(self.function, self.name, sample.image, sample.prompts)


def score_of(function: Callable[[Tensor, list[str]], Any], name: str, images: Tensor, prompts: list[str]) -> Tensor:
    """(B,) what a function says of images (B, 3, H, W) in [0, 1] and their B prompts; in a list, None is NaN: no score.

    The function has a copy of both, for it may change them in place, and others are asked about the same pictures. name: what errors call
    it. Raises RewardError for anything but one number a picture on the pictures' device, and for a function that calls sys.exit.
    """
    try:
        score = function(images.clone(), list(prompts))
    except SystemExit as error:  # it would end the command as if all were done
        raise RewardError(f"reward {name!r} called sys.exit; it must raise an error, or return NaN for what it cannot score") from error
    except Exception as error:
        error.add_note(f"raised by the reward {name!r}, called as a function of (images, prompts) with {len(prompts)} pictures")
        raise
    if not isinstance(score, Tensor):
        try:
            numbers = [math.nan if one is None else one for one in score] if isinstance(score, (list, tuple)) else score
            if isinstance(numbers, np.ndarray):  # torch takes no reversed view and no array of objects
                numbers = numbers.astype(np.float32)
            score = torch.as_tensor(numbers, dtype=torch.float32, device=images.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(f"reward {name!r} returned {type(score).__name__}; it must return one number a picture") from error
    wanted = (len(images),)
    if score.shape != wanted:
        raise RewardError(f"reward {name!r} returned shape {tuple(score.shape)} for {wanted[0]} pictures; it must return {wanted}")
    if score.device != images.device:
        raise RewardError(f"reward {name!r} returned a score on {score.device}; the pictures are on {images.device}")
    return score if score.is_floating_point() else score.float()


def asked(name: str, reward: Reward, sample: Sample, **told: Tensor) -> Signal:
    """What a reward says of a sample, as `checked` has it. told: what `draw_for_call` drew.

    Raises RewardError also for a function of pictures alone, which is taken for a Reward since it has one argument.
    """
    try:
        said = reward(sample, **told)
    except (AttributeError, TypeError) as error:
        if "Sample" not in str(error):
            raise
        raise RewardError(
            f"reward {name!r} takes one argument, so that it was given a Sample, and raised {type(error).__name__}: {error}; a function of "
            "pictures takes two, (images, prompts)"
        ) from error
    return checked(name, said, sample)


def checked(name: str, signal: Any, sample: Sample) -> Signal:
    """What a reward said, its score in float32 or more. Raises RewardError when it is no Signal of the sample's shapes and device.

    A direction that broadcasts (B, 1, 1, 1) is one of those: it would push every pixel alike, and nobody would see it.
    """
    if not isinstance(signal, Signal):
        raise RewardError(f"reward {name!r} returned {type(signal).__name__}; a Reward returns a Signal(score, direction)")
    for part, value, wanted in (("score", signal.score, sample.x0.shape[:1]), ("direction", signal.direction, sample.x0.shape)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise RewardError(f"reward {name!r} returned a {part} that is {type(value).__name__}; it must be a tensor {tuple(wanted)}")
        if value.shape != wanted:
            raise RewardError(f"reward {name!r} returned a {part} of shape {tuple(value.shape)}; it must be {tuple(wanted)}")
        if value.device != sample.x0.device:
            raise RewardError(f"reward {name!r} returned a {part} on {value.device}; the samples are on {sample.x0.device}")
    if signal.score is None:
        return signal
    # ranks and logs are made of scores: in half precision squares overflow, and two digits are no difference inside a group
    return signal._replace(score=signal.score.to(torch.promote_types(signal.score.dtype, torch.float32)))


def as_reward(value: Any, name: str) -> Reward:
    """A Reward as it is; a function of (images, prompts) as a PixelReward. Raises RewardError for anything else."""
    if not callable(value):
        raise RewardError(f"reward {name!r} is {type(value).__name__}; give a function of (images, prompts) or a Reward")
    try:
        called = value.forward if isinstance(value, nn.Module) else value  # a module's own signature is (*args, **kwargs)
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature can only be functions of pictures
        return PixelReward(value, name)
    # those with a default count: f(images, prompts=None) is a function of pictures
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return value if len(taken) == 1 else PixelReward(value, name)
