"""low + c * step per number of a head over a block of tokens; those of a block that is not full stay exact (KIVI, arXiv
2402.02750)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.plan.codecs._codes import AFFINE_BYTES, over_range, pack_codes, read_codes, read_float16, unpack_codes
from kvfold.plan.codecs.base import Codec
from kvfold.plan.number_format import NumberFormat


class Channel(Codec):
    """Every number of a head has its own range."""

    word = "per channel"
    block_scales = True

    def obstacle(self, format: NumberFormat) -> str | None:
        return None if len(format.tiers) == 1 else "scales per channel go with one tier"

    def scale_bytes(self, format: NumberFormat) -> int:
        return 0

    def shared_bytes(self, format: NumberFormat) -> int:
        return AFFINE_BYTES * format.width

    def pack(self, x_BCTR: Tensor, format: NumberFormat) -> Tensor:
        ((_, bits),) = format.tiers
        scales, codes = over_range(x_BCTR.unflatten(2, (-1, format.block)), bits, 3)
        return torch.cat([scales.flatten(3).view(torch.uint8), pack_codes(codes, bits).flatten(3)], dim=-1)

    def unpack(self, rows_BCnX: Tensor, format: NumberFormat, dtype: torch.dtype) -> Tensor:
        ((width, bits),) = format.tiers
        scales, codes = rows_BCnX.split([AFFINE_BYTES * width, format.block * format.row_bytes], dim=-1)
        low, scale = scales.contiguous().view(torch.float16).unflatten(-1, (1, width, 2)).to(dtype).unbind(-1)
        code = unpack_codes(codes.unflatten(-1, (format.block, -1)), bits, width).to(dtype)
        return (code * scale + low).flatten(2, 3)

    def read_row(self, row: list[int], format: NumberFormat) -> list[list[float]]:
        ((width, bits),) = format.tiers
        tokens = []
        for token in range(format.block):
            codes = read_codes(row, 4 * width + token * format.row_bytes, width, bits)
            ranges = [row[4 * i : 4 * i + 4] for i in range(width)]
            tokens.append([read_float16(r[:2]) + c * read_float16(r[2:]) for c, r in zip(codes, ranges, strict=True)])
        return tokens
