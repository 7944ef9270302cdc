"""Queries that are turned instead of keys, on a GPU: made by Triton and a product, met as absorbed ones are.

As cpp/turn.h: keys that turn slowly have nearly the same angle among neighbouring tokens, so that few functions of a token's
place among them say how, and a query's share of each meets stored numbers as they lie (turning.py, docs/kernels.md).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvfold.plan.number_format import ELSEWHERE
from kvfold.runtimes.kernels.tiles import NUMBERS, order_of
from kvfold.runtimes.kernels.triton_attention import TOKENS, Marks, Meeting, Packed, Span, add_exponentials
from kvfold.runtimes.kernels.triton_codes import device_of
from kvfold.runtimes.kernels.triton_kernels import CHANGING, span_of
from kvfold.runtimes.kernels.turning import turning_functions

TILES = tuple(range(TOKENS, 4 * TOKENS + 1, TOKENS))
"""Numbers of tokens that queries may be turned for at a time: whole blocks of the kernel."""


class Functions(NamedTuple):
    """As `TurningFunctions`, in float32 on a device."""

    basis: Tensor
    shares: Tensor
    speeds: Tensor


@functools.lru_cache(maxsize=64)
def functions_of(speeds: tuple[float, ...], tolerance: float, device: torch.device) -> Functions:
    """For as many tokens as make a step cost least; nothing for those beside what is needed, up to a power of two."""
    found = [turning_functions(speeds, tolerance, (tokens,)) for tokens in TILES]
    best = min(found, key=lambda x: _room(x.basis) * (1 + 2 * len(speeds) / x.basis.shape[1]))
    padded = (F.pad(x, (0, 0, 0, _room(best.basis) - len(best.basis))) for x in (best.basis, best.shares))
    return Functions(*(x.float().contiguous().to(device) for x in (*padded, best.speeds)))


def _room(basis: Tensor) -> int:
    """For shares of a product whose sizes are powers of two."""
    return 1 << (len(basis) - 1).bit_length()


@triton.jit(do_not_specialize=[*CHANGING, "rotated", "table_batch", "first_tile", "functions", "kv_heads"])
def _turn(
    q, cos, sin, shares, speeds, offset, sequences, out, constants,
    tokens, aligned, turned_tokens, first_tile, functions, kv_heads, each, rotated, table_batch,
    OFFSET: tl.constexpr, SPANS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[kv head, b, tile, function, row, number]: the share of a function in a query [b, kv head, row] that is turned back
    by the angle in the middle of a tile of tokens; constants: that of the keys' offset."""
    tile, batch, tiles = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    head, row = (tl.program_id(1) // each).to(tl.int64), tl.program_id(1) % each
    start, end, _ = span_of(sequences, batch, tokens, tokens, SPANS)
    begin = start // aligned * aligned + (first_tile + tile) * turned_tokens
    last = tl.maximum(tl.minimum(end, begin + turned_tokens) - 1, 0)
    by = (last - begin).to(tl.float32) - (turned_tokens - 1) / 2
    number, half = tl.arange(0, BLOCK), rotated // 2
    inside, turns, is_first = number < WIDTH, number < rotated, number < half
    pair = tl.where(is_first, number, number - half)
    other = tl.where(is_first, number + half, pair)
    q += ((batch * kv_heads + head) * each + row) * WIDTH
    own = tl.load(q + number, mask=inside, other=0).to(tl.float32)
    across = tl.load(q + other, mask=turns, other=0).to(tl.float32)
    table = batch * table_batch + last.to(tl.int64) * rotated + pair
    c, s = (
        tl.load(cos + table, mask=turns, other=1).to(tl.float32),
        tl.load(sin + table, mask=turns, other=0).to(tl.float32),
    )
    angle = tl.load(speeds + pair, mask=turns, other=0) * by
    c, s = c * tl.cos(angle) + s * tl.sin(angle), s * tl.cos(angle) - c * tl.sin(angle)
    even = own * c + tl.where(is_first, across, -across) * s
    odd = tl.where(is_first, across * c - own * s, -(across * c + own * s))
    place = (((head * tl.num_programs(2) + batch) * tiles + tile) * functions) * each + row
    for function in range(functions):
        share = tl.load(shares + function * half + pair, mask=turns, other=0)
        said = share * tl.where(function % 2 == 0, even, odd)
        said = tl.where(turns, said, tl.where(function == 0, own, 0.0))
        tl.store(out + place * WIDTH + number, said.to(out.dtype.element_ty), mask=inside)
        if OFFSET:
            key = tl.load(offset + head * WIDTH + number, mask=inside, other=0)
            tl.store(constants + place, tl.sum(tl.where(inside, said * key, 0), axis=0))
        place += each


def turned_exponentials(
    marks: Marks,
    q_BNTH: Tensor,
    weights_KHR: Tensor,
    offset_KH: Tensor | None,
    functions: Functions,
    tables: tuple[Tensor, Tensor],
    parts: list[Packed],
    span: Span,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    **sizes: Any,
) -> None:
    """Writes exponentials of scores with keys weights z + offset, rotated by tables [B or 1, S, r]. As many tiles at a time
    as keep turned queries within a workspace."""
    weights_KHE = _in_tiles(weights_KHR, tuple((part.format, part.width) for part in parts))
    (B, _, _, H), (K, _, E), (m, P) = q_BNTH.shape, weights_KHE.shape, functions.basis.shape
    each = q_BNTH.shape[1] * q_BNTH.shape[2] // K
    tiles, q = -(-span.blocks * TOKENS // P), q_BNTH.contiguous()
    cos, sin = (table.contiguous() for table in tables)
    step = max(ELSEWHERE // (K * B * m * each * max(E, H)), 1)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        shares = q.new_empty(K, B, count, m, each, H)
        constants = None if offset_KH is None else q.new_empty(K, B, count, m, each, dtype=torch.float32)
        with device_of(q):
            _turn[count, K * each, B](
                q, cos, sin, functions.shares, functions.speeds, offset_KH,
                span.sequences, shares,
                constants,
                span.tokens, span.aligned, P, first, m, K, each, cos.shape[2], cos[0].numel() if len(cos) > 1 else 0,
                OFFSET=offset_KH is not None, SPANS=span.sequences is not None, WIDTH=H, BLOCK=1 << (H - 1).bit_length(),
                num_warps=1,
            )  # fmt: skip
        made = torch.bmm(shares.view(K, -1, H), weights_KHE)
        row = each * E // NUMBERS
        group, batch, tile = B * count * m * row, count * m * row, m * row
        meeting = Meeting(made, E // NUMBERS, each, group, batch, tile, row, m, P, functions.basis, constants)
        some = first * P // TOKENS, min((first + count) * P // TOKENS, span.blocks)
        add_exponentials(marks, meeting, parts, span, bias, dtype=dtype, some=some, **sizes)


def _in_tiles(weights_KHR: Tensor, parts: tuple[Any, ...]) -> Tensor:
    """[K, H, E], with zeros where tiles have no number; kept beside the weights."""
    kept = weights_KHR.__dict__.setdefault("in_tiles", {})
    if parts not in kept:
        order = order_of(parts, weights_KHR.device)
        kept[parts] = weights_KHR[:, :, order.clamp_min(0)] * (order >= 0)
    found: Tensor = kept[parts]
    return found
