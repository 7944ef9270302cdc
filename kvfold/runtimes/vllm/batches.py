"""Which sequences of a step are read together, and what their queries see."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.cache_spec import round_up
from kvfold.plan.token_runs import FEW_TOKENS
from kvfold.runtimes.vllm.pages import Span

TOKENS_ALIKE = 64
"""Of decoding sequences that are read together the longest is taken as a multiple of so many tokens: kernels of matrix
products are made anew for every new shape."""


@dataclass
class Batch:
    """Sequences that are read together.

    rows: their query tokens, one sequence after the other, `queries` of each; lengths: tokens of each sequence, these
    included; tables [B, pages]; width: tokens of a row, at whose end a sequence stands, behind padding. gathered: what
    layers that others read have stored of these sequences, by layer.
    """

    rows: Tensor | slice
    queries: int
    lengths: list[int]
    tables_Bp: Tensor
    width: int
    gathered: dict[int, Any] = dataclasses.field(default_factory=dict)
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def spans(self, window: int | None) -> list[Span]:
        """What the queries of each sequence may see."""
        return self.once(("spans", window), lambda: self._spans(window))

    def _spans(self, window: int | None) -> list[Span]:
        seen = [0 if window is None else max(length - self.queries - window + 1, 0) for length in self.lengths]
        return [Span(start, length) for start, length in zip(seen, self.lengths, strict=True)]

    def seen(self, ages: tuple[int, int]) -> Tensor:
        """[B, 3] of each sequence: the first token of such ages that a query sees, the one behind the last, and where the
        first query stands."""
        return self.once(("seen", ages), lambda: self._seen(*ages))

    def _seen(self, youngest: int, oldest: int) -> Tensor:
        rows = []
        for length in self.lengths:
            position = length - self.queries
            start, end = max(position - oldest + 1, 0), max(length - youngest, 0)
            rows.append((min(start, end), end, position))
        return torch.tensor(rows, dtype=torch.int64)

    @functools.cached_property
    def positions_BS(self) -> Tensor:
        """Of all tokens in their rows; 0 in padding."""
        lengths = torch.tensor(self.lengths, device=self.tables_Bp.device)
        at = torch.arange(self.width, device=lengths.device) - (self.width - lengths)[:, None]
        return at.clamp_min(0)

    def width_of(self, window: int | None) -> int:
        """Of rows that hold what the queries may see."""
        return self.width if window is None else min(self.width, self.queries + window - 1)

    def sees_all(self, window: int | None) -> bool:
        """Whether every query sees all that came before it in its row, of which nothing is padding."""
        S = self.width_of(window)
        return min(self.lengths) >= S and (window is None or window >= S)

    def mask(self, window: int | None) -> Tensor | None:
        """[B, 1, T, S] of what queries see; None where torch's fused kernel knows it: they see all that came before, and are
        one, or as many as tokens."""
        return self.once(("mask", window), lambda: self._mask(window))

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What all layers need and the first one makes."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def _mask(self, window: int | None) -> Tensor | None:
        S, T = self.width_of(window), self.queries
        if T in (1, S) and self.sees_all(window):
            return None
        lengths = torch.tensor(self.lengths, device=self.tables_Bp.device)[:, None, None, None]
        keys = torch.arange(S, device=lengths.device)
        queries = torch.arange(S - T, S, device=lengths.device)[:, None]
        seen = (keys <= queries) & (keys >= S - lengths)
        return seen if window is None else seen & (keys > queries - window)


def batches(starts: Sequence[int], lengths: Sequence[int], tables: Tensor, *, in_place: bool = False) -> list[Batch]:
    """Decoding sequences are one batch, those of similar length where their tokens are copied out of pages and not read
    `in_place`, where those with as many drafted tokens are one too; every piece of a prompt is one. starts: of
    each sequence's query tokens, and where the last one's end."""
    together: dict[tuple[int, int], list[int]] = {}
    for at, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        few = end - start <= (FEW_TOKENS if in_place else 1)
        alike = (0 if in_place else round_up(length, TOKENS_ALIKE).bit_length()) if few else -at
        if end > start:
            together.setdefault((end - start, alike), []).append(at)
    return [_batch(members, queries, starts, lengths, tables) for (queries, _), members in together.items()]


def _batch(members: list[int], queries: int, starts: Sequence[int], lengths: Sequence[int], tables: Tensor) -> Batch:
    rows = _rows(members, queries, starts, tables.device)
    width = max(lengths[at] for at in members)
    width = round_up(width, TOKENS_ALIKE) if queries == 1 else width
    first, last = members[0], members[-1]
    own = tables[first : last + 1] if last - first + 1 == len(members) else tables[members]
    return Batch(rows, queries, [lengths[at] for at in members], own, width)


def _rows(members: list[int], queries: int, starts: Sequence[int], device: torch.device) -> Tensor | slice:
    """Of the step's tokens: a slice where they follow each other, which copies nothing."""
    first = starts[members[0]]
    if all(starts[at] == first + i * queries for i, at in enumerate(members)):
        return slice(first, first + len(members) * queries)
    return torch.cat([torch.arange(starts[at], starts[at] + queries) for at in members]).to(device)
