"""The few matrix functions that methods share, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_FLOOR = 1e-9
"""Eigenvalues below this share of the largest count as this share, where a matrix is inverted."""

DEAD = 1e-200
"""Matrices no larger than this are of nothing: their inverse would not be finite in float32."""

LARGE = 2048
"""Numbers from which only the wanted eigenvectors are computed."""
MOST_ITERATIONS = 12
SETTLED = 1e-5
"""Growth of the energy in a subspace, as a share of it, below which the subspace is taken as found."""


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
    """The `rank` leading eigenvectors as columns, [F, rank]; of large matrices the leading subspace, by iteration."""
    if len(moment_FF) >= LARGE and rank <= len(moment_FF) // 3:
        return leading_subspace(moment_FF, rank)
    return eigh_descending(moment_FF)[1][:, :rank]


def leading_subspace(moment_FF: Tensor, rank: int) -> Tensor:
    """Eigenvectors [F, rank] by block power iteration: matrix products, where a full decomposition of 4,096 numbers takes a
    minute on two cores.

    The iteration multiplies in float32, which only turns the subspace by its rounding, until the energy that the subspace
    holds no longer grows. The eigenvectors within it (Rayleigh-Ritz) are found in float64.
    """
    rough_FF, F = moment_FF.float(), len(moment_FF)
    generator = torch.Generator().manual_seed(0)  # the same input gives the same bytes
    basis = torch.randn(F, min(rank + rank // 8 + 16, F), generator=generator, dtype=torch.float64).to(moment_FF.device)
    energy = 0.0
    for _ in range(MOST_ITERATIONS):
        basis = _orthonormal(basis)
        image = (rough_FF @ basis.float()).double()
        before, energy = energy, (basis * image).sum().item()
        if energy - before <= SETTLED * energy:
            break
        basis = image
    basis = _orthonormal(basis)
    within = eigh_descending(basis.T @ (moment_FF.double() @ basis))[1]
    return basis @ within[:, :rank]


def _orthonormal(basis_FR: Tensor) -> Tensor:
    """By Cholesky of the Gram matrix, twice where once is not exact enough; by Householder where columns are too alike."""
    basis_FR = basis_FR / basis_FR.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    for _ in range(2):
        gram = basis_FR.T @ basis_FR
        if (gram - torch.eye(len(gram)).to(gram)).abs().max() < 1e-10:
            return basis_FR
        lower, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            return torch.linalg.qr(basis_FR)[0]
        basis_FR = torch.linalg.solve_triangular(lower, basis_FR.T, upper=False).T
        if lower.diagonal().min() > 1e-3:  # the columns were far from alike: no digits were lost
            return basis_FR
    return basis_FR


def largest_of(values_F: Tensor) -> Tensor:
    """Of falling ones the first; 1 of what is nothing, so that it may be divided by."""
    return torch.where(values_F[0] > DEAD, values_F[0], 1.0)


def powers(moment_FF: Tensor, *exponents: float, floor: float = RELATIVE_FLOOR) -> list[Tensor]:
    """Powers of a symmetric positive matrix, such as its root (0.5) and its inverse (-1), with floored eigenvalues."""
    values, vectors = eigh_descending(moment_FF)
    values = values.clamp_min(floor * largest_of(values))
    return [vectors * values**exponent @ vectors.T for exponent in exponents]


def discarded_energy(moment_FF: Tensor) -> Tensor:
    """Share of the energy that keeping r directions discards, for r = 0 ... F: [F + 1], from 1 down to 0."""
    values = torch.linalg.eigvalsh((moment_FF + moment_FF.T).double() / 2).flip(0).clamp_min(0)
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
