"""Numbers <-> packed bytes, as a NumberFormat says. One row of bytes per token and head: its scales, then its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.linalg.lloyd_max import lloyd_max, midpoints
from kvfold.plan.number_format import AFFINE_BYTES, NumberFormat, packed_bytes, planes

STEPS_PER_OCTAVE = 8
"""Of exponents: neighbouring scales differ by 9 %, so that rounding a scale costs at most 0.5 % of the error."""
BIAS = 128
TRIED_AT_ONCE = 2**22
"""Numbers times scales."""
TRIED = {1: 16, 2: 12, 3: 8, 4: 8, 5: 8, 6: 6, 7: 4, 8: 2}
"""Scales that are tried per tier, from the one that clips nothing down: few bits are better spent on the many small numbers
than on the largest one."""


def pack(x_BCTR: Tensor, form: NumberFormat) -> Tensor:
    """Numbers [B, C, T, R] -> rows [B, C, T, row_bytes] of uint8; with scales per channel T is whole blocks and the result
    [B, C, T / block, block_bytes]."""
    x = x_BCTR.detach()
    x = x.float() if x.dtype.itemsize < 4 else x  # codes of half-precision arithmetic would be off by one
    if form.scales == "float8":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if form.scales == "channel":
        return _pack_blocks(x, form)
    parts = [_quantize(part, bits, form) for part, (_, bits) in zip(_tiers(x, form), form.tiers, strict=True)]
    codes = [_pack_codes(code, bits) for (_, code), (_, bits) in zip(parts, form.tiers, strict=True)]
    return torch.cat([scale for scale, _ in parts] + codes, dim=-1)


def unpack(rows_BCSX: Tensor, form: NumberFormat, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`, but for what quantization lost: [B, C, S, R]."""
    if form.scales == "float8":
        return _float8(rows_BCSX, dtype)
    if form.scales == "channel":
        return _unpack_blocks(rows_BCSX, form, dtype)
    if form.scales == "exponent":
        parts = [(codes + 0.5) * scale.to(dtype) for codes, scale in unpack_scaled(rows_BCSX, form, dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if form.scales == "normal":
        return _unpack_normal(rows_BCSX, form, dtype)
    scales, *codes = _cut(rows_BCSX, form)
    parts, at = [], 0
    for code, (numbers, bits) in zip(codes, form.tiers, strict=True):
        width = AFFINE_BYTES * (numbers // (form.group_size or numbers))
        parts.append(_affine(_unpack_codes(code, bits, numbers), scales[..., at : at + width], dtype))
        at += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Scaled(NamedTuple):
    """Numbers of one tier, (codes + 1/2) * scale: codes [B, C, S, n] in the dtype that was asked for, scale [B, C, S, 1]."""

    codes: Tensor
    scale: Tensor


def unpack_scaled(rows_BCSX: Tensor, form: NumberFormat, dtype: torch.dtype) -> list[Scaled]:
    """Tiers of an `exponent` format without their scales multiplied in: a product with many queries can take them later."""
    exponents, *codes = _cut(rows_BCSX, form)
    scales = torch.exp2((exponents.to(torch.float32) - BIAS) / STEPS_PER_OCTAVE).unsqueeze(-1).unbind(-2)
    return [
        Scaled(_unpack_codes(code, bits, numbers).sub_(2 ** (bits - 1)).view(torch.int8).to(dtype), scale)
        for code, scale, (numbers, bits) in zip(codes, scales, form.tiers, strict=True)
    ]


def _cut(rows: Tensor, form: NumberFormat) -> list[Tensor]:
    """Scales, in memory of their own where float16 ones are not at an odd address, and the codes of every tier, each without
    gaps."""
    scales, *codes = rows.split(
        [form.row_bytes - form.code_bytes, *(packed_bytes(*tier) for tier in form.tiers)], dim=-1
    )
    return [scales.clone(memory_format=torch.contiguous_format), *(part.contiguous() for part in codes)]


def roundtrip(
    x_BCTR: Tensor, form: NumberFormat | None, packing: Callable[[Tensor, NumberFormat], Tensor] = pack
) -> Tensor:
    """What a cache that packs so would give back. Gradients pass as if nothing was lost (straight through)."""
    if form is None:
        return x_BCTR
    whole = x_BCTR.shape[2] // form.block * form.block  # tokens of a block that is not full stay exact
    if not whole:
        return x_BCTR
    stored = x_BCTR[:, :, :whole]
    seen = torch.cat([unpack(packing(stored, form), form, x_BCTR.dtype), x_BCTR[:, :, whole:].detach()], dim=2)
    return x_BCTR + (seen - x_BCTR).detach() if x_BCTR.requires_grad else seen


def _tiers(x: Tensor, form: NumberFormat) -> tuple[Tensor, ...]:
    return x.split([numbers for numbers, _ in form.tiers], dim=-1)


def _quantize(x: Tensor, bits: int, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Scales as bytes and codes as uint8, of one tier."""
    if form.scales == "affine":
        return _quantize_affine(x, bits, form.group_size)
    if form.scales == "normal":
        return _quantize_normal(x, bits, form.norm_correction)
    exponent = _best_exponent(x, bits)
    half = 2 ** (bits - 1)
    code = (x / torch.exp2(exponent / STEPS_PER_OCTAVE)).floor().clamp(-half, half - 1) + half
    return (exponent + BIAS).to(torch.uint8), code.to(torch.uint8)


def _best_exponent(x: Tensor, bits: int) -> Tensor:
    """Of the scales worth trying the one with the least squared error, [..., 1]."""
    half, tiny = 2 ** (bits - 1), torch.finfo(torch.float32).tiny
    largest = x.abs().amax(-1, keepdim=True).clamp_min(tiny) / (half - 0.5)
    exponent = (largest.log2() * STEPS_PER_OCTAVE).ceil().clamp(-BIAS, BIAS - 1)
    tried = (exponent - torch.arange(TRIED[bits], device=x.device)).clamp_min(-BIAS)
    tokens = max(TRIED_AT_ONCE // (x[:, :, :1].numel() * TRIED[bits]), 1)
    parts = zip(x.split(tokens, 2), tried.split(tokens, 2), strict=True)
    best = torch.cat([_errors(part, exponents, half).argmin(-1, keepdim=True) for part, exponents in parts], dim=2)
    return tried.gather(-1, best)


def _errors(x: Tensor, exponents: Tensor, half: int) -> Tensor:
    """Squared error of every scale, [..., number of scales]."""
    scale, x = torch.exp2(exponents / STEPS_PER_OCTAVE).unsqueeze(-1), x.unsqueeze(-2)
    codes = (x / scale).floor_().clamp_(-half, half - 1).add_(0.5)
    return codes.mul_(scale).sub_(x).square_().sum(-1)


def _quantize_affine(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    scales, codes = _over_range(groups, bits, -1)
    return scales.flatten(-3).view(torch.uint8), codes.flatten(-2)


def _over_range(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """float16 (low, scale) [..., 2] over `dim`, and the codes of x in them as they will be read."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float16).smallest_normal)
    stored = torch.stack([low, scale], dim=-1).to(torch.float16)
    low, scale = stored.to(x.dtype).unbind(-1)
    return stored, ((x - low) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)


def _quantize_normal(x: Tensor, bits: int, norm_correction: bool) -> tuple[Tensor, Tensor]:
    """The nearest levels of numbers brought to a mean square of 1 (TurboQuant, arXiv 2504.19874, algorithm 1)."""
    levels, range16 = x.new_tensor(lloyd_max(bits)), torch.finfo(torch.float16)
    scale = x.square().mean(-1, keepdim=True).sqrt()
    codes = torch.bucketize((x / scale.clamp_min(range16.tiny)).contiguous(), midpoints(levels))
    if norm_correction:
        scale = scale / levels[codes].square().mean(-1, keepdim=True).sqrt()
    return scale.clamp_max(range16.max).to(torch.float16).view(torch.uint8), codes.to(torch.uint8)


def _unpack_normal(rows: Tensor, form: NumberFormat, dtype: torch.dtype) -> Tensor:
    scales, *codes = _cut(rows, form)
    scales = scales.view(torch.float16).to(dtype).unsqueeze(-1)
    parts = [
        _levels_of(_unpack_codes(code, bits, numbers), bits, dtype).mul_(scale)
        for code, scale, (numbers, bits) in zip(codes, scales.unbind(-2), form.tiers, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _levels_of(code: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    levels = torch.tensor(lloyd_max(bits), dtype=dtype, device=code.device)
    return levels.index_select(0, code.flatten().int()).view(code.shape)  # without indices of 8 bytes


def _float8(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sign, exponent and mantissa moved to where float16 has them, whose exponents are eight larger: several times faster on
    a CPU than torch's own conversion."""
    bits = rows.to(torch.int16)
    sign = (bits & 0x80) << 8
    return bits.bitwise_and_(0x7F).bitwise_left_shift_(7).bitwise_or_(sign).view(torch.float16).to(dtype).mul_(256)


def _affine(code: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    low, scale = scales.view(torch.float16).unflatten(-1, (-1, 1, 2)).to(dtype).unbind(-1)
    return (code.to(dtype).unflatten(-1, (low.shape[-2], -1)) * scale + low).flatten(-2)


def _pack_blocks(x_BCTR: Tensor, form: NumberFormat) -> Tensor:
    ((_, bits),) = form.tiers
    scales, codes = _over_range(x_BCTR.unflatten(2, (-1, form.block)), bits, 3)
    return torch.cat([scales.flatten(3).view(torch.uint8), _pack_codes(codes, bits).flatten(3)], dim=-1)


def _unpack_blocks(rows_BCnX: Tensor, form: NumberFormat, dtype: torch.dtype) -> Tensor:
    ((width, bits),) = form.tiers
    scales, codes = rows_BCnX.split([AFFINE_BYTES * width, form.block * form.row_bytes], dim=-1)
    low, scale = scales.contiguous().view(torch.float16).unflatten(-1, (1, width, 2)).to(dtype).unbind(-1)
    code = _unpack_codes(codes.unflatten(-1, (form.block, -1)), bits, width).to(dtype)
    return (code * scale + low).flatten(2, 3)


def _pack_codes(code: Tensor, bits: int) -> Tensor:
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


def _unpack_codes(rows: Tensor, bits: int, numbers: int) -> Tensor:
    """The inverse: [..., numbers] of uint8, in new memory."""
    code, at, shift = None, 0, bits
    for part in planes(bits):
        size, shift = packed_bytes(numbers, part), shift - part
        plane = _plane(rows[..., at : at + size].contiguous(), part)[..., :numbers]
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
