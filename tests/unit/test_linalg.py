"""Fast linear algebra against the obvious one."""

import torch

from kvfold.linalg.eigen import (
    block_powers,
    block_roots,
    diagonal_blocks,
    eigh_descending,
    leading_subspace,
    powers,
    times,
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


def test_powers_of_blocks_are_those_of_the_whole():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9).double()
    whole = torch.block_diag(*(x @ x.transpose(1, 2)))
    assert diagonal_blocks(whole).shape == (3, 4, 4)
    assert diagonal_blocks(torch.ones(6, 6)).shape == (1, 6, 6)
    (root,), (expected,) = block_powers(whole, 0.5), powers(whole, 0.5)
    assert_close(torch.block_diag(*root), expected, tolerance=1e-9)
    y = torch.randn(12, 5).double()
    assert_close(times(root, y), expected @ y, tolerance=1e-9)


def test_block_roots_are_roots():
    """By Cholesky, and where the matrix is singular by eigenvalues."""
    for rank in (6, 2):
        parts = [x.T @ x for x in torch.randn(3, rank, 6, dtype=torch.float64)]
        root, inverse = block_roots(torch.block_diag(*parts))
        assert_close(root.mT @ root, torch.stack(parts), tolerance=1e-7)
        if rank == 6:
            assert_close(inverse @ root, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), tolerance=1e-7)
