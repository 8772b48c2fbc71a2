"""Noise levels at which networks are compared and trained: where on (0, 1) they lie, how a group's are drawn (docs/method.md: GNDM)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Levels = Literal["stratified", "uniform"]
DensityName = Literal["uniform", "logit-normal", "shifted"]


class Density(NamedTuple):
    """A distribution of noise levels on (0, 1), each function elementwise in the dtype it is given."""

    rank: Callable[[Tensor], Tensor]  # its distribution function: t -> the share of levels below t
    at: Callable[[Tensor], Tensor]  # the inverse: share -> t
    slope: Callable[[Tensor], Tensor]  # the derivative of rank: its density

    def spacing(self, t: Tensor, t_range: tuple[float, float]) -> Tensor:
        """1 / pi(t) of levels drawn in t_range alone, (B,): the stretch of noise levels that a draw at t (B,) stands for, in an integral
        over the range."""
        low, high = self.rank(torch.tensor(t_range, dtype=torch.float64)).tolist()
        return (high - low) / self.slope(t)


def gauss(t: Tensor) -> Tensor:
    """Density of a logit-normal with mean 0 and standard deviation 1."""
    density = (-(torch.logit(t) ** 2) / 2).exp() / (math.sqrt(2 * math.pi) * t * (1 - t))
    return torch.where((t > 0) & (t < 1), density, torch.zeros_like(t))  # at the ends the quotient is 0 / 0


def density_named(name: DensityName, *, shift: float = 3.0) -> Density:
    """uniform; logit-normal: sigmoid of a standard normal, most in the middle; shifted: uniform, then t -> shift t / (1 + (shift - 1) t),
    towards noise for a shift above 1, as models of large pictures are trained (arXiv 2403.03206, sections 3.1 and 5.3.2).

    Raises ValueError for another name and for a shift that is not positive.
    """
    if name not in get_args(DensityName):
        raise ValueError(f"density must be one of {', '.join(get_args(DensityName))}, got {name!r}")
    if not shift > 0:
        raise ValueError(f"shift must be positive (1 is no shift), got {shift}")
    return {
        "uniform": Density(lambda t: t, lambda u: u, torch.ones_like),
        "logit-normal": Density(lambda t: torch.special.ndtr(torch.logit(t)), lambda u: torch.sigmoid(torch.special.ndtri(u)), gauss),
        "shifted": Density(
            lambda t: t / (shift - (shift - 1) * t),
            lambda u: shift * u / (1 + (shift - 1) * u),
            lambda t: shift / (shift - (shift - 1) * t) ** 2,
        ),
    }[name]


UNIFORM = density_named("uniform")


def rank_in_group(group: Tensor, *, shuffle: bool = False) -> tuple[Tensor, Tensor]:
    """(position of each sample among its group's members, size of its group), each (B,) int64; any order of `group`.

    Positions follow the order of the batch, or a random one with `shuffle`.
    """
    order = torch.randperm(len(group), device=group.device) if shuffle else torch.arange(len(group), device=group.device)
    order = order[torch.argsort(group[order], stable=True)]
    _, index, count = torch.unique(group[order], return_inverse=True, return_counts=True)
    start = torch.cumsum(count, 0) - count
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(group), device=group.device) - start[index]
    size = torch.empty_like(order)
    size[order] = count[index]
    return rank, size


def noise_levels(group: Tensor, t_range: tuple[float, float], levels: Levels, density: Density = UNIFORM) -> Tensor:
    """Times (B,) float64 in t_range, as often at each as `density` says. Stratified: member j of G draws from the j-th of G strata of equal
    probability, so a group's mean over its members is a quadrature over noise levels; the P groups of a batch share each
    stratum out among themselves, in a random order, so the batch is one too, P times finer."""
    u = torch.rand(len(group), dtype=torch.float64, device=group.device)
    if levels == "stratified":
        rank, size = rank_in_group(group)
        # the j-th of G is one stratum, for all groups of that size
        _, stratum = torch.unique(torch.stack([size, rank], 1), dim=0, return_inverse=True)
        place, peers = rank_in_group(stratum, shuffle=True)
        u = (rank + (place + u) / peers) / size
    low, high = density.rank(torch.tensor(t_range, dtype=torch.float64)).tolist()
    return density.at(low + (high - low) * u)
