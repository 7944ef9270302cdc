"""Fast linear algebra against the obvious one."""

import torch

from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.eigen import (
    eigh_descending,
    leading_subspace,
    powers,
)
from kvfold.testing import assert_close


def test_the_leading_subspace_holds_what_the_leading_eigenvectors_hold():
    torch.manual_seed(0)
    mix = torch.randn(300, 300).double() * torch.arange(1, 301).rsqrt()
    moment = mix @ mix.T
    fast, exact = leading_subspace(moment, 60), eigh_descending(moment)[1][:, :60]
    assert_close(fast.T @ fast, torch.eye(60).double(), tolerance=1e-12)
    discarded = [float(moment.trace() - (basis.T @ moment @ basis).trace()) for basis in (fast, exact)]
    assert discarded[1] <= discarded[0] < 1.001 * discarded[1]
    assert torch.equal(fast, leading_subspace(moment, 60))


def test_blocks_are_the_whole_matrix():
    """Products, powers, energies and parts of neighbouring blocks, against the dense matrix."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9).double()
    metric = BlockDiagonal(x @ x.mT)
    whole, y = metric.dense(), torch.randn(12, 5).double()
    assert len(metric) == 12
    assert_close(metric @ y, whole @ y, tolerance=1e-12)
    (root,), (expected,) = metric.powers(0.5), powers(whole, 0.5)
    assert_close(root.dense(), expected, tolerance=1e-9)
    other = torch.randn(12, 12).double()
    assert_close(metric.inner(other), (whole * other).sum(), tolerance=1e-12)
    for count in (1, 2, 4, 12):
        size = 12 // count
        for index, part in enumerate(metric.groups(count)):
            own = slice(index * size, (index + 1) * size)
            assert torch.equal(part.dense(), whole[own, own])


def test_block_roots_are_roots():
    """By Cholesky, and where the matrix is singular by eigenvalues."""
    for rank in (6, 2):
        metric = BlockDiagonal(torch.stack([x.T @ x for x in torch.randn(3, rank, 6, dtype=torch.float64)]))
        root, inverse = metric.root()
        assert_close(root.mT @ root.dense(), metric.dense(), tolerance=1e-7)
        if rank == 6:
            assert_close(inverse @ root.dense(), torch.eye(18, dtype=torch.float64), tolerance=1e-7)
