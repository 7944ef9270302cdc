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
NODES, POINTS, MOST = 64, 129, 40
"""Of the interpolation, points in between at which it is compared with what it stands for, and functions at most."""
TILES, TURNED = range(32, 513, 32), 2
"""Numbers of tokens that queries may be turned for at a time; what a product that turns them, in float32, costs beside one of
turned queries."""
Told = tuple[float, ...]
ALL: Told = (1.0,)


class TurningFunctions(NamedTuple):
    """basis [m, P]: m functions of the place among P tokens. shares [m, r/2]: what each says of the cosine (the even ones) or
    the sine (the odd ones) of each pair's angle, counted from the middle. speeds [r/2]: radians per token, in float64. reach
    [m], int32, falling: how many pairs, the first ones, a function is needed for; of others it has no share."""

    basis: Tensor
    shares: Tensor
    speeds: Tensor
    reach: Tensor

    def products(self, told: Told = ALL) -> float:
        """Of a query per number that a token stores: with the functions, and for its share of these. told: the share of the
        numbers of which each function says something, the last one of all behind it."""
        turned_m = (self.reach - (self.speeds == 0).sum()).clamp_min(0).double()
        told_m = torch.tensor([told[min(k, len(told) - 1)] for k in range(len(turned_m))], dtype=torch.float64)
        return float((told_m * (1 + TURNED * 2 * turned_m / self.basis.shape[1])).sum())


@functools.lru_cache(maxsize=64)
def turning_functions(
    speeds: tuple[float, ...],
    tolerance: float,
    tiles: Sequence[int] = TILES,
    told: Told = ALL,
    on_average: bool = False,
) -> TurningFunctions:
    """Chebyshev polynomials T_k(x), x from -1 to 1 over the P tokens: cos(a x) has even ones only, sin(a x) odd ones, and
    their shares fall faster than (a/2)^k / k!, a being half the angle that a pair turns by among the tokens.

    For each pair as many as leave an error of at most `tolerance`, which are fewer the slower it turns; for that P of `tiles`
    for which they and the queries that are turned for them cost least. told: as `products` takes it. on_average: so
    many that the errors of a head's pairs are at most `tolerance` as a root of a mean of squares.
    """
    speed_P = torch.tensor(speeds, dtype=torch.float64)
    found = [of for of in (_functions(speed_P, tolerance, tokens, on_average) for tokens in tiles) if of is not None]
    assert found, "turns_slowly() was asked"
    return min(found, key=lambda of: of.products(told))


def _functions(speed_P: Tensor, tolerance: float, tokens: int, on_average: bool) -> TurningFunctions | None:
    """For so many tokens; None where pairs turn too far among them."""
    shares = _shares(speed_P * tokens / 2)
    errors = _errors(speed_P * tokens / 2, shares)
    fits = errors <= tolerance
    if not fits[-1].all():
        return None
    needed_P = MOST + 1 - fits.sum(0)
    enough = int((errors.square().mean(1).sqrt() > tolerance).sum()) + 1 if on_average else MOST
    needed_P, pair = needed_P.clamp_max(enough), torch.arange(1, len(speed_P) + 1)
    count = int(needed_P.max())
    reach = torch.stack([(pair * (needed_P > k)).max() for k in range(count)]).int()
    needed = shares[:count].masked_fill(pair > reach[:, None], 0.0)
    place = (torch.arange(tokens, dtype=torch.float64) - (tokens - 1) / 2) / (tokens / 2)
    return TurningFunctions(_chebyshev(place)[:count].float().contiguous(), needed.float(), speed_P, reach)


def _errors(angle_P: Tensor, shares: Tensor) -> Tensor:
    """[MOST, P]: of the first function, of the first two, ..., for each pair."""
    x = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    turned_PX = angle_P[:, None] * x
    parts = shares[:MOST, :, None] * _chebyshev(x)[:MOST, None]
    cosines = (parts[0::2].cumsum(0) - turned_PX.cos()).abs().amax(2)
    sines = (torch.cat([0 * parts[:1], parts[1::2].cumsum(0)]) - turned_PX.sin()).abs().amax(2)
    counts = torch.arange(1, MOST + 1)
    return torch.maximum(cosines[(counts + 1) // 2 - 1], sines[counts // 2])


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
