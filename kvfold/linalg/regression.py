"""Weighted linear regression of vectors on numbers that are known."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.linalg.eigen import outer_sum

RIDGE = 1e-3
"""Of the variance of each number: there are hundreds of them, and some tens of thousands of tokens."""
LEAST = 1e-6
"""Numbers of less than this share of the largest variance count as of so much: they would need coefficients of millions,
whose products float32 loses."""


def regression(known_TS: Tensor, x_TF: Tensor, weight_T: Tensor) -> Tensor:
    """P [F, S], float64, that minimises sum_t w_t |x_t - P s_t|^2 with a ridge: numbers count as of variance 1 (LEAST). Both
    are without their mean. Products of tokens are of the tokens' dtype."""
    root_T1 = (weight_T / weight_T.sum()).sqrt()[:, None]
    heavy_TS = known_TS * root_T1
    square_SS, cross_SF = outer_sum(heavy_TS, heavy_TS).double(), outer_sum(heavy_TS, x_TF * root_T1).double()
    variance_S = square_SS.diagonal()
    size_S = variance_S.clamp_min(LEAST * variance_S.max().clamp_min(torch.finfo(torch.float64).tiny)).rsqrt()
    square_SS = square_SS * size_S[:, None] * size_S + RIDGE * torch.eye(len(size_S)).to(square_SS)
    return (torch.linalg.solve(square_SS, cross_SF * size_S[:, None]) * size_S[:, None]).T
