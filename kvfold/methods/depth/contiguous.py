"""contiguous: m layers own a cache, each read by the layers above it up to the next owner (MLKV, arXiv 2406.09297)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.depth.base import DepthMethod, Sample, Targets, by_window, targets_of
from kvfold.plan.cache_spec import divisors
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Contiguous(DepthMethod):
    """The owners of L layers are 0 and int((i + 1) L / m) for i = 0 ... m - 2, which makes equal groups where m divides L.

    Layers with different sliding windows cannot share, so each kind is grouped apart, by its share of m.
    `owners`: m; 0 leaves it to the budget, which prefers few layers per cache but at least two.
    """

    owners: int = 0

    def layouts(self, layers: Sequence[AttentionLayer], sample: Sample | None) -> list[Targets]:
        L = len(layers)
        if self.owners > L or self.owners < 0:
            raise RecipeError(f"depth.owners = {self.owners}, but the model has {L} layers; choose 1 to {L}.")
        counts = [self.owners] if self.owners else [m for m in reversed(divisors(L)) if len(by_window(layers)) <= m < L]
        return [_layout(layers, m) for m in counts]


def _layout(layers: Sequence[AttentionLayer], owners: int) -> Targets:
    owner_of = {}
    kinds = by_window(layers)
    if owners < len(kinds):
        raise RecipeError(
            f"depth.owners = {owners}, but the layers have {len(kinds)} kinds of sliding window, which cannot share; ask for"
            f" at least {len(kinds)}."
        )
    for kind, count in zip(kinds, _shares(owners, [len(kind) for kind in kinds]), strict=True):
        first = [i * len(kind) // count for i in range(count)]
        for position, layer in enumerate(kind):
            owner_of[layer] = kind[max(f for f in first if f <= position)]
    return targets_of(owner_of)


def _shares(owners: int, sizes: Sequence[int]) -> list[int]:
    """`owners` shared out in proportion to `sizes`, at least one each: by largest remainder, so that the sum is exact."""
    shares = [1] * len(sizes)
    while sum(shares) < owners:
        missing = [owners * size / sum(sizes) - share for size, share in zip(sizes, shares, strict=True)]
        open_kinds = [i for i, size in enumerate(sizes) if shares[i] < size]
        shares[max(open_kinds, key=lambda i: missing[i])] += 1
    return shares
