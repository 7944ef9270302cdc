"""lsh: tokens whose signatures collide with the query's are read, and weighed by how likely that was (arXiv 2410.16179)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.plan.cache_spec import CACHE_BLOCK
from kvfold.plan.reading import Reading
from kvfold.runtimes.kernels.attention import scores_of
from kvfold.runtimes.kernels.gathering import taken
from kvfold.runtimes.kernels.packed_tokens import Stored, read, read_all
from kvfold.runtimes.readers.base import Asked, Choice, Reader, for_queries

COLLISIONS = 2
"""Tables in which a token and a query agree, so that it is read."""
LEAST_LIKELY = 1e-6


class Lsh(Reader):
    """Signs of random projections (as in Reformer, arXiv 2001.04451), of keys less the mean of the first step's.

    A token is read with a probability u that follows from its angle to the query; so its score is raised by -log u, and the
    sums over what is read are unbiased. At most as many are read as the plan says, those that collide most often.
    """

    @property
    def units(self) -> tuple[int, ...]:
        return CACHE_BLOCK, 1

    def note(self, index: Sequence[Any], keys: Stored, new: int, room: int) -> None:
        signatures, centre = index
        x_BCTR = read(keys, keys.shape[2] - new, keys.shape[2])
        if not centre.end:
            centre.append(x_BCTR.mean(2, keepdim=True), 1)
        signatures.append(self._signed(x_BCTR - centre.tensor()), room)

    def forget(self, index: Sequence[Any], left: int) -> None:
        index[0].end = left

    def choose(self, asked: Asked) -> Choice:
        signatures, centre = asked.index
        hits_BNTS, always = self._collisions(asked, signatures), self.always_BGS(asked)
        often_BGS = asked.by_group(hits_BNTS).amax(2).masked_fill(~asked.shown_BGS, 0)
        wanted_BG = ((often_BGS >= COLLISIONS) | always).sum(-1).clamp_max(asked.count)
        worth = often_BGS.double().masked_fill(always, torch.inf)
        index_BGn = worth.topk(int(wanted_BG.max()), sorted=False).indices.sort().values
        here = for_queries(index_BGn, asked.queries_BNTR)
        fixed = for_queries(always.gather(2, index_BGn), asked.queries_BNTR)
        added = self._added(asked, index_BGn, centre).masked_fill(hits_BNTS.gather(3, here) < COLLISIONS, -torch.inf)
        return Choice(index_BGn, added.masked_fill(fixed, 0.0), wanted_BG.double().mean() / asked.keys.shape[2])

    def _collisions(self, asked: Asked, signatures: Tensor) -> Tensor:
        """[B, N, T, S]: in how many tables."""
        own = self._signed(asked.queries_BNTR)
        group = own.shape[1] // signatures.shape[1]
        hits_BNTS = torch.zeros(*own.shape[:3], signatures.shape[2], dtype=torch.int16, device=own.device)
        for table in range(self.reading.tables):
            stored = signatures[..., table].repeat_interleave(group, dim=1)
            hits_BNTS += own[..., table, None] == stored[:, :, None]
        return hits_BNTS

    def _signed(self, x: Tensor) -> Tensor:
        """[..., tables]."""
        r = self.reading
        planes = _planes(x.shape[-1], r.bits * r.tables).to(x)
        bits = (x @ planes > 0).unflatten(-1, (r.tables, r.bits))
        powers = 2 ** torch.arange(r.bits, device=x.device)
        return (bits * powers).sum(-1).to(torch.uint8 if r.signature_bytes == 1 else torch.int16)

    def _added(self, asked: Asked, index_BGn: Tensor, centre: Tensor) -> Tensor:
        """[B, N, T, n]: -log of how likely each of these tokens is to be read."""
        C = asked.keys.shape[1]
        keys_BCnR = read_all(taken(asked.keys, index_BGn.repeat_interleave(C // asked.groups, dim=1))) - centre
        q = F.normalize(asked.queries_BNTR, dim=-1)
        cosine = scores_of(q, F.normalize(keys_BCnR, dim=-1).to(q.dtype))
        return -likely(cosine.double(), self.reading).clamp_min(LEAST_LIKELY).log().to(q.dtype)


def likely(cosine: Tensor, reading: Reading) -> Tensor:
    """That signatures collide in COLLISIONS tables at least: with p = (1 - angle / pi)^bits for one table,
    1 - (1 - p)^L - L p (1 - p)^(L - 1) for L of them."""
    p = (1 - cosine.clamp(-1, 1).acos() / math.pi) ** reading.bits
    none = (1 - p) ** reading.tables
    once = reading.tables * p * (1 - p) ** (reading.tables - 1)
    return 1 - none - once


@functools.lru_cache(maxsize=8)
def _planes(width: int, count: int) -> Tensor:
    """[width, count]: the same in every layer and run."""
    return torch.randn(width, count, generator=torch.Generator().manual_seed(0))
