"""Level c of the Lloyd-Max quantizer of b bits for normal numbers, times a float16 scale per token, head and tier.

TurboQuant, arXiv 2504.19874, algorithm 1.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from kvfold.plan.codecs._codes import (
    cut,
    joined,
    pack_codes,
    packed_bytes,
    read_codes,
    read_float16,
    tiers,
    unpack_codes,
)
from kvfold.plan.codecs._lloyd_max import lloyd_max, midpoints
from kvfold.plan.codecs.base import Codec
from kvfold.plan.number_format import NumberFormat

SCALE_BYTES = 2


class Normal(Codec):
    """For numbers that a random orthogonal matrix has turned, which are nearly normal.

    With `norm_correction` a scale keeps the norm of a token's numbers, else their root mean square before rounding. Beyond 6
    bits equal steps are nearly as good.
    """

    word = "normal"
    bits = (1, 2, 3, 4, 5, 6)

    def scale_bytes(self, format: NumberFormat) -> int:
        return SCALE_BYTES * len(format.tiers)

    def pack(self, x_BCTR: Tensor, format: NumberFormat) -> Tensor:
        parts = [
            _quantize(part, bits, format.norm_correction)
            for part, (_, bits) in zip(tiers(x_BCTR, format), format.tiers, strict=True)
        ]
        codes = [pack_codes(code, bits) for (_, code), (_, bits) in zip(parts, format.tiers, strict=True)]
        return torch.cat([scale for scale, _ in parts] + codes, dim=-1)

    def unpack(self, rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> Tensor:
        scales, *codes = cut(rows_BCSX, format)
        scales = scales.view(torch.float16).to(dtype).unsqueeze(-1)
        parts = [
            _levels_of(unpack_codes(code, bits, elements), bits, dtype).mul_(scale)
            for code, scale, (elements, bits) in zip(codes, scales.unbind(-2), format.tiers, strict=True)
        ]
        return joined(parts)

    def read_row(self, row: list[int], format: NumberFormat) -> list[list[float]]:
        elements: list[float] = []
        at = self.scale_bytes(format)
        for tier, (count, bits) in enumerate(format.tiers):
            scale = read_float16(row[2 * tier : 2 * tier + 2])
            elements += [_obvious_levels(bits)[code] * scale for code in read_codes(row, at, count, bits)]
            at += packed_bytes(count, bits)
        return [elements]


def _quantize(x: Tensor, bits: int, norm_correction: bool) -> tuple[Tensor, Tensor]:
    """The nearest levels of numbers brought to a mean square of 1 (TurboQuant, arXiv 2504.19874, algorithm 1)."""
    levels, range16 = x.new_tensor(lloyd_max(bits)), torch.finfo(torch.float16)
    scale = x.square().mean(-1, keepdim=True).sqrt()
    codes = torch.bucketize((x / scale.clamp_min(range16.tiny)).contiguous(), midpoints(levels))
    if norm_correction:
        scale = scale / levels[codes].square().mean(-1, keepdim=True).sqrt()
    return scale.clamp_max(range16.max).to(torch.float16).view(torch.uint8), codes.to(torch.uint8)


def _levels_of(code: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    levels = torch.tensor(lloyd_max(bits), dtype=dtype, device=code.device)
    return levels.index_select(0, code.flatten().int()).view(code.shape)  # without indices of 8 bytes


@functools.cache
def _obvious_levels(bits: int) -> list[float]:
    """Of the quantizer with the least squared error for normal numbers: every level is the mean of what is nearest to it.
    Lloyd's iteration from equal steps finds them."""
    levels, moved = [(i + 0.5) * 6 / 2**bits - 3 for i in range(2**bits)], 1.0
    while moved > 1e-11:
        edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
        means = [_obvious_mean(low, high) for low, high in itertools.pairwise(edges)]
        levels, moved = means, max(abs(a - b) for a, b in zip(means, levels, strict=True))
    return levels


def _obvious_mean(low: float, high: float) -> float:
    """Of the normal numbers between two bounds."""
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    return (density[0] - density[1]) / ((math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2)
