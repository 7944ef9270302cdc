"""measured: the layout of m owners whose readers lose least, by how well each layer is regressed on each earlier one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.methods.depth.base import DepthMethod, Sample, Targets, by_window, targets_of
from kvfold.plan.cache_spec import divisors
from kvfold.plan.layer import AttentionLayer

RIDGE = 1e-3
"""Of the mean variance of the owner's numbers: few tokens must not look like a perfect fit."""


@dataclass(frozen=True, kw_only=True)
class Measured(DepthMethod):
    """Damage of a pair = share of the reader's keys and values that a linear map of the owner's does not give, on tokens
    that the map was not fitted on.

    `owners`: m; 0 leaves it to the budget, as in contiguous. `layout`: `contiguous` searches all ways to cut the layers into
    m runs, `any` lets a layer read any earlier owner and adds owners greedily; layers with several kinds of window always
    take the latter, since runs of neighbours would mix them.
    """

    needs_sample: ClassVar[bool] = True

    owners: int = 0
    layout: str = "contiguous"

    def layouts(self, layers: Sequence[AttentionLayer], sample: Sample | None) -> list[Targets]:
        if not 0 <= self.owners <= len(layers):
            raise RecipeError(f"depth.owners = {self.owners}, but the model has {len(layers)} layers.")
        if self.layout not in ("contiguous", "any"):
            raise RecipeError(f"depth.layout = {self.layout!r}; choose 'contiguous' or 'any'.")
        assert sample is not None, "this method needs a sample"
        distortion_LL = pair_distortions(layers, sample)
        search = _cut if self.layout == "contiguous" and len(by_window(layers)) == 1 else _choose
        if self.owners:
            return [search(distortion_LL, self.owners)]
        counts = [m for m in reversed(divisors(len(layers))) if len(by_window(layers)) <= m < len(layers)]
        return [search(distortion_LL, m) for m in counts]


def pair_distortions(layers: Sequence[AttentionLayer], sample: Sample) -> Tensor:
    """[L, L]: distortion of layer l (row) reading the cache of layer o (column); infinite where it cannot."""
    distortion_LL = torch.full((len(layers), len(layers)), math.inf, dtype=torch.float64)
    for owner in layers:
        fits = {name: _Fit(x_TF.double()) for name, x_TF in sample(owner.index).items()}
        distortion_LL[owner.index, owner.index] = 0
        for reader in layers[owner.index + 1 :]:
            if reader.window == owner.window:
                seen = sample(reader.index)
                distortion_LL[reader.index, owner.index] = sum(
                    fit.unexplained(seen[name]) for name, fit in fits.items()
                )
    return distortion_LL


class _Fit:
    """Ridge regression on one owner's vectors, fitted on the even tokens and judged on the odd ones."""

    def __init__(self, x_TF: Tensor) -> None:
        self.mean = x_TF[::2].mean(0)
        fit, self.judge = x_TF[::2] - self.mean, x_TF[1::2] - self.mean
        gram = fit.T @ fit
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=torch.float64)
        self.solve = torch.linalg.solve(gram + ridge, fit.T)

    def unexplained(self, y_TF: Tensor) -> float:
        mean = y_TF[::2].double().mean(0)
        fit, judge = y_TF[::2] - mean, y_TF[1::2] - mean
        error = judge - self.judge @ (self.solve @ fit)
        return min((error.square().sum() / judge.square().sum().clamp_min(1e-30)).item(), 1.0)


def _cut(distortion_LL: Tensor, owners: int) -> Targets:
    """The best m runs of neighbouring layers, by dynamic programming over where the last run begins."""
    L = len(distortion_LL)
    cost = [[sum(distortion_LL[a : b + 1, a].tolist()) for b in range(L)] for a in range(L)]
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for runs in range(1, owners + 1):
        for end in range(runs, L + 1):
            options = [(start, *best[start, runs - 1]) for start in range(end) if (start, runs - 1) in best]
            found = [(spent + cost[start][end - 1], [*starts, start]) for start, spent, starts in options]
            best[end, runs] = min(found)
    _, starts = best[L, owners]
    return targets_of({layer: max(s for s in starts if s <= layer) for layer in range(L)})


def _choose(distortion_LL: Tensor, owners: int) -> Targets:
    """Start from the layers that can read no other, then add the owner that saves most."""
    L = len(distortion_LL)
    chosen = [layer for layer in range(L) if distortion_LL[layer, :layer].isinf().all()]
    if len(chosen) > owners:
        raise RecipeError(
            f"depth.owners = {owners}: layers {chosen} have windows of their own kinds; ask for more owners."
        )
    while len(chosen) < owners:
        rest = [layer for layer in range(L) if layer not in chosen]
        chosen.append(min(rest, key=lambda layer: distortion_LL[:, [*chosen, layer]].min(1).values.sum().item()))
    columns = sorted(chosen)
    nearest = distortion_LL[:, columns].argmin(1)
    return targets_of({layer: layer if layer in chosen else columns[nearest[layer]] for layer in range(L)})
