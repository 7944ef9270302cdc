"""Packed numbers on a GPU by Triton: packing, unpacking, rotating.

Torch's operations take dozens of calls for it (`codec.py`, the obvious version).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.plan.codecs.exponent import TRIED
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.tiles import NUMBERS, TILE_FIELDS, tiers_of, tiles_of
from kvfold.runtimes.kernels.triton_words import INTERPRETED, numbers_of, words_at

UNPACKED_TOKENS, ROTATED_TOKENS = 64, 32
CHANGING = [
    "tokens", "heads", "batch_stride", "head_stride", "row_stride", "row_bytes", "out_batch", "out_head", "out_row",
]  # fmt: skip
"""What differs from step to step or layer to layer: kernels are not to be compiled again for it."""


@triton.jit
def tile(table, index, FIELDS: tl.constexpr):
    """As `tiles_of` has it."""
    at = table + index * FIELDS
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
    )  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def _unpack(
    rows, out, table, tokens, heads, batch_stride, head_stride, row_stride, row_bytes, out_batch, out_head, out_row,
    KINDS: tl.constexpr, FLOAT8: tl.constexpr, TOKENS: tl.constexpr, NUMBERS: tl.constexpr, FIELDS: tl.constexpr,
    BY_WORDS: tl.constexpr,
):  # fmt: skip
    """out[b, h, token, number] of a tile: the sum of what its planes of bits say."""
    head, start = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * TOKENS
    rows += head // heads * batch_stride + head % heads * head_stride + start * row_stride
    out += head // heads * out_batch + head % heads * out_head + start * out_row
    byte, first, size, tier, bits, before, wanted = tile(table, tl.program_id(0), FIELDS)
    token, number = tl.arange(0, TOKENS), tl.arange(0, NUMBERS)
    seen = token < tokens - start
    row = rows + tl.minimum(token, tokens - start - 1) * row_stride
    x = tl.zeros((TOKENS, NUMBERS), tl.float32)
    for FINER in tl.static_range(4):  # planes of 8, 4, 2 and 1 bits
        if KINDS & 8 >> FINER:
            has = bits & 8 >> FINER != 0
            if has:
                word = words_at(row, byte + (before >> FINER), row_bytes - 1, NUMBERS >> FINER + 2)
                plane = numbers_of(word, 8 >> FINER, FLOAT8, False, TOKENS, NUMBERS, BY_WORDS)
                x += plane * tl.exp2((bits & (8 >> FINER) - 1).to(tl.float32))
                byte += (size * (8 >> FINER) + 7) // 8
    if not FLOAT8:
        x *= tl.exp2((tl.load(row + tier).to(tl.float32) - 128) / 8)[:, None]
    to = out + ((token * out_row)[:, None] + (first + number)[None, :])
    tl.store(to, x.to(out.dtype.element_ty), mask=seen[:, None] & (number < wanted)[None, :])


@triton.jit
def _codes(x, scale, bits):
    """Around zero."""
    half = (1 << (bits - 1)).to(tl.float32)
    return tl.minimum(tl.floor(tl.minimum(tl.maximum(x / scale, -half), half)), half - 1)


@triton.jit
def _store_plane(to, code, width, shift, PART: tl.constexpr, BLOCK: tl.constexpr):
    per_byte: tl.constexpr = 8 // PART
    part = tl.reshape((code >> shift) & ((1 << PART) - 1), (BLOCK // per_byte, per_byte))
    byte = tl.sum(part << (tl.arange(0, per_byte) * PART)[None, :], axis=1)
    number = tl.arange(0, BLOCK // per_byte)
    tl.store(to + number, byte.to(tl.uint8), mask=number < (width + per_byte - 1) // per_byte)


@triton.jit(do_not_specialize=["x_width", "row_bytes"])
def _pack(x, rows, table, tried, x_width, row_bytes, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """A tier of one row: of the scales worth trying the one with the least squared error, and the codes in it."""
    row = tl.program_id(0).to(tl.int64)
    byte, first, width, tier, bits, _, _ = tile(table, tl.program_id(1), FIELDS)
    number = tl.arange(0, BLOCK)
    inside = number < width
    elements = tl.load(x + row * x_width + first + number, mask=inside, other=0).to(tl.float32)
    half = (1 << (bits - 1)).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(elements), axis=0), 1.1754943508222875e-38) / (half - 0.5)
    highest = tl.minimum(tl.maximum(tl.ceil(tl.log2(largest) * 8), -128), 127)
    best, least = highest, largest * 0 + float("inf")
    for i in range(tl.load(tried + bits)):
        exponent = tl.maximum(highest - i, -128)
        scale = tl.exp2(exponent / 8)
        lost = tl.where(inside, (_codes(elements, scale, bits) + 0.5) * scale - elements, 0)
        error = tl.sum(lost * lost, axis=0)
        best, least = tl.where(error < least, exponent, best), tl.minimum(error, least)
    rows += row * row_bytes
    tl.store(rows + tier, (best + 128).to(tl.uint8))
    code = tl.where(inside, (_codes(elements, tl.exp2(best / 8), bits) + half).to(tl.int32), 0)
    to = rows + byte
    if bits & 8:
        _store_plane(to, code, width, 0, 8, BLOCK)
        to += width
    if bits & 4:
        _store_plane(to, code, width, bits & 3, 4, BLOCK)
        to += (width + 1) // 2
    if bits & 2:
        _store_plane(to, code, width, bits & 1, 2, BLOCK)
        to += (width + 3) // 4
    if bits & 1:
        _store_plane(to, code, width, 0, 1, BLOCK)


def pack(x_BCTR: Tensor, format: NumberFormat) -> Tensor:
    """Numbers -> rows of an `exponent` format [B, C, T, row_bytes]."""
    rows = x_BCTR.new_empty(*x_BCTR.shape[:3], format.row_bytes, dtype=torch.uint8)
    x, block = x_BCTR.reshape(-1), 1 << (max(width for width, _ in format.tiers) - 1).bit_length()
    with device_of(x_BCTR):
        _pack[(x.numel() // format.width, len(format.tiers))](
            x, rows, tiers_of(format, x.device), _tried(x.device), format.width, format.row_bytes,
            FIELDS=TILE_FIELDS, BLOCK=max(block, 16),
        )  # fmt: skip
    return rows


def unpack(rows_BCSX: Tensor, format: NumberFormat, out_BCSR: Tensor) -> Tensor:
    """Rows as numbers, into memory whose last stride is 1: as many as there is room for."""
    B, C, S, _ = rows_BCSX.shape
    kinds, table = tiles_of(format, out_BCSR.shape[3], out_BCSR.device)
    with device_of(rows_BCSX):
        _unpack[(len(table), -(-S // UNPACKED_TOKENS), B * C)](
            rows_BCSX, out_BCSR, table, S, C, *rows_BCSX.stride()[:3], format.row_bytes, *out_BCSR.stride()[:3],
            KINDS=kinds, FLOAT8=format.scales == "float8", TOKENS=UNPACKED_TOKENS, NUMBERS=NUMBERS, FIELDS=TILE_FIELDS,
            BY_WORDS=not INTERPRETED,
        )  # fmt: skip
    return out_BCSR


def device_of(x: Tensor) -> Any:
    """Triton launches on the current device, wherever tensors are."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.lru_cache(maxsize=64)
def _tried(device: torch.device) -> Tensor:
    """By bits."""
    return torch.tensor([TRIED.get(bits, 0) for bits in range(9)], dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["tokens", "x_batch", "x_group", "x_token", "table_batch"])
def _rotate(
    x, cos, sin, out, tokens, groups, heads, x_batch, x_group, x_token, table_batch, rotated,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, group * heads + head, token] = x[b, group, token, head], its first numbers turned in half-split pairs."""
    row, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * TOKENS
    batch, head = row // (groups * heads), row % (groups * heads)
    token, number = (start + tl.arange(0, TOKENS))[:, None], tl.arange(0, BLOCK)[None, :]
    half = rotated // 2
    turns, inside = number < rotated, (token < tokens) & (number < WIDTH)
    other = tl.where(number < half, number + half, number - half)
    x += batch * x_batch + head // heads * x_group + head % heads * WIDTH + token.to(tl.int64) * x_token
    table = batch * table_batch + token * rotated + number
    own = tl.load(x + number, mask=inside, other=0).to(tl.float32)
    across = tl.load(x + other, mask=inside & turns, other=0).to(tl.float32)
    c = tl.load(cos + table, mask=inside & turns, other=1).to(tl.float32)
    s = tl.load(sin + table, mask=inside & turns, other=0).to(tl.float32)
    turned = own * c + tl.where(number < half, -across, across) * s
    tl.store(out + (row * tokens + token) * WIDTH + number, turned.to(out.dtype.element_ty), mask=inside)


def rotate(x_BCSF: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, head_dim: int) -> Tensor:
    """Heads [B, C * F / head_dim, S, head_dim] of x, rotated by tables [B or 1, S, r]."""
    (B, C, S, F), r = x_BCSF.shape, cos_BSr.shape[2]
    cos, sin, heads = cos_BSr.contiguous(), sin_BSr.contiguous(), F // head_dim
    out = x_BCSF.new_empty(B, C * heads, S, head_dim)
    with device_of(x_BCSF):
        _rotate[-(-S // ROTATED_TOKENS), B * C * heads](
            x_BCSF, cos, sin, out, S, C, heads, *x_BCSF.stride()[:3], S * r if len(cos) > 1 else 0, r,
            WIDTH=head_dim, TOKENS=ROTATED_TOKENS, BLOCK=1 << (head_dim - 1).bit_length(),
        )  # fmt: skip
    return out
