"""The contract of a reader: what it notes of stored keys, and which tokens it chooses for few queries."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.plan.reading import Reading
from kvfold.runtimes.kernels.attention import scores_of, softmax
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored, read_all


class Choice(NamedTuple):
    """index_BGn: the tokens that each group of stored heads reads. added_BNTn: what scores of its query heads get, beside
    what hides tokens. share: tokens that are read, of all."""

    index_BGn: Tensor
    added_BNTn: Tensor | None
    share: float | Tensor


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Few queries [B, N, T, R], led to stored keys and scaled, and the tokens that they may read, S of them.

    index: what the reader has noted. seen: [B or 1, N or 1, T, S], numbers to add to scores; None where everything is seen.
    groups: of stored heads that read the same tokens. count: of tokens to be read at most.
    """

    queries_BNTR: Tensor
    keys: Stored
    index: Sequence[Tensor]
    seen: Tensor | None
    groups: int
    count: int
    softcap: float | None = None

    def scores(self, queries_BNTR: Tensor, keys_BCSR: Tensor) -> Tensor:
        """[B, N, T, S], capped as the family caps them; not masked."""
        scores = scores_of(queries_BNTR, keys_BCSR.to(queries_BNTR.dtype))
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def leading(self, numbers: int) -> Tensor:
        """[B, N, T, S]: scores by the first numbers of every key."""
        keys = self.keys
        if isinstance(keys, PackedTokens):
            first = read_all(PackedTokens(keys.rows, keys.format, keys.dtype, keys.recent, numbers))
        else:
            first = read_all(keys)[..., :numbers]
        return self.scores(self.queries_BNTR[..., :numbers], first)

    def attention(self, scores_BNTS: Tensor) -> Tensor:
        """[B, G, S]: what the queries of a group attend to in the mean."""
        return self.by_group(softmax(scores_BNTS, self.seen)).mean(2)

    def by_group(self, x_BNTS: Tensor) -> Tensor:
        """[B, G, queries of a group, S]."""
        return x_BNTS.unflatten(1, (self.groups, -1)).flatten(2, 3)

    @functools.cached_property
    def shown_BGS(self) -> Tensor:
        """[B, G, S] bool: what at least one query of the group sees."""
        B, S = len(self.queries_BNTR), self.keys.shape[2]
        if self.seen is None:
            return torch.ones(B, self.groups, S, dtype=torch.bool, device=self.queries_BNTR.device)
        shown = (self.seen > torch.finfo(self.seen.dtype).min / 2).any(2)
        return shown.expand(B, max(shown.shape[1], self.groups), S).unflatten(1, (self.groups, -1)).any(2)


def for_queries(x_BGn: Tensor, q_BNTR: Tensor) -> Tensor:
    """[B, N, T, n]: what is said of groups of stored heads, for each of their queries."""
    _, N, T, _ = q_BNTR.shape
    return x_BGn.repeat_interleave(N // x_BGn.shape[1], dim=1)[:, :, None].expand(-1, -1, T, -1)


class Reader(ABC):
    """Chooses for few queries. One of each cache; `read` and `steps` count what it did."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.read: Any = 0.0
        self.steps = 0

    @property
    def units(self) -> tuple[int, ...]:
        """Of every tensor that it keeps beside the cache, by how many rows it grows."""
        return ()

    def note(self, index: Sequence[Any], keys: Stored, new: int, room: int) -> None:  # noqa: B027
        """Note what is to be known of the last `new` tokens, in buffers that have room for so many tokens."""

    def forget(self, index: Sequence[Any], left: int) -> None:  # noqa: B027
        """Forget what was noted of tokens beyond the first `left`."""

    @abstractmethod
    def choose(self, asked: Asked) -> Choice:
        """What is read."""

    def always_BGS(self, asked: Asked) -> Tensor:
        """[B, G, S] bool: the first tokens of each sequence, and the newest."""
        shown = asked.shown_BGS
        newest = torch.arange(shown.shape[2], device=shown.device) >= shown.shape[2] - self.reading.newest
        return shown & ((shown.cumsum(2) <= self.reading.sinks) | newest)

    def best(self, worth_BGS: Tensor, asked: Asked) -> Tensor:
        """[B, G, count]: the tokens of most worth, beside those that are always read."""
        worth = worth_BGS.masked_fill(~asked.shown_BGS, -1.0).masked_fill(self.always_BGS(asked), torch.inf)
        return worth.topk(asked.count, sorted=False).indices.sort().values


CONTRACT = Reader
