"""Latents of several layers together, and the maps from an owner to its readers."""

from __future__ import annotations

import pytest
import torch

from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.reduced_rank import Term, distortions, solve
from kvfold.plan.number_format import StoredShape
from kvfold.testing import assert_close


def test_regression_finds_a_planted_linear_map():
    """Readers whose vectors are a linear map of the owner's lose nothing at full width, nor at the planted rank."""
    torch.manual_seed(0)
    rank, size = 6, 16
    x = torch.randn(400, rank, dtype=torch.float64) @ torch.randn(rank, size, dtype=torch.float64)
    maps = [torch.eye(size, dtype=torch.float64), *torch.randn(2, size, size, dtype=torch.float64)]
    metrics = [None, BlockDiagonal(torch.diag(torch.rand(size, dtype=torch.float64) + 0.1)[None]), None]
    vectors = [x @ m.T for m in maps]

    def terms(i):
        return Term(vectors[i].T @ vectors[i] / 400, vectors[i].T @ x / 400, metrics[i])

    for width in (rank, size):
        latents = solve(terms, 3, 1, width)
        for position, expected in enumerate(vectors):
            rebuilt = x @ latents.a_CRF[0].T @ latents.back(position)[0].T
            assert_close(rebuilt, expected, tolerance=2e-3)
    lost = distortions(terms, 3, [StoredShape(1, width) for width in (2, 4, rank)])
    assert lost[0] > lost[1] > lost[2] == pytest.approx(0, abs=1e-3)


def test_regression_of_one_layer_is_the_solution_without_regression():
    torch.manual_seed(0)
    x = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    second, metric = x.T @ x / 500, BlockDiagonal(torch.diag(torch.rand(12, dtype=torch.float64) + 0.1)[None])
    alone = solve(lambda i: Term(second, second, metric), 1, 1, 5)
    twice = solve(lambda i: Term(second, second, metric), 2, 1, 5)
    assert_close(twice.back(1)[0] @ twice.a_CRF[0], alone.back(0)[0] @ alone.a_CRF[0], tolerance=2e-3)
