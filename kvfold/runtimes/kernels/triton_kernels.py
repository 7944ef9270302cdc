"""Packed numbers on a GPU by Triton: packing, and products of queries or probabilities with them.

Why: torch's operations take dozens of calls to pack a token, and write every stored number several times on its way from
bytes to a product; `codec.py` and `attention.py` have them as the obvious version. Here no number exists outside the chip.
The scores of a step (one float32 per query and token) do. Triton's interpreter runs the same kernels on a CPU, in the tests.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.plan.codecs._codes import packed_bytes
from kvfold.plan.codecs.exponent import TRIED
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.packed_tokens import PackedTokens

SCORED_TOKENS, WEIGHED_TOKENS, NUMBERS, MOST_QUERIES = 64, 32, 64, 64
"""Of a tile. More would not fit into registers (as ptxas counts them)."""
TOKENS_PER_SPLIT = 1024
"""Of a sum over tokens that one program takes."""
CHANGING = ["tokens", "tier", "first_byte", "first", "blocks", "part_stride", "batch_stride", "head_stride"]
"""What differs from step to step or tier to tier: kernels are not to be compiled again for it."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter cannot multiply matrices of bfloat16."""


@triton.jit
def _plane(row, number, seen, BITS: tl.constexpr):
    byte = tl.load(row + number * BITS // 8, mask=seen, other=0).to(tl.int32)
    return (byte >> (number * BITS % 8)) & ((1 << BITS) - 1)


@triton.jit
def _numbers(row, number, width, seen, BITS: tl.constexpr, FLOAT8: tl.constexpr):
    """Codes + 1/2 around zero, without their scale; or float8 e4m3 as it is."""
    if FLOAT8:
        byte = _plane(row, number, seen, 8)
        normal = (((byte & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        size = tl.where((byte & 0x78) != 0, normal, (byte & 7).to(tl.float32) / 512)
        found = tl.where((byte & 0x80) != 0, -size, size)
    else:
        code = tl.where(seen, 0, 0)
        if BITS & 8:
            code = _plane(row, number, seen, 8)
            row += width
        if BITS & 4:
            code = (code << 4) | _plane(row, number, seen, 4)
            row += (width + 1) // 2
        if BITS & 2:
            code = (code << 2) | _plane(row, number, seen, 2)
            row += (width + 3) // 4
        if BITS & 1:
            code = (code << 1) | _plane(row, number, seen, 1)
        found = code.to(tl.float32) + (0.5 - (1 << (BITS - 1)))
    return found


@triton.jit
def _scale(rows, token, row_stride, tier, seen, FLOAT8: tl.constexpr):
    if FLOAT8:
        scale = tl.where(seen, 1.0, 1.0)
    else:
        exponent = tl.load(rows + token * row_stride + tier, mask=seen, other=0)
        scale = tl.exp2((exponent.to(tl.float32) - 128) / 8)
    return scale


@triton.jit(do_not_specialize=CHANGING)
def _scores(
    q, rows, out, queries, tokens, width, heads, q_width, batch_stride, head_stride, row_stride, tier, first_byte, first,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, ADD: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """out[b, h, query, token] (+)= q[b, h, query] . numbers of a tier[b, h, token]."""
    head, start = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * TOKENS
    rows += head // heads * batch_stride + head % heads * head_stride + start * row_stride
    q += head * queries * q_width + first
    token, query = tl.arange(0, TOKENS), tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    seen, here = token < tokens - start, (query < queries)[None, :]
    row = rows + (token * row_stride + first_byte)[:, None]
    total = tl.zeros((TOKENS, QUERIES), tl.float32)
    for begin in range(0, width, NUMBERS):
        number = begin + tl.arange(0, NUMBERS)
        inside = number < width
        x = _numbers(row, number[None, :], width, seen[:, None] & inside[None, :], BITS, FLOAT8)
        part = tl.load(q + ((query * q_width)[None, :] + number[:, None]), mask=here & inside[:, None], other=0)
        total += tl.dot(x.to(PRODUCT), part.to(PRODUCT), input_precision=PRECISION)
    total *= _scale(rows, token, row_stride, tier, seen, FLOAT8)[:, None]
    to = out + head * queries * tokens + start + (query.to(tl.int64) * tokens)[None, :] + token[:, None]
    seen_here = here & seen[:, None]
    if ADD:
        total += tl.load(to, mask=seen_here, other=0)
    tl.store(to, total, mask=seen_here)


@triton.jit(do_not_specialize=CHANGING)
def _weighted(
    weights, rows, out, queries, tokens, width, heads, out_width, batch_stride, head_stride, row_stride, tier, first_byte,
    first, blocks, part_stride,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, NUMBERS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[split, b, h, query] = sum over the split's tokens of weights[b, h, query, token] numbers of a tier[b, h, token]."""
    head, split = tl.program_id(2).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    rows += head // heads * batch_stride + head % heads * head_stride + split * SPLIT * row_stride
    number = tl.program_id(0) % blocks * NUMBERS + tl.arange(0, NUMBERS)
    token, query = tl.arange(0, TOKENS), tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    weights += head * queries * tokens + split * SPLIT + (query.to(tl.int64) * tokens)[:, None]
    inside, here = (number < width)[None, :], (query < queries)[:, None]
    total = tl.zeros((QUERIES, NUMBERS), tl.float32)
    for begin in range(0, tl.minimum(tokens - split * SPLIT, SPLIT), TOKENS):
        tile, seen = rows + begin * row_stride, token < tokens - split * SPLIT - begin
        row = tile + (token * row_stride + first_byte)[:, None]
        x = _numbers(row, number[None, :], width, seen[:, None] & inside, BITS, FLOAT8)
        weight = tl.load(weights + (begin + token)[None, :], mask=here & seen[None, :], other=0)
        weight *= _scale(tile, token, row_stride, tier, seen, FLOAT8)[None, :]
        total += tl.dot(weight.to(PRODUCT), x.to(PRODUCT), input_precision=PRECISION)
    to = out + split * part_stride + head * queries * out_width + first
    tl.store(to + ((query * out_width)[:, None] + number[None, :]), total, mask=here & inside)


@triton.jit
def _codes(x, scale, BITS: tl.constexpr):
    """Around zero."""
    half: tl.constexpr = 1 << (BITS - 1)
    code = tl.floor(tl.minimum(tl.maximum(x / scale, -half), half))
    return tl.minimum(code, half - 1)


@triton.jit
def _store_plane(to, code, width, shift: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    per_byte: tl.constexpr = 8 // PART
    part = tl.reshape((code >> shift) & ((1 << PART) - 1), (BLOCK // per_byte, per_byte))
    byte = tl.sum(part << (tl.arange(0, per_byte) * PART)[None, :], axis=1)
    number = tl.arange(0, BLOCK // per_byte)
    tl.store(to + number, byte.to(tl.uint8), mask=number < (width + per_byte - 1) // per_byte)
    return to + (width + per_byte - 1) // per_byte


@triton.jit(do_not_specialize=CHANGING)
def _pack(
    x, rows, width, x_width, row_bytes, tier, first_byte, first,
    BITS: tl.constexpr, TRIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tier of one row: of the scales worth trying the one with the least squared error, and the codes in it."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    inside = number < width
    elements = tl.load(x + row * x_width + first + number, mask=inside, other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(elements), axis=0), 1.1754943508222875e-38) / ((1 << (BITS - 1)) - 0.5)
    highest = tl.minimum(tl.maximum(tl.ceil(tl.log2(largest) * 8), -128), 127)
    best, least = highest, largest * 0 + float("inf")
    for i in range(TRIED):
        exponent = tl.maximum(highest - i, -128)
        scale = tl.exp2(exponent / 8)
        lost = tl.where(inside, (_codes(elements, scale, BITS) + 0.5) * scale - elements, 0)
        error = tl.sum(lost * lost, axis=0)
        best, least = tl.where(error < least, exponent, best), tl.minimum(error, least)
    rows += row * row_bytes
    tl.store(rows + tier, (best + 128).to(tl.uint8))
    code = tl.where(inside, _codes(elements, tl.exp2(best / 8), BITS).to(tl.int32) + (1 << (BITS - 1)), 0)
    to = rows + first_byte
    if BITS & 8:
        to = _store_plane(to, code, width, 0, 8, BLOCK)
    if BITS & 4:
        to = _store_plane(to, code, width, BITS & 3, 4, BLOCK)
    if BITS & 2:
        to = _store_plane(to, code, width, BITS & 1, 2, BLOCK)
    if BITS & 1:
        to = _store_plane(to, code, width, 0, 1, BLOCK)


def pack(x_BCTR: Tensor, format: NumberFormat) -> Tensor:
    """Numbers -> rows of an `exponent` format [B, C, T, row_bytes]."""
    rows = x_BCTR.new_empty(*x_BCTR.shape[:3], format.row_bytes, dtype=torch.uint8)
    x = x_BCTR.reshape(-1)
    with _device_of(x_BCTR):
        for tier in _tiers(format):
            block = max(triton.next_power_of_2(tier["width"]), 16)
            _pack[(x.numel() // format.width,)](
                x, rows, tier["width"], format.width, format.row_bytes, *_places(tier),
                BITS=tier["bits"], TRIED=TRIED[tier["bits"]], BLOCK=block,
            )  # fmt: skip
    return rows


def scores(q_BNTR: Tensor, keys: PackedTokens) -> Tensor:
    """q . k [B, N, T, S] in float32."""
    B, N, T, R = q_BNTR.shape
    C, S = keys.shape[1:3]
    queries = N // C * T
    q, out = q_BNTR.reshape(-1), q_BNTR.new_empty(B, N, T, S, dtype=torch.float32)
    with _device_of(q_BNTR):
        for tier in _tiers(keys.format):
            grid = (triton.cdiv(S, SCORED_TOKENS), triton.cdiv(queries, _tile(queries)), B * C)
            _scores[grid](
                q, keys.rows, out, queries, S, tier["width"], C, R, *keys.rows.stride()[:3], *_places(tier),
                **_constants(tier, q_BNTR.dtype, queries), TOKENS=SCORED_TOKENS, ADD=tier["tier"] > 0,
            )  # fmt: skip
    return out


def weighted(weights_BNTS: Tensor, values: PackedTokens, dtype: torch.dtype) -> Tensor:
    """sum_s w_s v_s [B, N, T, V] in float32, of float32 weights; products are taken in `dtype`, or more."""
    B, N, T, S = weights_BNTS.shape
    U, V = values.shape[1], values.shape[3]
    queries, splits = N // U * T, triton.cdiv(S, TOKENS_PER_SPLIT)
    weights, parts = weights_BNTS.reshape(-1), weights_BNTS.new_empty(splits, B, N, T, V)
    with _device_of(weights_BNTS):
        for tier in _tiers(values.format):
            blocks = triton.cdiv(tier["width"], NUMBERS)
            grid = (blocks * splits, triton.cdiv(queries, _tile(queries)), B * U)
            _weighted[grid](
                weights, values.rows, parts, queries, S, tier["width"], U, V, *values.rows.stride()[:3], *_places(tier),
                blocks, parts.stride(0), **_constants(tier, dtype, queries),
                TOKENS=WEIGHED_TOKENS, SPLIT=TOKENS_PER_SPLIT,
            )  # fmt: skip
    return parts.sum(0)


def _device_of(x: Tensor) -> Any:
    """Triton launches on the current device, wherever tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _tiers(format: NumberFormat) -> list[dict[str, int]]:
    """Where the numbers of every tier lie in a row, and in a head."""
    float8, found = format.scales == "float8", []
    byte, first = 0 if float8 else len(format.tiers), 0
    for index, (elements, bits) in enumerate(format.tiers):
        found.append({"tier": index, "width": elements, "bits": bits, "byte": byte, "first": first, "float8": float8})
        byte, first = byte + packed_bytes(elements, bits), first + elements
    return found


def _places(tier: dict[str, int]) -> tuple[int, int, int]:
    return tier["tier"], tier["byte"], tier["first"]


def _constants(tier: dict[str, int], dtype: torch.dtype, queries: int) -> dict[str, object]:
    """bfloat16 holds codes of 8 bits exactly. Scaled weights can be too small for float16: those products are in TF32."""
    return {
        "BITS": tier["bits"],
        "FLOAT8": bool(tier["float8"]),
        "PRODUCT": tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
        "QUERIES": _tile(queries),
        "NUMBERS": NUMBERS,
        "num_warps": 4 if queries <= 16 else 8,
    }


def _tile(queries: int) -> int:
    """tl.dot wants 16 at least."""
    return min(max(triton.next_power_of_2(queries), 16), MOST_QUERIES)
