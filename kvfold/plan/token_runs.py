"""Which tokens of a cache stay: runs of heads, each with a number of tokens that follows from the context."""

from __future__ import annotations

import math
from dataclasses import dataclass

RULES = ("recency",)
"""How the tokens of a run are chosen. recency: the first ones of a sequence, and the newest."""


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """Stored heads that keep equally many tokens: of a context of L tokens min(L, max(least, ceil(share * L))).

    `heads`: which, counted from 0. `share`: of the context; 1 keeps everything. `least`: tokens that stay however short the
    context is; with share 0 a window of a fixed size.
    """

    heads: tuple[int, ...]
    share: float = 1.0
    least: int = 0

    @property
    def keeps_all(self) -> bool:
        return self.share >= 1

    def kept(self, context_len: int) -> int:
        """Tokens that stay of `context_len`."""
        return min(context_len, max(self.least, math.ceil(self.share * context_len)))


@dataclass(frozen=True, kw_only=True)
class TokenRuns:
    """Which tokens each head of a cache keeps; part of the plan.

    Of the tokens up to its own, L in number, a query sees the first `sinks` and the newest, as many in sum as its run keeps
    of L. That depends on nothing but positions, so that a prompt in one step, in pieces or token by token gives the same.
    """

    runs: tuple[TokenRun, ...]
    rule: str = "recency"
    sinks: int = 4

    def first_newest(self, run: TokenRun, context_len: int) -> int:
        """Of a context of so many tokens the position of the first that stays, not counting the sinks; no smaller than their
        number. It never falls as the context grows, so that what was dropped is never missed."""
        return context_len - max(run.kept(context_len) - self.sinks, 0)

    def kept(self, context_len: int) -> float:
        """Tokens that stay, in the mean over heads."""
        heads = sum(len(run.heads) for run in self.runs)
        return sum(len(run.heads) * run.kept(context_len) for run in self.runs) / heads
