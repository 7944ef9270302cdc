"""Which bytes of vLLM's paged cache are whose.

vLLM is told of few layers, each of one row of bytes per token: one for all layers that see everything, one for each width of
sliding windows, and one for the finer form of recent tokens, a window too. What a layer of the model stores is a region of a
page's interior, `[layer][keys, values][head][token][bytes]`. So layers may store as many bytes as they like without waste,
share a block table, and read the tokens of layers below where they stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.number_format import StoredShape
from kvfold.runtimes.kernels.dispatch import pack
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, PagedTokens, read_all
from kvfold.runtimes.kernels.paging import gather, scatter

RECENT = "recent"
"""The kind of page that holds the finer form of recent tokens; others are named by the window of their layers, or None."""

Kind = Hashable

NO_TABLES = torch.empty(0, 0, dtype=torch.int32)


class Region(NamedTuple):
    """Where one side of a layer lies: behind `offset` bytes of each token of the page; `row_bytes` of each head and token."""

    offset: int
    side: StoredShape
    row_bytes: int


class Span(NamedTuple):
    """The tokens start:end of a sequence."""

    start: int
    end: int


class PageFormat:
    """The regions of one kind of page. `sides`: by (layer, "k" or "v"). dtype: of numbers that are stored as they are."""

    def __init__(self, sides: Mapping[tuple[int, str], StoredShape], dtype: torch.dtype) -> None:
        self.dtype, self.row_bytes = dtype, 0
        self.regions: dict[tuple[int, str], Region] = {}
        self.made: dict[tuple[int, str], tuple[Any, Tensor]] = {}
        for key, side in sides.items():
            row_bytes = side.width * dtype.itemsize if side.format is None else side.format.row_bytes
            self.regions[key] = Region(self.row_bytes, side, row_bytes)
            self.row_bytes += side.num_heads * row_bytes

    def rows(self, pages: Tensor, key: tuple[int, str]) -> Tensor:
        """[pages, heads, tokens, row_bytes]: a region of all pages, without a copy. pages: [pages, 1, tokens, bytes], of
        which each is one piece of memory. Made once as long as they stay where they are."""
        state = pages.data_ptr(), pages.shape, pages.stride()
        if self.made.get(key, (None,))[0] != state:
            self.made[key] = state, self._region(pages, key)
        return self.made[key][1]

    def _region(self, pages: Tensor, key: tuple[int, str]) -> Tensor:
        offset, side, row_bytes = self.regions[key]
        count, _, tokens, _ = pages.shape
        strides = (pages.stride(0), tokens * row_bytes, row_bytes, 1)
        return pages.as_strided(
            (count, side.num_heads, tokens, row_bytes), strides, pages.storage_offset() + offset * tokens
        )

    def write(
        self, rows: Tensor, key: tuple[int, str], slots_T: Tensor, x_CTR: Tensor, *, read: bool = False
    ) -> Tensor | None:
        """Store tokens in rows of a region where their slots are (page * tokens + place; -1: nowhere); `read`: return them
        [C, T, R] as they are stored."""
        format = self.regions[key].side.format
        packed = x_CTR.contiguous().view(torch.uint8) if format is None else pack(x_CTR[None], format)[0]
        scatter(rows, slots_T, packed)
        if not read:
            return None
        return x_CTR if format is None else read_all(PackedTokens(packed[None], format, x_CTR.dtype))[0]

    def read(
        self,
        pages: Tensor,
        key: tuple[int, str],
        tables_Bp: Tensor,
        spans: Sequence[Span],
        width: int,
        fresh_BCTX: Tensor | None = None,
    ) -> PackedTokens | Tensor:
        """[B, heads, width, R]: the spans of sequences, whose pages the tables name, each at the end of its row. fresh: rows
        of the last tokens of each, which are taken from there."""
        side, fresh = self.regions[key].side, 0 if fresh_BCTX is None else fresh_BCTX.shape[2]
        before = [Span(start, end - fresh) for start, end in spans]
        parts = [] if fresh == width else [gather(self.rows(pages, key), tables_Bp, before, width - fresh)]
        parts += [] if fresh_BCTX is None else [fresh_BCTX]
        rows_BCSX = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if side.format is None:
            return rows_BCSX.view(self.dtype)
        return PackedTokens(rows_BCSX, side.format, self.dtype)

    def fresh(self, key: tuple[int, str], tokens: int, device: torch.device) -> Tensor:
        """[1, heads, tokens, row_bytes]: one page for so many tokens of a region, by itself."""
        _, side, row_bytes = self.regions[key]
        return torch.empty(1, side.num_heads, tokens, row_bytes, dtype=torch.uint8, device=device)

    def lying(
        self, pages: Tensor, key: tuple[int, str], of_width: Callable[[int], int] = lambda width: width
    ) -> PagedTokens:
        """Tokens where they lie, of no sequences yet. of_width: of so many numbers, how many are asked for."""
        side = self.regions[key].side
        return PagedTokens(self.rows(pages, key), side.format, self.dtype, NO_TABLES, of_width(side.width))


class Layout:
    """All kinds of pages of one model."""

    def __init__(self, owned: Mapping[int, CacheSpec], dtype: torch.dtype) -> None:
        kinds: dict[Kind, dict[tuple[int, str], StoredShape]] = {}
        for layer, spec in owned.items():
            kinds.setdefault(spec.window, {}).update(_sides(layer, spec.sides))
            if spec.recent:
                kinds.setdefault(RECENT, {}).update(_sides(layer, spec.of_recent.sides))
        self.formats = {kind: PageFormat(sides, dtype) for kind, sides in kinds.items()}
        self.recent = max((spec.recent for spec in owned.values()), default=0)

    def page_tokens(self, asked: int) -> tuple[dict[Kind, int], int]:
        """(tokens of a page of every kind, bytes of a page): pages of all kinds are equally large.

        Of one kind they have as many tokens as asked for; else up to three times as many, so that as little as possible is
        left over."""
        rows = {kind: format.row_bytes for kind, format in self.formats.items()}
        if len(rows) == 1:
            (kind,) = rows
            return {kind: asked}, asked * rows[kind]
        candidates = [_shared_out(rows, tokens) for tokens in range(asked, 3 * asked + 1)]
        return min(candidates, key=lambda found: _left_over(rows, *found))


def _shared_out(rows: Mapping[Kind, int], tokens: int) -> tuple[dict[Kind, int], int]:
    """Pages that hold `tokens` of the kind with the longest rows that is no finer form, and of other kinds a multiple or a
    divisor of so many: vLLM compares prompts by the greatest common divisor of all."""
    longest = max(row for kind, row in rows.items() if kind != RECENT)
    page = max(longest * tokens, max(rows.values()))
    found = {}
    for kind, row in rows.items():
        fitting = page // row
        found[kind] = (
            fitting // tokens * tokens
            if fitting >= tokens
            else max(d for d in range(1, fitting + 1) if tokens % d == 0)
        )
    return found, page


def _left_over(rows: Mapping[Kind, int], tokens: Mapping[Kind, int], page: int) -> tuple[float, int]:
    """(what the worst filled page leaves over, tokens that prompts are compared by)."""
    return max(1 - tokens[kind] * row / page for kind, row in rows.items()), math.lcm(*tokens.values())


def _sides(layer: int, sides: Sequence[StoredShape]) -> dict[tuple[int, str], StoredShape]:
    return {(layer, name): side for name, side in zip("kv", sides, strict=True) if side.num_heads}
