"""Few functions that say how pairs of numbers turn among neighbouring tokens (cpp/turn.h uses them)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SLOW = 1 / 16
"""Radians per token."""
NODES, POINTS = 64, 257
"""Of the interpolation, and points in between at which it is compared with what it stands for."""
TILES = range(32, 513, 32)
"""Numbers of tokens that queries may be turned for at a time."""


class TurningFunctions(NamedTuple):
    """basis [m, P]: m functions of the place among P tokens. shares [m, r/2]: what each says of the cosine (the even ones) or
    the sine (the odd ones) of each pair's angle, counted from the middle. speeds [r/2]: radians per token, in float64."""

    basis: Tensor
    shares: Tensor
    speeds: Tensor


@functools.lru_cache(maxsize=64)
def turning_functions(speeds: tuple[float, ...], tolerance: float, tiles: Sequence[int] = TILES) -> TurningFunctions:
    """Chebyshev polynomials T_k(x), x from -1 to 1 over the P tokens: cos(a x) has even ones only, sin(a x) odd ones, and
    their shares fall faster than (a/2)^k / k!, a being half the angle that a pair turns by among the tokens.

    As many as leave an error of at most `tolerance`, for that P of `tiles` for which they and the queries that are turned for
    them cost least.
    """
    speed_P = torch.tensor(speeds, dtype=torch.float64)
    turning = 2 * int(speed_P.count_nonzero())  # numbers of a query; others are the same for all functions
    costs = {P: (1 + turning / P) * _needed(float(speed_P.max()) * P / 2, tolerance) for P in tiles}
    assert min(costs.values()) < math.inf, "turns_slowly() was asked"
    tokens = min(costs, key=lambda P: costs[P])
    count = int(_needed(float(speed_P.max()) * tokens / 2, tolerance))
    place = (torch.arange(tokens, dtype=torch.float64) - (tokens - 1) / 2) / (tokens / 2)
    shares = _shares(speed_P * tokens / 2)[:count].float().contiguous()
    return TurningFunctions(_chebyshev(place)[:count].float().contiguous(), shares, speed_P)


@functools.lru_cache(maxsize=1024)
def _needed(angle: float, tolerance: float) -> float:
    """How many functions leave no larger error, for angles from -angle to angle; infinity if these are too many."""
    x = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    exact, basis, shares = (
        torch.stack([(angle * x).cos(), (angle * x).sin()]),
        _chebyshev(x),
        _shares(torch.tensor([angle])),
    )
    parts = shares * basis
    for count in range(1, NODES):
        found = torch.stack([parts[0:count:2].sum(0), parts[1:count:2].sum(0)])
        if float((found - exact).abs().max()) <= tolerance:
            return count
    return math.inf


def turns_slowly(speeds: tuple[float, ...]) -> bool:
    """Whether queries can be turned instead of keys: pairs that are stored before rotation turn by a few radians at most
    among the tokens that queries are turned for."""
    return bool(speeds) and max(speeds) <= SLOW


def _shares(angle_P: Tensor) -> Tensor:
    """[NODES, pairs]: coefficients of cos(a x) at even places, of sin(a x) at odd ones."""
    at = torch.cos(math.pi * (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES)
    turned_PN = angle_P.double()[:, None] * at
    values = torch.stack([turned_PN.cos(), turned_PN.sin()])
    coefficients = 2 / NODES * torch.einsum("kn,spn->skp", _chebyshev(at), values)
    coefficients[:, 0] /= 2
    odd = torch.arange(NODES)[:, None] % 2 == 1
    return torch.where(odd, coefficients[1], coefficients[0])


def _chebyshev(x: Tensor) -> Tensor:
    """[NODES, points]: T_k(x) = cos(k arccos x)."""
    return torch.cos(torch.arange(NODES, dtype=torch.float64)[:, None] * torch.arccos(x.clamp(-1, 1)))
