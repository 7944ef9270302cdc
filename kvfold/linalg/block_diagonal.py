"""Matrices that are blocks on a diagonal, as the blocks: what a metric of separate heads is, and what it is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.linalg.eigen import DEAD, RELATIVE_FLOOR, powers


@dataclass(frozen=True)
class BlockDiagonal:
    """A symmetric positive matrix [F, F] of n equal blocks [n, F/n, F/n]; one block is any matrix."""

    blocks_nbb: Tensor

    def __len__(self) -> int:
        n, b, _ = self.blocks_nbb.shape
        return n * b

    def __matmul__(self, x_FG: Tensor) -> Tensor:
        return (self.blocks_nbb @ x_FG.unflatten(0, (len(self.blocks_nbb), -1))).flatten(0, 1)

    @property
    def mT(self) -> BlockDiagonal:
        """Transposed."""
        return BlockDiagonal(self.blocks_nbb.mT)

    def dense(self) -> Tensor:
        """[F, F]."""
        return torch.block_diag(*self.blocks_nbb)

    def groups(self, count: int) -> list[BlockDiagonal]:
        """The parts [F/count, F/count] on the diagonal; what lies between them, within a block, is left out."""
        n, size = len(self.blocks_nbb), len(self) // count
        if n % count == 0:
            return [BlockDiagonal(part) for part in self.blocks_nbb.unflatten(0, (count, -1))]
        assert count % n == 0, f"{count} groups neither join nor cut {n} blocks"
        starts = range(0, self.blocks_nbb.shape[1], size)
        return [BlockDiagonal(block[None, i : i + size, i : i + size]) for block in self.blocks_nbb for i in starts]

    def inner(self, other_FF: Tensor) -> Tensor:
        """trace(self @ other): the energy of what has these second moments."""
        n, b, _ = self.blocks_nbb.shape
        own = torch.stack([other_FF[i * b : (i + 1) * b, i * b : (i + 1) * b] for i in range(n)])
        return (self.blocks_nbb * own).sum()

    def powers(self, *exponents: float) -> list[BlockDiagonal]:
        """By eigenvalues, each block's floored by its own largest."""
        found = [powers(block, *exponents) for block in self.blocks_nbb]
        return [BlockDiagonal(torch.stack(power)) for power in zip(*found, strict=True)]

    def root(self) -> tuple[BlockDiagonal, BlockDiagonal]:
        """S and its inverse with S^T S = this: by Cholesky, which takes a hundredth of the time of an eigendecomposition, or
        where that fails by the symmetric root with floored eigenvalues."""
        lower, failed = torch.linalg.cholesky_ex(self.blocks_nbb.double())
        diagonal = lower.diagonal(dim1=1, dim2=2)
        least = (RELATIVE_FLOOR**0.5 * diagonal.amax(1)).clamp_min(DEAD**0.5)
        if bool(failed.any()) or bool((diagonal.amin(1) < least).any()):
            root, inverse = self.powers(0.5, -0.5)
            return root, inverse
        eye = torch.eye(lower.shape[1]).to(lower).expand_as(lower)
        return BlockDiagonal(lower.mT), BlockDiagonal(torch.linalg.solve_triangular(lower, eye, upper=False).mT)
