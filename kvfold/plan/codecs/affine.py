"""low + c * step, both float16, per token, head and `group_size` numbers of a tier (0: the whole tier)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.plan.codecs._codes import (
    AFFINE_BYTES,
    cut,
    joined,
    over_range,
    pack_codes,
    packed_bytes,
    read_codes,
    read_float16,
    tiers,
    unpack_codes,
)
from kvfold.plan.codecs.base import Codec
from kvfold.plan.number_format import NumberFormat


class Affine(Codec):
    """Equal steps from the smallest number to the largest."""

    word = "affine"

    def obstacle(self, format: NumberFormat) -> str | None:
        if format.group_size < 0 or any(elements % (format.group_size or 1) for elements, _ in format.tiers):
            return f"group_size {format.group_size} does not divide every tier"
        return None

    def scale_bytes(self, format: NumberFormat) -> int:
        return AFFINE_BYTES * sum(_groups(elements, format) for elements, _ in format.tiers)

    def pack(self, x_BCTR: Tensor, format: NumberFormat) -> Tensor:
        scales, codes = [], []
        for part, (_, bits) in zip(tiers(x_BCTR, format), format.tiers, strict=True):
            stored, code = over_range(part.unflatten(-1, (-1, format.group_size or part.shape[-1])), bits, -1)
            scales.append(stored.flatten(-3).view(torch.uint8))
            codes.append(pack_codes(code.flatten(-2), bits))
        return torch.cat(scales + codes, dim=-1)

    def unpack(self, rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> Tensor:
        scales, *codes = cut(rows_BCSX, format)
        parts, at = [], 0
        for code, (elements, bits) in zip(codes, format.tiers, strict=True):
            width = AFFINE_BYTES * _groups(elements, format)
            parts.append(_stretched(unpack_codes(code, bits, elements), scales[..., at : at + width], dtype))
            at += width
        return joined(parts)

    def read_row(self, row: list[int], format: NumberFormat) -> list[list[float]]:
        elements: list[float] = []
        scale, at = 0, self.scale_bytes(format)
        for count, bits in format.tiers:
            codes = read_codes(row, at, count, bits)
            at += packed_bytes(count, bits)
            size = format.group_size or count
            for start in range(0, count, size):
                low, step = read_float16(row[scale : scale + 2]), read_float16(row[scale + 2 : scale + 4])
                scale += AFFINE_BYTES
                elements += [low + code * step for code in codes[start : start + size]]
        return [elements]


def _groups(elements: int, format: NumberFormat) -> int:
    return elements // (format.group_size or elements)


def _stretched(code: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    low, scale = scales.view(torch.float16).unflatten(-1, (-1, 1, 2)).to(dtype).unbind(-1)
    return (code.to(dtype).unflatten(-1, (low.shape[-2], -1)) * scale + low).flatten(-2)
