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

    def obstacle(self, form: NumberFormat) -> str | None:
        if form.group_size < 0 or any(numbers % (form.group_size or 1) for numbers, _ in form.tiers):
            return f"group_size {form.group_size} does not divide every tier"
        return None

    def scale_bytes(self, form: NumberFormat) -> int:
        return AFFINE_BYTES * sum(_groups(numbers, form) for numbers, _ in form.tiers)

    def pack(self, x_BCTR: Tensor, form: NumberFormat) -> Tensor:
        scales, codes = [], []
        for part, (_, bits) in zip(tiers(x_BCTR, form), form.tiers, strict=True):
            stored, code = over_range(part.unflatten(-1, (-1, form.group_size or part.shape[-1])), bits, -1)
            scales.append(stored.flatten(-3).view(torch.uint8))
            codes.append(pack_codes(code.flatten(-2), bits))
        return torch.cat(scales + codes, dim=-1)

    def unpack(self, rows_BCSX: Tensor, form: NumberFormat, dtype: torch.dtype) -> Tensor:
        scales, *codes = cut(rows_BCSX, form)
        parts, at = [], 0
        for code, (numbers, bits) in zip(codes, form.tiers, strict=True):
            width = AFFINE_BYTES * _groups(numbers, form)
            parts.append(_stretched(unpack_codes(code, bits, numbers), scales[..., at : at + width], dtype))
            at += width
        return joined(parts)

    def read_row(self, row: list[int], form: NumberFormat) -> list[list[float]]:
        numbers: list[float] = []
        scale, at = 0, self.scale_bytes(form)
        for count, bits in form.tiers:
            codes = read_codes(row, at, count, bits)
            at += packed_bytes(count, bits)
            size = form.group_size or count
            for start in range(0, count, size):
                low, step = read_float16(row[scale : scale + 2]), read_float16(row[scale + 2 : scale + 4])
                scale += AFFINE_BYTES
                numbers += [low + code * step for code in codes[start : start + size]]
        return [numbers]


def _groups(numbers: int, form: NumberFormat) -> int:
    return numbers // (form.group_size or numbers)


def _stretched(code: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    low, scale = scales.view(torch.float16).unflatten(-1, (-1, 1, 2)).to(dtype).unbind(-1)
    return (code.to(dtype).unflatten(-1, (low.shape[-2], -1)) * scale + low).flatten(-2)
