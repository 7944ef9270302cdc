"""pages: the least and the largest of every number of a page's keys say which pages are read (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.plan.cache_spec import CACHE_BLOCK
from kvfold.runtimes.kernels.packed_tokens import Stored, read
from kvfold.runtimes.readers.base import Asked, Choice, Reader


class Pages(Reader):
    """By the most that a query can score in a page."""

    @property
    def units(self) -> tuple[int, ...]:
        return (CACHE_BLOCK // self.reading.page,)

    def note(self, index: Sequence[Any], keys: Stored, new: int, room: int) -> None:
        page, S = self.reading.page, keys.shape[2]
        first = (S - new) // page
        x_BCsR = read(keys, first * page, S)
        beyond = -x_BCsR.shape[2] % page
        x_BCsR = torch.cat([x_BCsR, x_BCsR[:, :, -1:].expand(-1, -1, beyond, -1)], dim=2)
        low, high = x_BCsR.unflatten(2, (-1, page)).aminmax(dim=3)
        (bounds,) = index
        bounds.end = first
        bounds.append(torch.cat([low, high], dim=-1), room // page)

    def forget(self, index: Sequence[Any], left: int) -> None:
        index[0].end = left // self.reading.page  # of a page that is cut the next step notes all tokens

    def choose(self, asked: Asked) -> Choice:
        page, S = self.reading.page, asked.keys.shape[2]
        low, high = asked.index[0].chunk(2, dim=-1)
        q = asked.queries_BNTR
        most_BNTp = asked.scores(torch.cat([q.clamp_max(0), q.clamp_min(0)], dim=-1), torch.cat([low, high], dim=-1))
        if asked.seen is not None:
            most_BNTp = most_BNTp + _largest(asked.seen, page).to(most_BNTp.dtype)
        worth_BGp = asked.by_group(most_BNTp.softmax(-1)).mean(2)
        rank_BGp = worth_BGp.argsort(dim=-1, stable=True).argsort(dim=-1)
        # of the last page that is read in part the first tokens
        worth_BGS = (rank_BGp[..., None] * page + torch.arange(page - 1, -1, -1, device=q.device)).flatten(2)[..., :S]
        return Choice(self.best(worth_BGS.float(), asked), None, asked.count / S)


def _largest(seen: Tensor, page: int) -> Tensor:
    """[..., pages] of numbers to add."""
    least = torch.finfo(seen.dtype).min
    return F.pad(seen, (0, -seen.shape[-1] % page), value=least).unflatten(-1, (-1, page)).amax(-1)
