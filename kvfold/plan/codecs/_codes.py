"""Codes of 1 to 8 bits <-> bytes, in planes; and the obvious way to read them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvfold.plan.number_format import NumberFormat

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
AFFINE_BYTES = 4
"""A smallest number and a step, float16 each."""


def planes(bits: int) -> list[int]:
    """How a code is cut so that its parts fill bytes: 3 bits are 2 and 1, 6 are 4 and 2."""
    return [part for part in (8, 4, 2, 1) if bits & part]


def packed_bytes(elements: int, bits: int) -> int:
    """Bytes of `numbers` codes of `bits` bits."""
    return sum(-(-elements * part // 8) for part in planes(bits))


def cut(rows: Tensor, format: NumberFormat) -> list[Tensor]:
    """Scales, in memory of their own where float16 ones are not at an odd address, and the codes of every tier, each without
    gaps."""
    scales, *codes = rows.split(
        [format.row_bytes - format.code_bytes, *(packed_bytes(*tier) for tier in format.tiers)], dim=-1
    )
    return [scales.clone(memory_format=torch.contiguous_format), *(part.contiguous() for part in codes)]


def tiers(x: Tensor, format: NumberFormat) -> tuple[Tensor, ...]:
    """The numbers of every tier."""
    return x.split([elements for elements, _ in format.tiers], dim=-1)


def joined(parts: list[Tensor]) -> Tensor:
    """Tiers side by side again."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def over_range(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """float16 (low, step) [..., 2] over `dim`, and the codes of x in them as they will be read."""
    range16 = torch.finfo(torch.float16)
    low, high = (of(dim, keepdim=True).clamp(range16.min, range16.max) for of in (x.amin, x.amax))
    scale = ((high - low) / (2**bits - 1)).clamp(range16.smallest_normal, range16.max)
    stored = torch.stack([low, scale], dim=-1).to(torch.float16)
    low, scale = stored.to(x.dtype).unbind(-1)
    return stored, ((x - low) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)


def pack_codes(code: Tensor, bits: int) -> Tensor:
    """Codes [..., n] -> bytes. A byte of a plane of p bits holds 8 / p neighbouring codes, the first in its lowest bits."""
    rows, shift = [], bits
    for part in planes(bits):
        shift -= part
        plane = code >> shift & 2**part - 1
        per_byte = 8 // part
        plane = torch.nn.functional.pad(plane, (0, -plane.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
        packed = plane[..., 0]
        for i in range(1, per_byte):
            packed = packed | plane[..., i] << part * i
        rows.append(packed)
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def unpack_codes(rows: Tensor, bits: int, elements: int) -> Tensor:
    """The inverse: [..., numbers] of uint8, in new memory."""
    code, at, shift = None, 0, bits
    for part in planes(bits):
        size, shift = packed_bytes(elements, part), shift - part
        plane = _plane(rows[..., at : at + size].contiguous(), part)[..., :elements]
        plane = plane if not shift else plane << shift
        code, at = plane if code is None else code.bitwise_or_(plane), at + size
    assert code is not None, "every code has a plane"
    return code


SPREAD: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}
"""Bits of a part -> an integer of as many bytes as a byte has parts, and how a byte's bits move apart in it: x becomes
(x | x << shift) & mask."""


def _plane(rows: Tensor, part: int) -> Tensor:
    """Every part of a byte as a byte, by whole-array operations on neighbouring memory: slices of a few numbers would take
    longer than all else."""
    if part == 8:
        return rows.clone()
    dtype, moves = SPREAD[part]
    spread = rows.to(dtype)
    for shift, mask in moves:
        spread |= spread << shift
        spread &= mask
    return spread.view(torch.uint8)


def read_codes(row: list[int], start: int, count: int, bits: int) -> list[int]:
    """Every code is cut into planes of 8, 4, 2 or 1 bits, of which a byte holds 8 / part neighbouring ones, the first in its
    lowest bits."""
    codes = [0] * count
    for part in (part for part in (8, 4, 2, 1) if bits & part):
        per_byte = 8 // part
        for j in range(count):
            piece = row[start + j // per_byte] >> part * (j % per_byte) & 2**part - 1
            codes[j] = codes[j] << part | piece
        start += -(-count // per_byte)
    return codes


def read_float16(pair: list[int]) -> float:
    """Little endian."""
    return struct.unpack("<e", bytes(pair))[0]
