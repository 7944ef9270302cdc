"""Packed numbers on a GPU by Triton: packing, unpacking, rotating, and how other kernels read them.

Torch's operations take dozens of calls for it (`codec.py`, the obvious version). A byte is read once, and its codes are told
apart in registers. Tables say where the tiers of a row lie, so that one launch takes all that have the same bits, and layers
whose tiers differ share one compiled kernel. Triton's interpreter runs the same kernels on a CPU, in the tests.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.plan.codecs._codes import packed_bytes, planes
from kvfold.plan.codecs.exponent import TRIED
from kvfold.plan.number_format import NumberFormat

NUMBERS, UNPACKED_TOKENS = 64, 64
"""Of a tile that is unpacked."""
ROTATED_TOKENS = 32
FIELDS = 7
CHANGING = [
    "tokens", "tiles", "queries", "column", "split", "batch_stride", "head_stride", "row_stride", "out_batch", "out_head",
    "out_row", "part_stride", "q_width", "out_width",
]  # fmt: skip
"""What differs from step to step or layer to layer: kernels are not to be compiled again for it."""


@triton.jit
def _pairs(row, at, begin, width, BITS: tl.constexpr, TOKENS: tl.constexpr, NUMBERS: tl.constexpr):
    """Codes of a plane of bits, from number `begin` on, two in each of [TOKENS, NUMBERS / 2] (of 8 bits one in each of
    [TOKENS, NUMBERS]); behind the last byte itself again, since masks would take longer than all else."""
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = begin // PER_BYTE + tl.arange(0, NUMBERS // PER_BYTE)
    byte = tl.minimum(byte, (width + PER_BYTE - 1) // PER_BYTE - 1)
    byte = tl.max_contiguous(byte, NUMBERS // PER_BYTE)  # for neighbouring threads; single bytes are loaded
    x = tl.load(row + (at + byte)[None, :]).to(tl.int32)
    if BITS <= 2:
        x = tl.reshape(tl.join(x & 15, x >> 4), (TOKENS, NUMBERS * 2 // PER_BYTE))
    if BITS == 1:
        x = tl.reshape(tl.join(x & 3, x >> 2), (TOKENS, NUMBERS * 4 // PER_BYTE))
    return x


@triton.jit
def _plane(row, at, begin, width, BITS: tl.constexpr, TOKENS: tl.constexpr, NUMBERS: tl.constexpr):
    """Codes [TOKENS, NUMBERS] of a plane of bits, from number `begin` on."""
    x = _pairs(row, at, begin, width, BITS, TOKENS, NUMBERS)
    if BITS < 8:
        x = tl.reshape(tl.join(x & ((1 << BITS) - 1), x >> BITS), (TOKENS, NUMBERS))
    return x


@triton.jit
def _float8(byte):
    """e4m3."""
    normal = (((byte & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    size = tl.where((byte & 0x78) != 0, normal, (byte & 7).to(tl.float32) / 512)
    return tl.where((byte & 0x80) != 0, -size, size)


@triton.jit
def plane_numbers(
    row, at, begin, width, BITS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """[TOKENS, NUMBERS] of a plane of bits for a product, which `offset_of` is to be taken from: codes around zero, or,
    HALF, 128 + code in bfloat16, whose bits are those of the code beside others: both of a pair are made at once."""
    if HALF and BITS < 8:
        x = _pairs(row, at, begin, width, BITS, TOKENS, NUMBERS)
        x = (x * (1 + (1 << (16 - BITS)))) & (0x10001 * ((1 << BITS) - 1)) | 0x43004300  # both codes at once
        x = tl.reshape(tl.join(x.to(tl.uint16), (x >> 16).to(tl.uint16)), (TOKENS, NUMBERS))
        found = x.to(tl.bfloat16, bitcast=True)
    elif FLOAT8:
        found = _float8(_plane(row, at, begin, width, BITS, TOKENS, NUMBERS))
    else:
        found = _plane(row, at, begin, width, BITS, TOKENS, NUMBERS).to(tl.float32) - ((1 << BITS) - 1) / 2
    return found


@triton.jit
def offset_of(BITS: tl.constexpr, FLOAT8: tl.constexpr, HALF: tl.constexpr):
    """What `plane_numbers` are too large by."""
    return (128 + ((1 << BITS) - 1) / 2) if HALF and BITS < 8 and not FLOAT8 else 0.0


@triton.jit
def scale_of(rows, token, row_stride, tier, shift, seen, FLOAT8: tl.constexpr):
    """[TOKENS], of a plane whose lowest bit is a code's bit `shift`."""
    if FLOAT8:
        scale = tl.where(seen, 1.0, 1.0)
    else:
        exponent = tl.load(rows + token * row_stride + tier, mask=seen, other=0)
        scale = tl.exp2((exponent.to(tl.float32) - 128) / 8 + shift)
    return scale


@triton.jit
def tile(table, index, FIELDS: tl.constexpr):
    """Of numbers of a tier: where its codes or one plane of them begin in a row (bytes) and its numbers in a head, its width
    and place among the tiers, the lowest bit of the plane; the first number of the tile in it, and how many are wanted."""
    at = table + index * FIELDS
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
    )  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def _unpack(
    rows, out, table, tokens, heads, batch_stride, head_stride, row_stride, out_batch, out_head, out_row,
    BITS: tl.constexpr, FLOAT8: tl.constexpr, TOKENS: tl.constexpr, NUMBERS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """out[b, h, token, number] of a tile."""
    head, start = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * TOKENS
    rows += head // heads * batch_stride + head % heads * head_stride + start * row_stride
    out += head // heads * out_batch + head % heads * out_head + start * out_row
    at, first, width, tier, _, begin, wanted = tile(table, tl.program_id(0), FIELDS)
    token, number = tl.arange(0, TOKENS), begin + tl.arange(0, NUMBERS)
    seen = token < tokens - start
    row = rows + (tl.minimum(token, tokens - start - 1) * row_stride)[:, None]
    if BITS & 8:
        code = _plane(row, at, begin, width, 8, TOKENS, NUMBERS)
    elif BITS & 4:
        code = _plane(row, at, begin, width, 4, TOKENS, NUMBERS)
        at += (width + 1) // 2
    elif BITS & 2:
        code = _plane(row, at, begin, width, 2, TOKENS, NUMBERS)
        at += (width + 3) // 4
    else:
        code = _plane(row, at, begin, width, 1, TOKENS, NUMBERS)
    if BITS & 2 and BITS > 3:
        code = (code << 2) | _plane(row, at, begin, width, 2, TOKENS, NUMBERS)
        at += (width + 3) // 4
    if BITS & 1 and BITS > 1:
        code = (code << 1) | _plane(row, at, begin, width, 1, TOKENS, NUMBERS)
    if FLOAT8:
        x = _float8(code)
    else:
        x = code.to(tl.float32) - ((1 << BITS) - 1) / 2
        x *= scale_of(rows, token, row_stride, tier, 0, seen, FLOAT8)[:, None]
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
    x, block = x_BCTR.reshape(-1), triton.next_power_of_2(max(width for width, _ in format.tiers))
    with device_of(x_BCTR):
        _pack[(x.numel() // format.width, len(format.tiers))](
            x, rows, _tiers(format, x.device), _tried(x.device), format.width, format.row_bytes,
            FIELDS=FIELDS, BLOCK=max(block, 16),
        )  # fmt: skip
    return rows


def unpack(rows_BCSX: Tensor, format: NumberFormat, out_BCSR: Tensor) -> Tensor:
    """Rows as numbers, into memory whose last stride is 1: as many as there is room for."""
    B, C, S, _ = rows_BCSX.shape
    with device_of(rows_BCSX):
        for bits, table in tiles_of(format, out_BCSR.shape[3], out_BCSR.device, NUMBERS, planes_apart=False):
            _unpack[(len(table), triton.cdiv(S, UNPACKED_TOKENS), B * C)](
                rows_BCSX, out_BCSR, table, S, C, *rows_BCSX.stride()[:3], *out_BCSR.stride()[:3],
                BITS=bits, FLOAT8=format.scales == "float8", TOKENS=UNPACKED_TOKENS, NUMBERS=NUMBERS, FIELDS=FIELDS,
            )  # fmt: skip
    return out_BCSR


def device_of(x: Tensor) -> Any:
    """Triton launches on the current device, wherever tensors are."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.lru_cache(maxsize=4096)
def tiles_of(
    format: NumberFormat, width: int, device: torch.device, size: int, *, planes_apart: bool = True
) -> list[tuple[int, Tensor]]:
    """The tiles, of `size` numbers, that the first `width` numbers of a head consist of, as `tile` reads them: (bits, those
    of so many bits), where codes that are cut into planes come once for each."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for at, first, numbers, tier, bits in _places(format):
        shift, wanted = bits, min(numbers, width - first)
        for part in planes(bits) if planes_apart else [bits]:
            shift -= part
            tiles = [(at, first, numbers, tier, shift, begin, wanted) for begin in range(0, wanted, size)]
            found.setdefault(part, []).extend(tiles)
            at += packed_bytes(numbers, part)
    return [(bits, torch.tensor(tiles, dtype=torch.int32, device=device)) for bits, tiles in found.items() if tiles]


@functools.lru_cache(maxsize=4096)
def _tiers(format: NumberFormat, device: torch.device) -> Tensor:
    """Whole tiers, with their bits in place of a plane's lowest."""
    tiers = [(*place, 0, place[2]) for place in _places(format)]
    return torch.tensor(tiers, dtype=torch.int32, device=device)


def _places(format: NumberFormat) -> Iterator[tuple[int, int, int, int, int]]:
    """Of every tier: the first byte of its codes, its first number and how many, its place, and bits."""
    byte, first = format.row_bytes - format.code_bytes, 0
    for tier, (numbers, bits) in enumerate(format.tiers):
        yield byte, first, numbers, tier, bits
        byte, first = byte + packed_bytes(numbers, bits), first + numbers


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
        _rotate[triton.cdiv(S, ROTATED_TOKENS), B * C * heads](
            x_BCSF, cos, sin, out, S, C, heads, *x_BCSF.stride()[:3], S * r if len(cos) > 1 else 0, r,
            WIDTH=head_dim, TOKENS=ROTATED_TOKENS, BLOCK=triton.next_power_of_2(head_dim),
        )  # fmt: skip
    return out
