"""The few matrix functions that methods share, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-9
"""Eigenvalues below this share of the largest count as this share, where a matrix is inverted."""


def eigh_descending(moment_FF: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [F] from large to small and eigenvectors [F, F] as columns, of a symmetric positive matrix.

    Signs are fixed (the largest entry of a vector is positive), so that the same input gives the same bytes everywhere.
    """
    symmetric = (moment_FF + moment_FF.T).double() / 2
    values, vectors = torch.linalg.eigh(symmetric)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(peak < 0, -1.0, 1.0)


def top_eigenvectors(moment_FF: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors as columns, [F, rank]."""
    return eigh_descending(moment_FF)[1][:, :rank]


def powers(moment_FF: Tensor, *exponents: float, floor: float = RELATIVE_FLOOR) -> list[Tensor]:
    """Powers of a symmetric positive matrix, such as its root (0.5) and its inverse (-1), with floored eigenvalues."""
    values, vectors = eigh_descending(moment_FF)
    values = values.clamp_min(floor * values[0].clamp_min(torch.finfo(torch.float64).tiny))
    return [vectors * values**exponent @ vectors.T for exponent in exponents]


def discarded_energy(moment_FF: Tensor) -> Tensor:
    """Share of the energy that keeping r directions discards, for r = 0 ... F: [F + 1], from 1 down to 0."""
    values = eigh_descending(moment_FF)[0]
    kept = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return (1 - kept / kept[-1].clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)


@dataclass
class Moment:
    """Streamed mean [..., F] and second moment E[x x^T] [..., F, F] of vectors x, float64; leading dimensions are apart."""

    mean_F: Tensor
    second_FF: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, *shape: int, device: torch.device | str = "cpu") -> Moment:
        mean = torch.zeros(*shape, dtype=torch.float64, device=device)
        return cls(mean, mean.new_zeros(*shape, shape[-1]))

    @property
    def covariance_FF(self) -> Tensor:
        return self.second_FF - self.mean_F.unsqueeze(-1) * self.mean_F.unsqueeze(-2)

    def update(self, x_TF: Tensor) -> None:
        """Take T more vectors [T, ..., F] into account."""
        x_TF = x_TF.to(self.second_FF)
        tokens = x_TF.shape[0]
        total = self.count + tokens
        self.mean_F += (x_TF.sum(0) - tokens * self.mean_F) / total
        self.second_FF += (outer_sum(x_TF, x_TF) - tokens * self.second_FF) / total
        self.count = total


def outer_sum(x_TF: Tensor, y_TF: Tensor) -> Tensor:
    """sum_t x_t y_t^T, [..., F, F] of [T, ..., F]."""
    return x_TF.movedim(0, -1) @ y_TF.movedim(0, -2)
