"""Value latents by alternating least squares."""

import pytest
import torch

from kvfold.averaging import solve_averaged
from kvfold.linalg import powers
from kvfold.testing import assert_close

HEADS, HEAD_DIM = 4, 6
F = HEADS * HEAD_DIM


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(HEADS, 200, F, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, F)
    turn = torch.linalg.qr(torch.randn(HEADS, F, F, dtype=torch.float64, generator=generator))[0]
    moments = (x @ turn).transpose(1, 2) @ (x @ turn) / 200
    w = torch.randn(HEADS, 9, HEAD_DIM, dtype=torch.float64, generator=generator)
    return moments, torch.block_diag(*(w.transpose(1, 2) @ w))


def lost(moments, metric, latents):
    """sum_k tr M_k (S_k - B_k A) Y_k (S_k - B_k A)^T over all groups."""
    heads = len(latents.a_CRF)
    t, size, total = HEADS // heads, F // heads, torch.zeros((), dtype=torch.float64)
    for k in range(HEADS):
        u = k // t
        group, own = slice(u * size, (u + 1) * size), slice(k * HEAD_DIM, (k + 1) * HEAD_DIM)
        inside = slice(k % t * HEAD_DIM, (k % t + 1) * HEAD_DIM)
        error = torch.eye(size, dtype=torch.float64)[inside] - latents.back(0)[u][inside] @ latents.a_CRF[u]
        total += (metric[own, own] * (error @ moments[k][group, group] @ error.T)).sum()
    return total


@pytest.mark.parametrize("heads", [1, 2])
def test_sweeps_lower_the_loss(problem, heads):
    losses = [lost(*problem, solve_averaged(*problem, heads, 5, sweeps)).item() for sweeps in (0, 1, 3, 6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_the_loss_is_that_of_the_averaged_values(problem):
    """By sampling: sum_k E |W^k (y_kk - B_k A y_k)|^2 for values with the given moments."""
    moments, metric = problem
    latents = solve_averaged(moments, metric, 1, 5, 3)
    total = 0.0
    for k in range(HEADS):
        own = slice(k * HEAD_DIM, (k + 1) * HEAD_DIM)
        (y,) = powers(moments[k], 0.5)  # columns whose second moment is the given one
        error = y[own] - latents.back(0)[0][own] @ latents.a_CRF[0] @ y
        total += (error * (metric[own, own] @ error)).sum()
    assert_close(lost(moments, metric, latents), total, tolerance=1e-6)


def test_heads_that_average_alike_need_no_sweeps(problem):
    moments, metric = problem
    alike = moments.mean(0).expand(HEADS, -1, -1)
    closed, swept = (lost(alike, metric, solve_averaged(alike, metric, 1, 5, sweeps)) for sweeps in (0, 6))
    assert_close(closed, swept, tolerance=1e-6)


def test_full_width_loses_nothing(problem):
    latents = solve_averaged(*problem, 2, F // 2, 3)
    for u in range(2):
        assert_close(latents.back(0)[u] @ latents.a_CRF[u], torch.eye(F // 2, dtype=torch.float64), tolerance=1e-9)
