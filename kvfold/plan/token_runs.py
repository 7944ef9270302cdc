"""Which tokens of a cache stay: runs of heads, each with a number of tokens that follows from the context."""

from __future__ import annotations

import math
from dataclasses import dataclass

RECENCY, FORESEEN = "recency", "foreseen"
"""Rules by which the first tokens of a sequence stay and the newest; by the second also those that were said to be worth most
when they came, by the layer's input (`s_proj`). All others are scorers, by name: besides those the tokens of a prompt that
they say are worth most."""
WORTH_BYTES = 2
"""Of what a token is said to be worth, in every head that stores it."""
ADDED_BYTES = 2
"""Of what is added to the scores of a token that stands for others as well, in every head that stores it."""
COLUMN_BYTES = 4
"""Of where a token stood, in every head that stores it."""
PROMPTS = ("masked", "whole")
"""What the queries of a prompt see of its tokens."""

FEW_TOKENS = 16
"""A step of at most so many tokens (speculative decoding, short chunks) is decoding, a longer one a prompt."""


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
    `prompt: whole`: a step of more than FEW_TOKENS queries sees all of its own tokens, and what was kept before it; tokens
    are dropped when it ends. A prompt in one step is then read as the original reads it, in pieces it is not.
    Where a scorer is the `rule`, the tokens that a prompt leaves are its first `sinks`, its `newest`, and of those between
    them the best, as many as its run keeps, be it all; they stay while the newest ones pass by, until a prompt comes again.
    Prompts are `whole` then. A sequence of no more than `sinks` + `newest` tokens is one of which nothing was chosen, unless
    it is padded to the length of others. `matched`: what stays of a prompt stands for what does not as well: its scores get
    something added, which is stored beside each token, and its values are made anew.
    `rule: foreseen`: whenever a sequence has a multiple of RUN_BLOCK tokens, of those before the `newest` only the worthiest
    stay, as many as its run keeps in sum, and the first `sinks`; queries from there on do not see the others. What a token is
    worth is said when it comes, so that again a prompt in pieces gives the same. Of a `whole` prompt it is the worthiest of
    all when it ends.
    `columns`: where tokens are chosen by what they are worth, it is stored where each stood, since scores depend on that and
    keys do not tell it (ALiBi; where keys are rotated when they are read it is stored as well).
    """

    runs: tuple[TokenRun, ...]
    rule: str = RECENCY
    sinks: int = 4
    newest: int = 0
    prompt: str = "masked"
    matched: bool = False
    columns: bool = False

    @property
    def scored(self) -> bool:
        """Whether a scorer chooses when a prompt was read."""
        return self.rule not in (RECENCY, FORESEEN)

    @property
    def foreseen(self) -> bool:
        """Whether it is said of every token what it will be worth when it comes."""
        return self.rule == FORESEEN

    def first_newest(self, run: TokenRun, context_len: int, early: int | None = None) -> int:
        """Of a context of so many tokens the position of the first that stays, not counting `early` ones (without it the
        sinks); no smaller than their number. It never falls as the context grows, so that what was dropped is never
        missed."""
        return context_len - max(run.kept(context_len) - (self.sinks if early is None else early), 0)

    def kept(self, context_len: int) -> float:
        """Tokens that stay, in the mean over heads."""
        heads = sum(len(run.heads) for run in self.runs)
        return sum(len(run.heads) * run.kept(context_len) for run in self.runs) / heads
