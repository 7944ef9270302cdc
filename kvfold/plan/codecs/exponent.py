"""One byte of scale per token, head and tier: code c of b bits means (c + 1/2 - 2^(b-1)) 2^((e - 128) / 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.plan.codecs._codes import cut, joined, pack_codes, packed_bytes, read_codes, tiers, unpack_codes
from kvfold.plan.codecs.base import Codec, Scaled
from kvfold.plan.number_format import NumberFormat

STEPS_PER_OCTAVE = 8
"""Neighbouring scales differ by 9 %, so that rounding a scale costs at most 0.5 % of the error."""
BIAS = 128
TRIED_AT_ONCE = 2**22
"""Numbers times scales."""
TRIED = {1: 16, 2: 12, 3: 8, 4: 8, 5: 8, 6: 6, 7: 4, 8: 2}
"""Scales that are tried per tier, from the one that clips nothing down: few bits are better spent on the many small numbers
than on the largest one."""


class Exponent(Codec):
    """The scale with the least squared error, out of a few."""

    fused = True
    packs_fused = True
    keeps_scales_apart = True

    def scale_bytes(self, format: NumberFormat) -> int:
        return len(format.tiers)

    def pack(self, x_BCTR: Tensor, format: NumberFormat) -> Tensor:
        parts = [_quantize(part, bits) for part, (_, bits) in zip(tiers(x_BCTR, format), format.tiers, strict=True)]
        codes = [pack_codes(code, bits) for (_, code), (_, bits) in zip(parts, format.tiers, strict=True)]
        return torch.cat([scale for scale, _ in parts] + codes, dim=-1)

    def unpack(self, rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> Tensor:
        return joined(
            [(codes + 0.5) * scale.to(dtype) for codes, scale in self.unpack_scaled(rows_BCSX, format, dtype)]
        )

    def unpack_scaled(self, rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> list[Scaled]:
        exponents, *codes = cut(rows_BCSX, format)
        exponents = exponents.to(torch.promote_types(dtype, torch.float32))
        scales = torch.exp2((exponents - BIAS) / STEPS_PER_OCTAVE).unsqueeze(-1).unbind(-2)
        return [
            Scaled(unpack_codes(code, bits, elements).sub_(2 ** (bits - 1)).view(torch.int8).to(dtype), scale)
            for code, scale, (elements, bits) in zip(codes, scales, format.tiers, strict=True)
        ]

    def read_row(self, row: list[int], format: NumberFormat) -> list[list[float]]:
        elements: list[float] = []
        at = len(format.tiers)
        for exponent, (count, bits) in zip(row, format.tiers, strict=False):
            scale = 2 ** ((exponent - 128) / 8)
            elements += [(code + 0.5 - 2 ** (bits - 1)) * scale for code in read_codes(row, at, count, bits)]
            at += packed_bytes(count, bits)
        return [elements]


def _quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales as bytes and codes as uint8, of one tier."""
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
