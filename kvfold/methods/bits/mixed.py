"""mixed: leading numbers of a latent get more bits than later ones, and the last ones none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvfold.errors import RecipeError
from kvfold.methods.bits.base import BitsMethod, plain_tiers, shared_energy
from kvfold.plan.codecs._codes import BITS
from kvfold.plan.codecs.base import NOISE, SIZES
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat, StoredShape

STEPS = 64
"""A tier ends at one of so many places."""
PRICES = 96
"""Exchange rates between distortion and bits that are tried."""


@dataclass(frozen=True, kw_only=True)
class Mixed(BitsMethod):
    """Reverse water-filling with whole bits: for an exchange rate mu, the tiers that minimise distortion + mu * bits, scales
    included, found by dynamic programming; a curve takes many mu.

    most, least: bits. tiers: at most so many. multiple: numbers of a tier come in multiples of it.
    """

    by_spectrum: ClassVar[bool] = True

    most: int = 8
    least: int = 1
    tiers: int = 3
    multiple: int = 8

    def __post_init__(self) -> None:
        if not {self.most, self.least} <= set(BITS) or self.least > self.most or min(self.tiers, self.multiple) < 1:
            raise RecipeError(
                f"bits.least = {self.least} and bits.most = {self.most} are of {BITS}; bits.tiers and bits.multiple are at"
                " least 1."
            )

    def format(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat:
        return plain_tiers(width, self.least)

    def curve(
        self, shapes: Sequence[StoredShape], spectrum: Sequence[float], noise: float
    ) -> list[tuple[StoredShape, float]]:
        width, heads = shapes[-1].width, shapes[-1].num_heads
        beyond, spectrum = float(sum(spectrum[width:])), list(spectrum[:width])
        step = max(self.multiple, -(-width // STEPS // self.multiple) * self.multiple)
        edges = np.array([*range(0, width, step), width])
        distortion, bits, cost = self._tiers(spectrum, edges, noise, heads)
        least = max(min(self.multiple, width), -(-shapes[0].elements // heads))
        kept, share = float(sum(spectrum[:least])), float(np.interp(least, SIZES, NOISE[self.least]))
        lost = noise * share * float(shared_energy(spectrum, np.array(0), np.array(least)))
        found: dict[tuple[tuple[int, int], ...], float]
        found = {((least, self.least),): float(sum(spectrum)) - kept + min(lost, kept)}
        for price in np.geomspace(max(spectrum[0] / heads, 1e-12), max(spectrum[-1] / heads, 1e-12) * 1e-5, PRICES):
            best = (distortion + price * cost).argmin(2)
            tiers, lost = self._path(best, distortion, cost, price, edges, bits, spectrum, least)
            if tiers:
                found[tiers] = lost
        points = [
            (StoredShape(heads, sum(n for n, _ in tiers), NumberFormat(tiers=tiers)), lost + beyond)
            for tiers, lost in found.items()
        ]
        return sorted(points, key=lambda point: (point[0].bytes_per_token(1), -point[1]))

    def _tiers(
        self, spectrum: Sequence[float], edges: np.ndarray, noise: float, heads: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Damage and bits [from, to, kinds of bits] of every tier that could be."""
        bits = np.array([b for b in BITS if self.least <= b <= self.most])
        elements = edges[None, :] - edges[:, None]
        energy = shared_energy(spectrum, *np.broadcast_arrays(edges[:, None], edges[None, :]))
        shares = np.stack([np.interp(np.maximum(elements, 1), SIZES, NOISE[b]) for b in bits], axis=2)
        possible = elements[:, :, None] > 0
        distortion = np.where(possible, noise * energy[:, :, None] * shares, np.inf)
        return distortion, bits, heads * (elements[:, :, None] * bits + 8.0)

    def _path(
        self,
        best: np.ndarray,
        distortion: np.ndarray,
        cost: np.ndarray,
        price: float,
        edges: np.ndarray,
        bits: np.ndarray,
        spectrum: Sequence[float],
        least: int,
    ) -> tuple[tuple[tuple[int, int], ...], float]:
        """The tiers of at least `least` numbers with the least distortion + price * bits, and their distortion with that of
        what is left out."""
        n = len(edges)
        rows, columns = np.indices((n, n))
        tier_distortion, tier_cost = distortion[rows, columns, best], cost[rows, columns, best]
        objective = np.full((self.tiers + 1, n), np.inf)
        objective[0, 0] = 0.0
        came = np.zeros((self.tiers + 1, n), dtype=int)
        for used in range(1, self.tiers + 1):
            candidates = objective[used - 1][:, None] + tier_distortion + price * tier_cost
            came[used] = candidates.argmin(0)
            objective[used] = candidates.min(0)
        left = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)[edges]
        ends = np.where(edges >= least, objective + left, np.inf)
        used, at = map(int, np.unravel_index(ends.argmin(), objective.shape))
        lost, tiers = float(max(left[at], 0.0)), []
        while used:
            start = came[used, at]
            lost += float(tier_distortion[start, at])
            tiers.append((int(edges[at] - edges[start]), int(bits[best[start, at]])))
            used, at = used - 1, int(start)
        return tuple(reversed(tiers)), lost
