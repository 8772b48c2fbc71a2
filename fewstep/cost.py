"""What a run costs, counted by kind: passes of one sample, and the floating-point operations that one pass stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def in_passes(forwards: int, backwards: int) -> int:
    """Network evaluations in forward passes of one sample; a backward costs two."""
    return forwards + 2 * backwards


class Counted:
    """A function of a batch, or a reward of a sample, that counts what goes through it.

    Its first argument is a tensor (B, ...) or has one in `.x0`; a pass counts as a backward one too where that tensor asks for a gradient.
    A reward's `draw_for_call` is its own too.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.forwards, self.backwards = 0, 0  # in samples
        if hasattr(function, "draw_for_call"):
            self.draw_for_call = function.draw_for_call

    def __call__(self, batch: Any, *rest: Any, **told: Any) -> Any:
        value: Tensor = batch if isinstance(batch, Tensor) else batch.x0
        self.forwards += len(value)
        self.backwards += len(value) * (value.requires_grad and torch.is_grad_enabled())
        return self.function(batch, *rest, **told)

    @property
    def cost(self) -> int:
        """In forward passes of one sample."""
        return in_passes(self.forwards, self.backwards)


def added_product(to: torch.Size, left: torch.Size, right: torch.Size, **beside: Any) -> int:
    """Operations of a matrix product that is added in place, by shapes: of an adapter's second one, which torch's counter leaves out."""
    return 2 * left.numel() * right[1]


def counter() -> FlopCounterMode:
    """torch's own counter of floating-point operations, of both products of an adapter too."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})


@torch.no_grad()
def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of one call (a multiplication and an addition are two), by torch's own counter: matrix products,
    convolutions and attention; what is done element by element is not in it."""
    with counter() as counted:
        function()
    return counted.get_total_flops()


def flops_both_ways(network: Callable[..., Tensor], given: Sequence[Any], *, trained: bool) -> tuple[int, int]:
    """Floating-point operations of (a forward pass, its backward pass to what is trained, 0 where nothing is).

    A backward pass of full weights costs two forward passes, one through adapters little more than one: it makes no gradient of the
    frozen weights.
    """

    def both() -> None:
        with torch.enable_grad():
            network(*given).sum().backward()

    once = flops(lambda: network(*given))
    return once, flops(both) - once if trained else 0
