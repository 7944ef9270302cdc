"""Numbers <-> packed bytes by the codec of a format, in torch's operations: the obvious version of what kernels do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.plan.codecs.base import Scaled
from kvfold.plan.number_format import NumberFormat


def pack(x_BCTR: Tensor, format: NumberFormat) -> Tensor:
    """Numbers [B, C, T, R] -> rows [B, C, T, row_bytes] of uint8; with scales per channel T is whole blocks and the result
    [B, C, T / block, block_bytes]."""
    x = x_BCTR.detach()
    x = x.float() if x.dtype.itemsize < 4 else x  # codes of half-precision arithmetic would be off by one
    return format.codec.pack(x, format)


def unpack(rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`, but for what quantization lost: [B, C, S, R]."""
    return format.codec.unpack(rows_BCSX, format, dtype)


def unpack_scaled(rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> list[Scaled]:
    """Tiers without their scales multiplied in: a product with many queries can take them later."""
    return format.codec.unpack_scaled(rows_BCSX, format, dtype)


def roundtrip(
    x_BCTR: Tensor,
    format: NumberFormat | None,
    packing: Callable[[Tensor, NumberFormat], Tensor] = pack,
    unpacking: Callable[[Tensor, NumberFormat, torch.dtype], Tensor] = unpack,
) -> Tensor:
    """What a cache that packs so would give back. Gradients pass as if nothing was lost (straight through)."""
    if format is None:
        return x_BCTR
    whole = x_BCTR.shape[2] // format.block * format.block  # tokens of a block that is not full stay exact
    if not whole:
        return x_BCTR
    stored = x_BCTR[:, :, :whole]
    seen = torch.cat([unpacking(packing(stored, format), format, x_BCTR.dtype), x_BCTR[:, :, whole:].detach()], dim=2)
    return x_BCTR + (seen - x_BCTR).detach() if x_BCTR.requires_grad else seen
