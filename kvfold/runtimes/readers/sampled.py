"""sampled: tokens are drawn by what the first numbers of their keys foretell, and weighed by how likely that was."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfold.runtimes.readers.base import Asked, Choice, Reader, for_queries


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
        raised_BGS = u_BGS.masked_fill(always | (u_BGS == 0), 1.0).log().neg()
        added = raised_BGS.gather(2, index).masked_fill(~found, -torch.inf)
        return Choice(index, for_queries(added, asked.queries_BNTR).to(asked.queries_BNTR.dtype), asked.count / S)

    def _offset(self, tokens: int) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(tokens)))


def likelihoods(worth_BGS: Tensor, count_BG1: Tensor) -> Tensor:
    """In proportion to worth, at most 1, and `count` in sum where there is worth for it."""
    largest = worth_BGS.sort(-1, descending=True).values
    rest = largest.flip(-1).cumsum(-1).flip(-1)  # of worth, from each on
    left = count_BG1 - torch.arange(worth_BGS.shape[-1], device=worth_BGS.device)  # where all before it are read
    whole = (largest > 0) & (left > 0) & (left * largest >= rest)
    sure = whole.to(torch.int64).cumprod(-1).sum(-1, keepdim=True)
    least = pad(largest, (1, 0), value=torch.inf).gather(-1, sure)
    shared = worth_BGS * (count_BG1.clamp_min(0) - sure) / pad(rest, (0, 1)).gather(-1, sure).clamp_min(1e-300)
    return torch.where(worth_BGS >= least, 1.0, shared.clamp_max(1))


def picked(u_BGS: Tensor, offset: float) -> Tensor:
    """bool: of each so many that whole numbers fall into its part of the sum."""
    whole = (u_BGS.cumsum(-1) + offset).floor()
    return whole.diff(dim=-1, prepend=torch.zeros_like(whole[..., :1])) > 0
