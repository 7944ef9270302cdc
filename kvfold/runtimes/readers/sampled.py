"""sampled: tokens are drawn by what the first numbers of their keys foretell, and weighed by how likely that was."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.runtimes.readers.base import Asked, Choice, Reader, for_queries

ROUNDS = 8
"""In which likelihoods above 1 are shared out."""


class Sampled(Reader):
    """Importance sampling: a token is read with probability u, in proportion to the attention that its leading numbers
    foretell, and its score is raised by -log u; the sums over what is read are unbiased, whatever was foretold.

    Systematic: of likelihoods in a row, whose sum is the number of tokens to read, one offset picks every token that a whole
    number falls into. The offset differs from step to step, and is the same for all heads and rows.
    """

    def choose(self, asked: Asked) -> Choice:
        always, S = self.always_BGS(asked), asked.keys.shape[2]
        worth_BGS = asked.attention(asked.leading(self.reading.leading))
        u_BGS = likelihoods(worth_BGS.double().masked_fill(always, 0), asked.count - always.sum(-1, keepdim=True))
        drawn = picked(u_BGS, self._offset(S)) & asked.shown_BGS
        worth = drawn.double().masked_fill(always, 2.0)
        index = worth.topk(asked.count, sorted=False).indices.sort().values
        found = worth.gather(2, index) > 0
        added = -u_BGS.clamp_min(1e-9).log().masked_fill(always, 0.0).gather(2, index).masked_fill(~found, -torch.inf)
        return Choice(index, for_queries(added, asked.queries_BNTR).to(asked.queries_BNTR.dtype), asked.count / S)

    def _offset(self, tokens: int) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(tokens)))


def likelihoods(worth_BGS: Tensor, count_BG1: Tensor) -> Tensor:
    """In proportion to worth, at most 1, and `count` in sum where there is worth for it."""
    u = torch.zeros_like(worth_BGS)
    for _ in range(ROUNDS):
        full = u >= 1
        left = (count_BG1 - full.sum(-1, keepdim=True)).clamp_min(0)
        rest = worth_BGS.masked_fill(full, 0)
        share = left * rest / rest.sum(-1, keepdim=True).clamp_min(1e-300)
        u = torch.where(full, 1.0, share.clamp_max(1))
    return u


def picked(u_BGS: Tensor, offset: float) -> Tensor:
    """bool: of each so many that whole numbers fall into its part of the sum."""
    whole = (u_BGS.cumsum(-1) + offset).floor()
    return whole.diff(dim=-1, prepend=torch.zeros_like(whole[..., :1])) > 0
