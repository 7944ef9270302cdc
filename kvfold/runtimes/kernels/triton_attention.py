"""Launches the GPU's attention kernels (triton_kernels.py): few queries over packed numbers, in one piece or in pages.

One launch for each place that keys or values lie in, however many widths of bits they have there, and two more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kvfold.runtimes.kernels.packed_tokens import PackedTokens, PagedTokens
from kvfold.runtimes.kernels.tiles import (
    NUMBERS,
    TIER_FIELDS,
    TILE_FIELDS,
    count_of,
    order_of,
    tiers_in_tiles,
    tiles_of,
)
from kvfold.runtimes.kernels.triton_codes import device_of
from kvfold.runtimes.kernels.triton_kernels import _arrange, _join, _scores, _share_out, _weighted
from kvfold.runtimes.kernels.triton_words import INTERPRETED

TOKENS, WARPS = 128, 4
"""Of a tile, of whose codes each thread has a few words."""
MOST_QUERIES, MOST_SHARES, AT_ONCE = 64, 256, 128
"""AT_ONCE: blocks of a row whose shares are told at a time."""
SPLIT, PROGRAMS = 8, 512
"""Blocks of tokens of a sum that one program takes; fewer where there would be fewer programs than these."""
Packed = PackedTokens | PagedTokens


class Meeting(NamedTuple):
    """Queries as they meet the numbers of a stored head: `data`, of which one takes `width` tiles of numbers. Those of a head
    are groups of `each` rows. group, batch, tile, function: strides, in tiles of numbers. Turned ones stand for `tokens`
    tokens, a tile, and have `functions` shares each, by basis [functions, tokens]; constants are added to the products of
    each share."""

    data: Tensor
    width: int
    each: int
    group: int
    batch: int
    tile: int = 0
    function: int = 0
    functions: int = 1
    tokens: int = 1
    basis: Tensor | None = None
    constants: Tensor | None = None


class Span(NamedTuple):
    """Which tokens count. tokens, position: of all sequences alike, or `sequences` [B, 3] int32 says of each: the first, the
    one behind the last, and where its first query stands. blocks: of TOKENS tokens, which the longest one takes, counted from
    a multiple of `aligned` on."""

    tokens: int
    position: int
    blocks: int
    aligned: int = TOKENS
    sequences: Tensor | None = None

    def facts(self) -> tuple[Any, ...]:
        return self.tokens, self.position


class Marks(NamedTuple):
    """What a softmax needs of scores: exp(score - the largest of its block) [B, N * T, blocks * TOKENS], what those of a
    block weigh [B, N * T, blocks, 2] (the first of both), and log-sums [B, N, T]."""

    exponentials: Tensor
    shares: Tensor
    log_sums: Tensor


def arranged(q_BNTR: Tensor, parts: list[Packed]) -> Meeting:
    """Absorbed queries, as they meet stored keys."""
    (B, N, T, R), C = q_BNTR.shape, parts[0].shape[1]
    order = order_of(tuple((part.format, part.width) for part in parts), q_BNTR.device)
    out = q_BNTR.contiguous()
    if len(order) > R:  # some tiles are not full
        out = q_BNTR.new_empty(B, N * T, len(order))
        with device_of(q_BNTR):
            _arrange[(B * N * T, -(-len(order) // 512))](q_BNTR.contiguous(), order, out, R, len(order), BLOCK=512)
    each = N // C * T
    tiles = len(order) // NUMBERS
    return Meeting(out, tiles, each, each * tiles, N * T * tiles)


def marks_of(B: int, N: int, T: int, span: Span, like: Tensor) -> Marks:
    """Room for them."""
    half = torch.bfloat16 if like.dtype == torch.bfloat16 and not INTERPRETED else torch.float32
    return Marks(
        like.new_empty(B, N * T, span.blocks * TOKENS, dtype=half),
        like.new_empty(B, N * T, span.blocks, 2, dtype=torch.float32),
        like.new_empty(B, N, T, dtype=torch.float32),
    )


def add_exponentials(
    marks: Marks,
    meeting: Meeting,
    parts: list[Packed],
    span: Span,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    ages: tuple[int, int],
    dtype: torch.dtype,
    some: tuple[int, int] | None = None,
) -> None:
    """Of `some` of the blocks, or all, from the first one on that the meeting knows."""
    B, N, T = marks.log_sums.shape
    C, rows = parts[0].shape[1], marks.exponentials.shape[1]
    first, end = some or (0, span.blocks)
    queries = rows // C
    tile = tile_of(queries, meeting.functions)
    raw = torch.empty_like(marks.exponentials, dtype=torch.float32) if len(parts) > 1 else None
    strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = bias.expand(B, N, T, bias.shape[-1])
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
        strides = bias.stride()[:3]
    column = 0
    with device_of(meeting.data):
        for place, part in enumerate(parts):
            assert part.format is not None, "serves() was asked"
            kinds, table = tiers_in_tiles(part.format, part.width, column, meeting.data.device)
            column += count_of(part.format, part.width)
            lying, facts = lies(part)
            last = place == len(parts) - 1
            _scores[end - first, -(-queries // tile), B * C](
                meeting.data, meeting.basis, meeting.constants, part.rows, lying,
                span.sequences, table, bias, marks.exponentials, raw, marks.shares,
                *span.facts(), *facts, C, queries, T, len(table), meeting.width, meeting.each, meeting.group, meeting.batch,
                meeting.tile, meeting.function, meeting.tokens, span.blocks, first, span.aligned,
                *strides, *ages, scale, softcap or 1.0,
                KINDS=kinds, TURNED=meeting.basis is not None, FUNCTIONS=meeting.functions, SPANS=span.sequences is not None,
                OFFSET=meeting.constants is not None and last, BIASED=bias is not None, CAPPED=softcap is not None,
                FIRST=place == 0, LAST=last, FIELDS=TIER_FIELDS, **_constants(part, dtype, tile, meeting.functions),
            )  # fmt: skip


def share_out(marks: Marks) -> None:
    """Once the exponentials of all blocks are there."""
    with device_of(marks.shares):
        _share_out[(marks.log_sums.numel(),)](
            marks.shares, marks.log_sums, marks.shares.shape[2], AT_ONCE=AT_ONCE, num_warps=1
        )


def averages(marks: Marks, values: list[Packed], span: Span, dtype: torch.dtype) -> Tensor:
    """sum_s p_s v_s [splits, B, N, T, V] in float32, of a part of the tokens each; products are taken in `dtype`, or more."""
    (B, N, T), U = marks.log_sums.shape, values[0].shape[1]
    queries, V = N * T // U, sum(part.width for part in values)
    tile = tile_of(queries)
    tiles = -(-queries // tile)
    split = max(min(span.blocks * B * U * tiles * -(-V // NUMBERS) // PROGRAMS, SPLIT), 1)
    sums = marks.log_sums.new_empty(-(-span.blocks // split), B, N, T, V)
    column = 0
    with device_of(sums):
        for part in values:
            kinds, table = tiles_of(part.format, part.width, sums.device)
            lying, facts = lies(part)
            _weighted[len(table) * len(sums), tiles, B * U](
                marks.exponentials, marks.shares, part.rows, lying, span.sequences, table, sums,
                span.tokens, *facts, U, queries, len(table), span.blocks, span.aligned, split, V,
                column, sums.stride(0), KINDS=kinds, SPANS=span.sequences is not None, FIELDS=TILE_FIELDS,
                **_constants(part, dtype, tile),
            )  # fmt: skip
            column += part.width
    return sums


def join(parts: Sequence[tuple[Tensor, Tensor, int]], width: int, dtype: torch.dtype) -> Tensor:
    """[B, T, N, width] of one part of the tokens or two: (what `averages` gives, log-sums, the place of its first number)."""
    first, *more = parts
    sums, log_sums, beside = first
    other, other_log_sums, other_beside = more[0] if more else (None, None, 0)
    _, B, N, T, V = sums.shape
    out, block = sums.new_empty(B, T, N, width, dtype=dtype), min(1 << (width - 1).bit_length(), 1024)
    sizes = (0, 0, 0) if other is None else (len(other), other.stride(0), other.shape[4])
    with device_of(sums):
        _join[B * N * T, -(-width // block)](
            sums, log_sums, other, other_log_sums, out, len(sums), sums.stride(0), V, beside, *sizes, other_beside, N, T,
            width, TWO=other is not None, BLOCK=block,
        )  # fmt: skip
    return out


def lies(part: Packed) -> tuple[Tensor | None, tuple[int, ...]]:
    """The table of pages, where there is one, and tokens of a page, pages of a sequence, strides, and bytes of a row."""
    page_stride, head_stride, row_stride, _ = part.rows.stride()
    if isinstance(part, PackedTokens):
        return None, (part.rows.shape[2], 1, page_stride, head_stride, row_stride, part.format.row_bytes)
    tables, tokens = part.tables_Bp, part.rows.shape[2]
    return tables, (tokens, tables.stride(0), page_stride, head_stride, row_stride, part.format.row_bytes)  # type: ignore[union-attr]


def tile_of(queries: int, functions: int = 1) -> int:
    """Queries that a program takes. tl.dot wants 16 at least, and knows powers of two."""
    most = MOST_QUERIES if functions == 1 else max(MOST_SHARES // functions, 16)
    return min(max(1 << (queries - 1).bit_length(), 16), most)


def _constants(part: Packed, dtype: torch.dtype, queries: int, functions: int = 1) -> dict[str, Any]:
    """bfloat16 holds codes of 8 bits exactly. Scaled weights can be too small for float16: those products are in TF32. Loads
    ahead of products (num_stages) went through shared memory, and took twice as long on an H200."""
    half = dtype == torch.bfloat16
    return {
        "FLOAT8": part.format is not None and part.format.scales == "float8",
        "HALF": half,
        "PRODUCT": tl.bfloat16 if half and not INTERPRETED else tl.float32,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
        "PAGED": isinstance(part, PagedTokens),
        "QUERIES": queries,
        "TOKENS": TOKENS,
        "NUMBERS": NUMBERS,
        "BY_WORDS": not INTERPRETED,
        "num_warps": 2 * WARPS if queries * functions > MOST_QUERIES else WARPS,
        "num_stages": 1,
    }
