"""Which levels lose least where normal numbers are rounded to them (Lloyd 1982, Max 1960)?"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

STILL = 1e-12
"""Levels that move less no longer move."""


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^bits levels with the least squared error for numbers of mean 0 and variance 1, in rising order.

    A level is the mean of the numbers that are rounded to it, and those are the ones nearest to it: both conditions are met
    in turn, in float64, from the levels that are best for many bits (spread as normal numbers of three times the variance).
    """
    places = (torch.arange(2**bits // 2, dtype=torch.float64) + 0.5) / 2**bits
    negative, moved = math.sqrt(3) * torch.special.ndtri(places), math.inf
    while moved > STILL:
        means = _negative_means(midpoints(negative))
        negative, moved = means, float((means - negative).abs().max())
    return (*negative.tolist(), *negative.neg().flip(0).tolist())


def midpoints(levels: Tensor) -> Tensor:
    """Where the nearest level changes, [levels - 1]."""
    return (levels[1:] + levels[:-1]) / 2


def _negative_means(edges: Tensor) -> Tensor:
    """The mean of a normal number below the first edge, between neighbouring ones, and between the last one and 0."""
    edges = torch.cat([edges.new_tensor([-math.inf]), edges, edges.new_zeros(1)])
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    return -density.diff() / torch.special.ndtr(edges).diff()
