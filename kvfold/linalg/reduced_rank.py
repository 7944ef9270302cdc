"""The latents that lose least: what a group of layers wants to know of its owner's keys or values, solved in closed form.

The notation is the design's: kappa are the concatenated keys (or values) of a group of heads, z = A kappa is stored by the
owner, and each layer i of the group has its own way back, B_i. Nothing here knows statistics, weights or plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.eigen import discarded_energy, eigh_descending, powers, top_eigenvectors
from kvfold.plan.number_format import StoredShape

TINY = torch.finfo(torch.float64).tiny
RIDGE = 1e-4
"""Of the mean variance of the owner's numbers."""


class Term(NamedTuple):
    """What layer i adds to the objective: E |S (x_i - B_i A x_owner)|^2, in moments.

    second_FF: E[x_i x_i^T]. cross_FF: E[x_i x_owner^T], the owner's own being its second moment. metric: S^T S, None for the
    identity.
    """

    second_FF: Tensor
    cross_FF: Tensor
    metric: BlockDiagonal | None = None


Terms = Callable[[int], Term]
"""Position in the group -> its term, made when it is asked for: one layer's matrices are in memory at a time."""


class Latents(NamedTuple):
    """a_CRF: A of every group of heads. back(i): B_i of every group of heads, [C, F/C, R]. centre_CR: what is subtracted
    before latents are stored."""

    a_CRF: Tensor
    back: Callable[[int], Tensor]
    centre_CR: Tensor | None = None


def solve(terms: Terms, layers: int, heads: int, width: int) -> Latents:
    """`heads` latents of `width` numbers that minimise the sum of the terms of `layers` layers."""
    if layers == 1:
        return _solve_alone(terms(0), heads, width)
    return _solve_shared(terms, layers, heads, width)


def _solve_alone(term: Term, heads: int, width: int) -> Latents:
    """With S^T S the metric, E = leading eigenvectors of S C S^T, A = E^T S, B = S^-1 E: exact at full width whatever the
    data."""
    pairs = []
    for position, second in enumerate(blocks(term.second_FF, heads)):
        if term.metric is None:
            basis = top_eigenvectors(second, width)
            pairs.append((basis.T, basis))
        else:
            root, inverse = term.metric.groups(heads)[position].root()
            basis = top_eigenvectors(root @ (root @ second).T, width)
            pairs.append(((root.mT @ basis).T, inverse @ basis))
    back_CFR = torch.stack([back for _, back in pairs])
    return Latents(torch.stack([a for a, _ in pairs]), lambda position: back_CFR)


def _solve_shared(terms: Terms, layers: int, heads: int, width: int) -> Latents:
    """Reduced-rank regression of all layers on the owner: with W_i = C_io C^-1 and P = sum_i W_i^T S_i^T S_i W_i, the leading
    eigenpairs (l, v) of C^(1/2) P C^(1/2) give A = l^(-1/2) v^T C^(1/2) P and B_i = W_i C^(1/2) v l^(-1/2)."""
    parts = _regress(terms, layers, heads)
    a_CRF = torch.stack([part.solve(width) for part in parts])

    def back(position: int) -> Tensor:
        if not position:
            return torch.stack([part.back(part.owner_FF) for part in parts])
        crosses = blocks(terms(position).cross_FF, heads)
        return torch.stack([part.back(cross) for part, cross in zip(parts, crosses, strict=True)])

    return Latents(a_CRF, back)


def _regress(terms: Terms, layers: int, heads: int) -> list[_Block]:
    parts = [_Block(owner) for owner in blocks(terms(0).second_FF, heads)]
    for position in range(layers):
        term = terms(position)
        crosses = [part.owner_FF for part in parts] if not position else list(blocks(term.cross_FF, heads))
        metrics = [None] * heads if term.metric is None else term.metric.groups(heads)
        for part, cross, metric in zip(parts, crosses, metrics, strict=True):
            part.add(cross, metric)
    return parts


class _Block:
    """The regression of one group of heads, with a ridge: directions in which the owner hardly varies predict nothing, and
    would need numbers so large that float32 loses them."""

    def __init__(self, owner_FF: Tensor) -> None:
        ridge = RIDGE * owner_FF.diagonal().mean().clamp_min(TINY)
        self.owner_FF = owner_FF + ridge * torch.eye(len(owner_FF)).to(owner_FF)
        self.root_FF, self.inverse_FF = powers(self.owner_FF, 0.5, -1)
        self.wanted_FF = torch.zeros_like(self.root_FF)

    def add(self, cross_FF: Tensor, metric: BlockDiagonal | None) -> None:
        regression = cross_FF @ self.inverse_FF
        self.wanted_FF += regression.T @ (regression if metric is None else metric @ regression)

    def eigen(self) -> tuple[Tensor, Tensor]:
        return eigh_descending(self.root_FF @ self.wanted_FF @ self.root_FF)

    def solve(self, width: int) -> Tensor:
        values, vectors = self.eigen()
        scale = values[:width].clamp_min(1e-12 * values[0].clamp_min(TINY)).rsqrt()
        self.lead_FR = self.inverse_FF @ self.root_FF @ vectors[:, :width] * scale
        return (self.wanted_FF @ self.root_FF @ vectors[:, :width] * scale).T

    def back(self, cross_FF: Tensor) -> Tensor:
        return cross_FF @ self.lead_FR


def distortions(terms: Terms, layers: int, shapes: Sequence[StoredShape]) -> list[float]:
    """Per (heads, width): the share of the terms' energy that is lost, times the number of layers."""
    total = sum(energy(terms(position)) for position in range(layers)).clamp_min(TINY)  # type: ignore[union-attr]
    kept = {heads: _kept(terms, layers, heads) for heads in {shape.num_heads for shape in shapes}}
    return [layers * max(float(1 - kept[shape.num_heads][shape.width] / total), 0.0) for shape in shapes]


def spectrum(terms: Terms, layers: int, heads: int) -> list[float]:
    """What every number of `heads` latents saves, in the units of `distortions`, summed over the heads."""
    total = sum(energy(terms(position)) for position in range(layers)).clamp_min(TINY)  # type: ignore[union-attr]
    return [max(layers * float(saved), 0.0) for saved in _kept(terms, layers, heads).diff() / total]


def part_of(term: Term, columns: Tensor) -> Term:
    """The owner's term for some of its numbers."""
    metric = None if term.metric is None else BlockDiagonal(term.metric.dense()[columns][:, columns][None])
    second = term.second_FF[columns][:, columns]
    return Term(second, second, metric)


def lost_energy(term: Term, width: int) -> float:
    """What one latent of `width` numbers loses of the owner's term."""
    kept = _kept(lambda position: term, 1, 1)
    return float((energy(term) - kept[width]).clamp_min(TINY))


def energy(term: Term) -> Tensor:
    """What losing everything costs."""
    return term.second_FF.trace() if term.metric is None else term.metric.inner(term.second_FF)


def _kept(terms: Terms, layers: int, heads: int) -> Tensor:
    """[width + 1]: energy that 0, 1, ... numbers per group of heads keep."""
    if layers == 1:
        term = terms(0)
        kept = torch.zeros(term.second_FF.shape[0] // heads + 1, dtype=torch.float64)
        for position, second in enumerate(blocks(term.second_FF, heads)):
            if term.metric is not None:
                root, _ = term.metric.groups(heads)[position].root()
                second = root @ (root @ second).T
            kept += (1 - discarded_energy(second)) * second.trace()
        return kept
    energies = sum(part.eigen()[0] for part in _regress(terms, layers, heads))
    assert isinstance(energies, Tensor)
    return torch.cat([energies.new_zeros(1), energies.cumsum(0)])


def blocks(moment_FF: Tensor, groups: int) -> Tensor:
    """The diagonal blocks [groups, F/groups, F/groups] that belong to neighbouring heads."""
    size = moment_FF.shape[0] // groups
    return torch.stack([moment_FF[i : i + size, i : i + size] for i in range(0, size * groups, size)])
