"""How much predictions depend on each key and value: errors counted in nats, from gradients of sampled labels.

For labels drawn from the model's own predictions, with g_s the gradient of a sequence's summed log-probability by the key (or
value) x_s of token s, small errors d_s cost a KL of 1/2 sum_s E[(g_s . d_s)^2], where errors of different tokens are taken as
independent: the Fisher information. Some tokens, above all the first one, are looked at by all others, so that gradients are
taken as g_s = w_s^(1/2) M^(1/2) e_s: one metric M for all tokens, and a weight for each. A token costs 1/2 w_s d_s^T M d_s;
with mean and covariance taken with these weights low rank and bits follow in closed form, in nats. The weights are those of a
robust fit (Student's t; Lange, Little and Taylor, 1989) after one round; more change nothing (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.linalg.eigen import Moment, outer_sum

FLOOR = 0.3
"""Of a weight, as a share of the mean: one gradient says little of a token."""
RIDGE = 0.01
"""Of the mean variance of gradients: one label per position is a small sample."""
TOGETHER = 1024
"""Numbers of a layer up to which all heads share one metric; beyond, where it would take more text than there is, each head
has its own."""

BLOCK = 4096
"""Tokens whose products are summed in their own dtype."""

WEIGHTED = "weighted_"
METRIC = "metric_of_"
"""Names of the two statistics: WEIGHTED + keys, METRIC + keys, and so on."""
RECENT = "recent_"
"""Before these names: the same, as queries see tokens that stand close by."""

TOKENS, WEIGHTS = "tokens_of_", "weights_of_"
"""Of the calibration tokens themselves: the vectors without their mean, and what each counts."""

Total = Callable[[Tensor], Tensor]
"""The sum of what all processes have."""


class Fit(NamedTuple):
    """Mean and second moment with every token's weight [T], and the metric, the second moment of a Moment without mean: half
    the sum of metric x E_w[error error^T] is what errors cost, in nats per token."""

    moment: Moment
    metric: Moment
    weight_T: Tensor


def sensitivities(name: str) -> frozenset[str]:
    """The two statistics of keys, keys_before_rotation or values."""
    return frozenset({WEIGHTED + name, METRIC + name})


def fit(
    x_TF: Tensor,
    gradient_TF: Tensor,
    heads: int,
    total: Total = lambda part: part,
    mean_F: Tensor | None = None,
) -> Fit:
    """Of x and the gradients by it.

    The metric is [1, F, F], or [heads, H, H] where gradients of different heads are taken as independent (TOGETHER). Each
    process gives the tokens that it has seen. mean_F: what is to count as the mean.
    """
    gradient_TKH = gradient_TF.unflatten(1, (1 if gradient_TF.shape[1] <= TOGETHER else heads, -1))
    count = total(torch.tensor(float(len(x_TF)), dtype=torch.float64, device=x_TF.device))
    plain_KHH = _metric(gradient_TKH, total, count)
    weight_T = _weights(gradient_TKH, plain_KHH)
    metric_KHH = _metric(gradient_TKH / weight_T.sqrt()[:, None, None], total, count)
    moment = _weighted(x_TF, weight_T, total, int(count), mean_F)
    return Fit(moment, Moment(torch.zeros_like(metric_KHH[..., 0]), metric_KHH, int(count)), weight_T)


def _metric(gradient_TKH: Tensor, total: Total, count: Tensor) -> Tensor:
    """E[g g^T] of each part, with a ridge of the mean variance over all."""
    metric_KHH = total(outer_sum(gradient_TKH, gradient_TKH).double()) / count
    size = metric_KHH.diagonal(dim1=1, dim2=2).mean().clamp_min(torch.finfo(torch.float64).tiny)
    return metric_KHH + RIDGE * size * torch.eye(metric_KHH.shape[1]).to(metric_KHH)


def _weights(gradient_TKH: Tensor, metric_KHH: Tensor) -> Tensor:
    """How long every token's gradient is where all directions count the same; about 1 in the mean."""
    if not gradient_TKH.any():  # nobody looks: far queries, where a window is no longer than what is recent
        return torch.ones_like(gradient_TKH[:, 0, 0])
    lower_KHH = torch.linalg.cholesky(metric_KHH).to(gradient_TKH)
    white_KHT = torch.linalg.solve_triangular(lower_KHH, gradient_TKH.permute(1, 2, 0), upper=False)
    return (FLOOR + white_KHT.square().mean((0, 1))) / (FLOOR + 1)


def _weighted(x_TF: Tensor, weight_T: Tensor, total: Total, count: int, mean_F: Tensor | None) -> Moment:
    weight_T = weight_T.double()
    weights = total(weight_T.sum())
    if mean_F is None:
        blocks = zip(x_TF.split(BLOCK), weight_T.split(BLOCK), strict=True)
        mean_F = total(torch.stack([weight_B @ x_BF.double() for x_BF, weight_B in blocks]).sum(0)) / weights
    covariance_FF = total(weighted_outer_sum(x_TF, weight_T, mean_F)) / weights
    return Moment(mean_F.clone(), covariance_FF + mean_F[:, None] * mean_F, count)


def weighted_outer_sum(x_TF: Tensor, weight_T: Tensor, mean_F: Tensor | None = None) -> Tensor:
    """sum_t w_t x_t x_t^T [F, F], of x without the mean if one is given. Products are of x's dtype; sums of blocks of tokens,
    and all else, are of float64."""
    sum_FF = x_TF.new_zeros(x_TF.shape[1], x_TF.shape[1], dtype=torch.float64)
    for x_BF, weight_B in zip(x_TF.split(BLOCK), weight_T.double().split(BLOCK), strict=True):
        left_BF = x_BF.double() if mean_F is None else x_BF - mean_F
        heavy_BF = (left_BF * weight_B.sqrt()[:, None]).to(x_TF)
        sum_FF += outer_sum(heavy_BF, heavy_BF)
    return sum_FF
