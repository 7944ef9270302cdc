"""Attention over packed numbers on a GPU by Triton: scores, their softmax, and weighted sums of values.

No stored number exists outside the chip, the scores of a step (one float32 per query and token) do: latents of several layers
side by side are wider than the sums that a program can hold, so that a single pass would have to unpack them several times.
`attention.py` has the obvious versions.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.plan.codecs._codes import planes
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, SideBySide
from kvfold.runtimes.kernels.triton_codes import (
    CHANGING,
    FIELDS,
    device_of,
    offset_of,
    plane_numbers,
    scale_of,
    tile,
    tiles_of,
)

SCORED, WEIGHED, WARPS = (64, 64), (32, 128), 4
"""(tokens, numbers) of a tile: few instructions in few registers, as ptxas counts them; eight warps took longer."""
MOST_QUERIES, AT_ONCE = 64, 1024
"""AT_ONCE: scores that a softmax takes."""
SPLIT, PROGRAMS = 1024, 512
"""Tokens of a sum that one program takes; fewer where there would be fewer programs than these."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter cannot multiply matrices of bfloat16."""


@triton.jit(do_not_specialize=CHANGING)
def _scores(
    q, rows, out, table, tiles, queries, tokens, heads, q_width, column, batch_stride, head_stride, row_stride,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, ADD: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr, NUMBERS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """out[b, h, query, token] (+)= q[b, h, query] from a column on . numbers[b, h, token] of planes of these bits."""
    head, start = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * TOKENS
    rows += head // heads * batch_stride + head % heads * head_stride + start * row_stride
    q += head * queries * q_width + column
    token, query = tl.arange(0, TOKENS), tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    seen, here = token < tokens - start, (query < queries)[None, :]
    row = rows + (tl.minimum(token, tokens - start - 1) * row_stride)[:, None]
    total = tl.zeros((TOKENS, QUERIES), tl.float32)
    for index in range(tiles):
        at, first, width, tier, shift, begin, wanted = tile(table, index, FIELDS)
        number = begin + tl.arange(0, NUMBERS)
        x = plane_numbers(row, at, begin, width, BITS, FLOAT8, HALF, TOKENS, NUMBERS)
        inside = here & (number < wanted)[:, None]
        part = tl.load(q + ((query * q_width)[None, :] + (first + number)[:, None]), mask=inside, other=0)
        products = tl.dot(x.to(PRODUCT), part.to(PRODUCT), input_precision=PRECISION)
        if HALF and BITS < 8 and not FLOAT8:
            ones = tl.full((TOKENS, NUMBERS), 1.0, PRODUCT)
            products -= tl.dot(ones, part.to(PRODUCT)) * offset_of(BITS, FLOAT8, HALF)
        total += products * scale_of(rows, token, row_stride, tier, shift, seen, FLOAT8)[:, None]
    to = out + head * queries * tokens + start + (query.to(tl.int64) * tokens)[None, :] + token[:, None]
    if ADD:
        total += tl.load(to, mask=here & seen[:, None], other=0)
    tl.store(to, total, mask=here & seen[:, None])


@triton.jit
def _score(scores, bias, begin, tokens, position, youngest, oldest, scale, cap, CAPPED: tl.constexpr, BIASED: tl.constexpr,
           AT_ONCE: tl.constexpr):  # fmt: skip
    """As a softmax takes them: -inf where the query does not see the token."""
    token = begin + tl.arange(0, AT_ONCE)
    age, inside = position - token, token < tokens
    x = tl.load(scores + token, mask=inside, other=0) * scale
    if CAPPED:
        x = cap * (2 / (1 + tl.exp(-2 * x / cap)) - 1)
    if BIASED:
        x += tl.load(bias + token, mask=inside, other=0)
    return tl.where(inside & (age >= youngest) & (age < oldest), x, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "position", "youngest", "oldest", "bias_batch", "bias_head", "bias_step"])
def _softmax(
    scores, bias, log_sums, tokens, heads, steps, bias_batch, bias_head, bias_step, position, youngest, oldest, scale, cap,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """In place, of one query; a query that sees none of the tokens gives them no weight, and a sum of 0."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * tokens
    bias += row // (heads * steps) * bias_batch + row // steps % heads * bias_head + row % steps * bias_step
    position += row % steps
    largest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for begin in range(0, tokens, AT_ONCE):
        x = _score(scores, bias, begin, tokens, position, youngest, oldest, scale, cap, CAPPED, BIASED, AT_ONCE)
        higher = tl.maximum(largest, tl.max(x, axis=0))
        known = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - known) + tl.sum(tl.exp(x - known), axis=0)
        largest = higher
    known = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(log_sums + row, largest + tl.log(tl.maximum(total, 1e-38)))
    for begin in range(0, tokens, AT_ONCE):
        x = _score(scores, bias, begin, tokens, position, youngest, oldest, scale, cap, CAPPED, BIASED, AT_ONCE)
        token = begin + tl.arange(0, AT_ONCE)
        tl.store(scores + token, tl.exp(x - known) / tl.maximum(total, 1e-38), mask=token < tokens)


@triton.jit(do_not_specialize=CHANGING)
def _weighted(
    weights, rows, out, table, tiles, queries, tokens, heads, out_width, column, split, part_stride,
    batch_stride, head_stride, row_stride,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, ADD: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr, NUMBERS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """out[part, b, h, query] from a column on (+)= sum over the part's tokens of weights[b, h, query, token] numbers[b, h,
    token] of planes of these bits."""
    head, part = tl.program_id(2).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    rows += head // heads * batch_stride + head % heads * head_stride + part * split * row_stride
    at, first, width, tier, shift, begin, wanted = tile(table, tl.program_id(0) % tiles, FIELDS)
    token, query = tl.arange(0, TOKENS), tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    weights += head * queries * tokens + part * split + (query.to(tl.int64) * tokens)[:, None]
    here, number = (query < queries)[:, None], begin + tl.arange(0, NUMBERS)
    left = tl.minimum(tokens - part * split, split).to(tl.int32)
    total, sums = tl.zeros((QUERIES, NUMBERS), tl.float32), tl.zeros((QUERIES, TOKENS), tl.float32)
    for start in range(0, left, TOKENS):
        among, seen = rows + start * row_stride, token < left - start
        row = among + (tl.minimum(token, left - start - 1) * row_stride)[:, None]
        x = plane_numbers(row, at, begin, width, BITS, FLOAT8, HALF, TOKENS, NUMBERS)
        weight = tl.load(weights + (start + token)[None, :], mask=here & seen[None, :], other=0)
        weight = (weight * scale_of(among, token, row_stride, tier, shift, seen, FLOAT8)[None, :]).to(PRODUCT)
        total = tl.dot(weight, x.to(PRODUCT), total, input_precision=PRECISION)
        sums += weight.to(tl.float32)
    total -= (tl.sum(sums, axis=1) * offset_of(BITS, FLOAT8, HALF))[:, None]
    to = out + part * part_stride + head * queries * out_width + column
    to += (query * out_width)[:, None] + (first + number)[None, :]
    inside = here & (number < wanted)[None, :]
    if ADD:
        total += tl.load(to, mask=inside, other=0)
    tl.store(to, total, mask=inside)


def scores(q_BNTR: Tensor, keys: PackedTokens | SideBySide) -> Tensor:
    """q . k [B, N, T, S] in float32."""
    (B, N, T, R), (C, S) = q_BNTR.shape, keys.shape[1:3]
    queries, column = N // C * T, 0
    q, out = q_BNTR.reshape(-1), q_BNTR.new_empty(B, N, T, S, dtype=torch.float32)
    with device_of(q_BNTR):
        for part in _parts(keys):
            for place, (bits, table) in enumerate(tiles_of(part.format, part.width, q.device, SCORED[1])):
                _scores[triton.cdiv(S, SCORED[0]), triton.cdiv(queries, _tile(queries)), B * C](
                    q, part.rows, out, table, len(table), queries, S, C, R, column, *part.rows.stride()[:3],
                    BITS=bits, ADD=column + place > 0, **_constants(part, q_BNTR.dtype, queries, SCORED),
                )  # fmt: skip
            column += part.width
    return out


def softmax_(
    scores_BNTS: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    position: int,
    ages: tuple[int, int],
) -> Tensor:
    """Probabilities in place of scores, and the logarithms of their sums [B, N, T]. bias: [B or 1, N or 1, T, S] float32, to
    add. position: of the first query, beside the tokens; a query sees tokens of ages from ages[0] to below ages[1]."""
    B, N, T, S = scores_BNTS.shape
    log_sums = scores_BNTS.new_empty(B, N, T)
    strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = bias.expand(B, N, T, S)
        bias = bias if bias.stride(3) == 1 else bias.contiguous()
        strides = bias.stride()[:3]
    with device_of(scores_BNTS):
        _softmax[(B * N * T,)](
            scores_BNTS, scores_BNTS if bias is None else bias, log_sums, S, N, T, *strides, position, *ages, scale,
            softcap or 1.0, CAPPED=softcap is not None, BIASED=bias is not None, AT_ONCE=AT_ONCE,
        )  # fmt: skip
    return log_sums


def weighted(weights_BNTS: Tensor, values: PackedTokens | SideBySide, dtype: torch.dtype) -> Tensor:
    """sum_s w_s v_s [B, N, T, V] in float32, of float32 weights; products are taken in `dtype`, or more."""
    (B, N, T, S), (U, V) = weights_BNTS.shape, values.shape[1::2]
    queries, weights, column = N // U * T, weights_BNTS.reshape(-1), 0
    heads = B * U * triton.cdiv(queries, _tile(queries))
    split = max(min(triton.next_power_of_2(S * heads * triton.cdiv(V, WEIGHED[1]) // PROGRAMS), SPLIT), WEIGHED[0])
    several = any(len(planes(bits)) > 1 for part in _parts(values) for _, bits in part.format.tiers)
    parts = (weights_BNTS.new_zeros if several else weights_BNTS.new_empty)(triton.cdiv(S, split), B, N, T, V)
    with device_of(weights_BNTS):
        for part in _parts(values):
            for bits, table in tiles_of(part.format, part.width, weights.device, WEIGHED[1]):
                _weighted[len(table) * len(parts), triton.cdiv(queries, _tile(queries)), B * U](
                    weights, part.rows, parts, table, len(table), queries, S, U, V, column, split, parts.stride(0),
                    *part.rows.stride()[:3], BITS=bits, ADD=several, **_constants(part, dtype, queries, WEIGHED),
                )  # fmt: skip
            column += part.width
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _parts(stored: PackedTokens | SideBySide) -> list[PackedTokens]:
    found = stored.parts if isinstance(stored, SideBySide) else [stored]
    return [part for part in found if isinstance(part, PackedTokens)]


def _constants(part: PackedTokens, dtype: torch.dtype, queries: int, sizes: tuple[int, int]) -> dict[str, object]:
    """bfloat16 holds codes of 8 bits exactly. Scaled weights can be too small for float16: those products are in TF32."""
    return {
        "FLOAT8": part.format.scales == "float8",
        "HALF": dtype == torch.bfloat16,
        "PRODUCT": tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
        "QUERIES": _tile(queries),
        "TOKENS": sizes[0],
        "NUMBERS": sizes[1],
        "FIELDS": FIELDS,
        "num_warps": WARPS,
    }


def _tile(queries: int) -> int:
    """tl.dot wants 16 at least."""
    return min(max(triton.next_power_of_2(queries), 16), MOST_QUERIES)
