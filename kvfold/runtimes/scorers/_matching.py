"""Tokens that stay stand for those that do not: attention matching in closed form (arXiv 2602.16284).

The prompt's own queries, asked again behind it, are to get of what stays what they would get of everything: first the same
sum of exponentials, by a weight for every token, then the same average, by other values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold.runtimes.kernels.attention import scores_of
from kvfold.runtimes.kernels.gathering import gather_tokens
from kvfold.runtimes.scorers.base import QUERIES, Prompt

EVERY = 2
"""Of the queries that are asked again one in so many is matched: what is solved grows with their square."""
ROUNDS = 5
"""Of multiplicative steps, which keep weights positive."""
RIDGE = 1e-2
"""Towards the values that are there, relative to what one token weighs in the mean."""
MOST = 1e3
"""Of weights, which are 1 at least: a token stands for itself, whatever a few queries say."""


def matched(prompt: Prompt, heads: Any, index_BCn: Tensor, counts_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the scores of the tokens that stay [B, C, n], besides what was, and their values [B, C, n, V]. heads:
    picks theirs of the stored heads. counts_Bn: which of them do."""
    values_BCnV = gather_tokens(prompt.values_BCSV[:, heads], index_BCn)
    ways = _by_kernel if prompt.by_kernel and prompt.hidden_at_the_end is None and not prompt.again else _by_all
    shares_BCMn, wanted_BCMV = ways(prompt, heads, index_BCn)
    shares_BCMn = shares_BCMn * counts_Bn[:, None, None]
    weights_BCn = weights_of(shares_BCMn)
    weighed = shares_BCMn * weights_BCn[:, :, None]
    mass_BCM1 = weighed.sum(-1, keepdim=True)
    weighed = weighed / mass_BCM1.clamp_min(1e-30)
    missing_BCMV = wanted_BCMV - weighed @ values_BCnV.to(weighed.dtype)
    missing_BCMV = missing_BCMV * (mass_BCM1 > 0)  # of what stays a query may see nothing
    change = ridge(weighed.double(), missing_BCMV.double(), counts_Bn.sum(-1)[:, None])
    return weights_BCn.log(), (values_BCnV + change).to(values_BCnV.dtype)


def _by_all(prompt: Prompt, heads: Any, index_BCn: Tensor) -> tuple[Tensor, Tensor]:
    """Of all attention of matched queries what the tokens that stay get [B, C, M, n], and the averages [B, C, M, V]."""
    S = prompt.keys_BCSR.shape[2] - prompt.again
    probs_BCMS, values_BCSV = _of(prompt, heads, prompt.asked_again)[..., :S], prompt.values_BCSV[:, heads, :S]
    probs_BCMS = probs_BCMS / probs_BCMS.sum(-1, keepdim=True)
    shares_BCMn = probs_BCMS.gather(3, index_BCn[:, :, None].expand(-1, -1, probs_BCMS.shape[2], -1))
    return shares_BCMn, (probs_BCMS.to(values_BCSV.dtype) @ values_BCSV).to(probs_BCMS.dtype)


def _by_kernel(prompt: Prompt, heads: Any, index_BCn: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the kernel has said what all scores sum up to, and the averages."""
    losses = prompt.first_losses
    found = (prompt.absorbed_again.float(), losses.log_sums_BnQ[..., None], losses.averages_BnQV)
    queries_BCMR, log_sums_BCM1, averages_BCMV = (_of(prompt, heads, x) for x in found)
    # as exactly as the sums are: what remains of a large score is a difference of both
    scores_BCMn = scores_of(queries_BCMR, gather_tokens(prompt.keys_BCSR[:, heads], index_BCn).float())
    return (prompt.capped(scores_BCMn) - log_sums_BCM1).exp(), averages_BCMV


def _of(prompt: Prompt, heads: Any, x_BnQX: Tensor) -> Tensor:
    """[B, C, M, X]: of the queries that are matched, by the stored heads that they read."""
    return (
        x_BnQX[:, :, EVERY // 2 : QUERIES : EVERY].unflatten(1, (prompt.keys_BCSR.shape[1], -1))[:, heads].flatten(2, 3)
    )


def weights_of(shares_BCMn: Tensor) -> Tensor:
    """[B, C, n]: sums of shares, weighed by them, are as near to 1 as can be in the mean square, before weights below 1 are
    taken as 1."""
    shares, reached = shares_BCMn.flatten(0, 1), shares_BCMn.sum(2).view(-1, shares_BCMn.shape[3], 1)
    weights, transposed = torch.ones_like(reached), shares.mT
    for _ in range(ROUNDS):
        back = transposed.bmm(shares.bmm(weights))
        weights = weights.mul(reached).div_(back.clamp_min_(1e-20))
    return weights.clamp_(1, MOST).view(*shares_BCMn.shape[:2], -1)


def ridge(x_BCMn: Tensor, y_BCMV: Tensor, tokens: Tensor) -> Tensor:
    """[B, C, n, V], the small solution of x d = y, by the smaller system of both: x^T (x x^T + l)^-1 y. tokens [B or 1, 1]:
    how many have weight in x."""
    gram = x_BCMn @ x_BCMn.transpose(2, 3)
    mean_BC = gram.diagonal(dim1=2, dim2=3).sum(-1) / tokens
    gram.diagonal(dim1=2, dim2=3).add_(RIDGE * mean_BC[..., None])
    root, _ = torch.linalg.cholesky_ex(gram)  # which passes on what is no number, as all attention does
    return x_BCMn.transpose(2, 3) @ torch.cholesky_solve(y_BCMV, root)
