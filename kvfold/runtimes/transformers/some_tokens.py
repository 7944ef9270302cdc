"""The part of the attention module that knows of steps which read some of the stored tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.token_runs import FEW_TOKENS
from kvfold.runtimes.kernels.attention import additive, grouped_attention
from kvfold.runtimes.kernels.chosen_tokens import attend_to, attends
from kvfold.runtimes.kernels.gathering import taken
from kvfold.runtimes.kernels.packed_tokens import IndexedTokens, Stored, read_all
from kvfold.runtimes.readers.base import Asked, Choice, for_queries
from kvfold.runtimes.transformers.on_read import value_map


class AttentionToSome(nn.Module):
    """The part of `FoldedAttention` that reads some of the tokens, which a reader chooses."""

    spec: CacheSpec
    layer: AttentionLayer
    scaling: float
    _absorb: Callable[[Tensor], Tensor]
    _lead_values_back: Callable[[Tensor], Tensor]
    _eager: Callable[[], bool]
    _few: Callable[..., Tensor]

    def _reads_some(self, q: Tensor, z: Any) -> bool:
        if not isinstance(z, IndexedTokens):
            return False
        S = z.shape[2]
        return q.shape[2] <= FEW_TOKENS and z.reader.reading.chosen(S) < S

    def _attend_to_some(
        self, q: Tensor, z: IndexedTokens, y: Stored, mask: Tensor | None, *, wants_probs: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The same as `_attend`, over the tokens that are chosen for these queries."""
        absorbed, (_, C, S, _) = self._absorb(q), z.shape
        queries, groups = absorbed.float() * self.scaling, math.gcd(C, y.shape[1])
        seen = _numbers(mask, queries, S)
        choice = z.reader.choose(
            Asked(
                queries_BNTR=queries, keys=z.stored, index=z.notes, seen=seen, groups=groups,
                count=z.reader.reading.chosen(S), softcap=self.layer.softcap,
            )
        )  # fmt: skip
        z.reader.steps, z.reader.read = z.reader.steps + 1, z.reader.read + choice.share
        hidden = _hidden(seen, choice, absorbed)
        if not (self._eager() or wants_probs) and attends(absorbed, z.stored, y):
            back = value_map(self, q.dtype)
            out = attend_to(absorbed, z.stored, y, choice.index_BGn, hidden, scale=self.scaling, map=back)
            return out if back else self._lead_values_back(out), None
        k = taken(z.stored, choice.index_BGn.repeat_interleave(C // groups, dim=1))
        v = k if y is z.stored else taken(y, choice.index_BGn.repeat_interleave(y.shape[1] // groups, dim=1))
        if not (self._eager() or wants_probs):
            return self._lead_values_back(self._few(absorbed, k, v, hidden)), None
        numbers = read_all(k), read_all(v)
        out, probs = grouped_attention(absorbed, *numbers, hidden, scale=self.scaling, softcap=self.layer.softcap)
        probs_BNTS = probs.new_zeros(*probs.shape[:3], S).scatter(3, for_queries(choice.index_BGn, q), probs)
        return self._lead_values_back(out), probs_BNTS


def _numbers(mask: Tensor | None, q: Tensor, S: int) -> Tensor | None:
    """[B or 1, N or 1, T, S]: what the queries do not see, and alibi, to add to scores; None where they see everything."""
    seen = additive(mask, q.shape[2], S, 0, S, q if mask is None or mask.dtype == torch.bool else mask)
    return None if seen is None else seen[(None,) * (4 - seen.ndim)]


def _hidden(seen: Tensor | None, choice: Choice, q: Tensor) -> Tensor | None:
    """[B, N, T, n]: what is added to the scores of the chosen tokens."""
    added, (B, N, T, _) = choice.added_BNTn, q.shape
    if seen is not None:
        own = seen.expand(B, N, T, seen.shape[-1]).gather(3, for_queries(choice.index_BGn, q))
        added = own if added is None else own + added
    return None if added is None else added.to(q.dtype).clamp_min(torch.finfo(q.dtype).min)
