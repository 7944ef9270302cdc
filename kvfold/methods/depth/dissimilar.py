"""dissimilar: the least alike layers share (KVSharer, arXiv 2410.18517), as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfold.errors import RecipeError
from kvfold.methods.depth.base import DepthMethod, Sample, Targets, targets_of
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Dissimilar(DepthMethod):
    """Pairs of layers by falling Euclidean distance of their caches; the higher layer takes the lower one's.

    The published search also throws out pairs that turn the model's last hidden states by more than a threshold; this
    takes the ranking alone. `owners`: layers that keep a cache.
    """

    needs_sample: ClassVar[bool] = True

    owners: int

    def layouts(self, layers: Sequence[AttentionLayer], sample: Sample | None) -> list[Targets]:
        if not 1 <= self.owners <= len(layers):
            raise RecipeError(f"depth.owners = {self.owners}, but the model has {len(layers)} layers.")
        assert sample is not None, "this method needs a sample"
        pairs = sorted(
            (-_distance(sample, low.index, high.index), low.index, high.index)
            for high in layers
            for low in layers[: high.index]
            if low.window == high.window
        )
        owner_of = {layer.index: layer.index for layer in layers}
        read = set()
        for _, low, high in pairs:
            if len(set(owner_of.values())) == self.owners:
                break
            if owner_of[high] == high and owner_of[low] == low and high not in read:
                owner_of[high] = low
                read.add(low)
        if len(set(owner_of.values())) != self.owners:
            raise RecipeError(f"depth.owners = {self.owners} is out of reach by pairs; ask for more.")
        return [targets_of(owner_of)]


def _distance(sample: Sample, low: int, high: int) -> float:
    """Euclidean distance of two layers' caches over the same tokens."""
    a, b = sample(low), sample(high)
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in ("keys", "values")) ** 0.5
