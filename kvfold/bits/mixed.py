"""mixed: leading numbers of a latent get more bits than later ones, and the last ones none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvfold.attention import AttentionLayer
from kvfold.bits.base import BitsMethod, plain_tiers
from kvfold.errors import RecipeError
from kvfold.number_format import BITS, NumberFormat, StoredShape

STEPS = 64
"""A tier ends at one of so many places."""
PRICES = 96
"""Exchange rates between damage and bits that are tried."""
SIZES = (8, 16, 32, 64, 192, 1024)
NOISE = {
    1: (0.318, 0.341, 0.355, 0.362, 0.374, 0.406),
    2: (0.0782, 0.0974, 0.1077, 0.1133, 0.1172, 0.1194),
    3: (0.0178, 0.0244, 0.0297, 0.0333, 0.0361, 0.0377),
    4: (0.00436, 0.00604, 0.00756, 0.00897, 0.01058, 0.01139),
    5: (0.00117, 0.00155, 0.00194, 0.00233, 0.0029, 0.00338),
    6: (0.0003, 0.0004, 0.0005, 0.0006, 0.00076, 0.00094),
    7: (7.6e-5, 1e-4, 1.26e-4, 1.52e-4, 1.93e-4, 2.49e-4),
    8: (2e-5, 2.6e-5, 3.2e-5, 3.9e-5, 5e-5, 6.7e-5),
}
"""Squared error as a share of the energy, of normally distributed numbers in tiers of SIZES: a scale for few numbers follows
them more closely. A test measures it again."""


@dataclass(frozen=True, kw_only=True)
class Mixed(BitsMethod):
    """Reverse water-filling with whole bits: for an exchange rate mu, the tiers that minimise damage + mu * bits, scales
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

    def form(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat:
        return plain_tiers(width, self.least)

    def curve(
        self, shapes: Sequence[StoredShape], spectrum: Sequence[float], noise: float
    ) -> list[tuple[StoredShape, float]]:
        width, heads = len(spectrum), shapes[-1].num_heads
        step = max(self.multiple, -(-width // STEPS // self.multiple) * self.multiple)
        edges = np.array([*range(0, width, step), width])
        damage, bits, cost = self._tiers(np.concatenate([[0.0], np.cumsum(spectrum)]), edges, noise, heads)
        found: dict[tuple[tuple[int, int], ...], float] = {}
        for price in np.geomspace(spectrum[0] / heads, max(spectrum[-1] / heads, 1e-12) * 1e-5, PRICES):
            best = (damage + price * cost).argmin(2)
            tiers, lost = self._path(best, damage, cost, price, edges, bits, float(np.sum(spectrum)), spectrum)
            if tiers:
                found[tiers] = lost
        points = [(StoredShape(heads, sum(n for n, _ in t), NumberFormat(tiers=t)), lost) for t, lost in found.items()]
        return sorted(points, key=lambda point: point[0].bytes_per_token(1))

    def _tiers(
        self, saved: np.ndarray, edges: np.ndarray, noise: float, heads: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Damage and bits [from, to, kinds of bits] of every tier that could be."""
        bits = np.array([b for b in BITS if self.least <= b <= self.most])
        numbers = edges[None, :] - edges[:, None]
        energy = saved[edges][None, :] - saved[edges][:, None]
        shares = np.stack([np.interp(np.maximum(numbers, 1), SIZES, NOISE[b]) for b in bits], axis=2)
        possible = numbers[:, :, None] > 0
        damage = np.where(possible, noise * energy[:, :, None] * shares, np.inf)
        return damage, bits, heads * (numbers[:, :, None] * bits + 8.0)

    def _path(
        self,
        best: np.ndarray,
        damage: np.ndarray,
        cost: np.ndarray,
        price: float,
        edges: np.ndarray,
        bits: np.ndarray,
        total: float,
        spectrum: Sequence[float],
    ) -> tuple[tuple[tuple[int, int], ...], float]:
        """The tiers with the least damage + price * bits, and their damage with that of what is left out."""
        n = len(edges)
        rows, columns = np.indices((n, n))
        tier_damage, tier_cost = damage[rows, columns, best], cost[rows, columns, best]
        objective = np.full((self.tiers + 1, n), np.inf)
        objective[0, 0] = 0.0
        came = np.zeros((self.tiers + 1, n), dtype=int)
        for used in range(1, self.tiers + 1):
            candidates = objective[used - 1][:, None] + tier_damage + price * tier_cost
            came[used] = candidates.argmin(0)
            objective[used] = candidates.min(0)
        left = total - np.concatenate([[0.0], np.cumsum(spectrum)])[edges]
        used, at = np.unravel_index((objective + left).argmin(), objective.shape)
        lost, tiers = float(max(left[at], 0.0)), []
        while used:
            start = came[used, at]
            lost += float(tier_damage[start, at])
            tiers.append((int(edges[at] - edges[start]), int(bits[best[start, at]])))
            used, at = used - 1, start
        return tuple(reversed(tiers)), lost
