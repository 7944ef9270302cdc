"""cla: every `factor` neighbouring layers use the lowest one's cache (Cross-Layer Attention, arXiv 2405.12981)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.depth.base import DepthMethod, Sample, Targets, by_window, targets_of
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Cla(DepthMethod):
    """`factor`: layers per cache (CLA2, CLA3, ...), or `owners`: caches; with neither the budget decides, from 2 up.
    `offset`: lowest layers that keep a cache of their own.
    """

    factor: int = 0
    owners: int = 0
    offset: int = 0

    def layouts(self, layers: Sequence[AttentionLayer], sample: Sample | None) -> list[Targets]:
        L = len(layers)
        if self.factor < 0 or not 0 <= self.owners <= L or not 0 <= self.offset < L:
            raise RecipeError(
                f"depth.factor = {self.factor}, depth.owners = {self.owners}, depth.offset = {self.offset} do not fit the"
                f" model's {L} layers."
            )
        if self.factor and self.owners:
            raise RecipeError(
                f"depth.factor = {self.factor} and depth.owners = {self.owners} both say how many layers share a cache; give"
                " one of them, and the other as 0."
            )
        factors = range(1, L + 1) if self.owners else [self.factor] if self.factor else range(2, L + 1)
        found = dict.fromkeys(self._layout(layers, factor) for factor in factors)
        fitting = [targets for targets in found if targets.count(None) == self.owners] if self.owners else list(found)
        if not fitting:
            counts = sorted({targets.count(None) for targets in found})
            raise RecipeError(
                f"depth.owners = {self.owners} fits no whole number of layers per cache; choose one of {counts}."
            )
        return fitting

    def _layout(self, layers: Sequence[AttentionLayer], factor: int) -> Targets:
        owner_of: dict[int, int] = {}
        for kind in by_window(layers):
            shared = [layer for layer in kind if layer >= self.offset]
            owner_of |= {layer: layer for layer in kind if layer < self.offset}
            owner_of |= {layer: shared[i // factor * factor] for i, layer in enumerate(shared)}
        return targets_of(owner_of)
