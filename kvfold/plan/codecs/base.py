"""The contract of a codec: what a scheme of scales means, in bytes and in numbers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvfold import registry
from kvfold.plan.codecs._codes import BITS

if TYPE_CHECKING:
    from kvfold.plan.number_format import NumberFormat

SIZES = (8, 16, 32, 64, 192, 1024)
NOISE = {
    1: (0.318, 0.341, 0.355, 0.362, 0.374, 0.406),
    2: (0.0782, 0.0974, 0.1077, 0.1133, 0.1172, 0.1194),
    3: (0.0178, 0.0244, 0.0297, 0.0333, 0.0361, 0.0377),
    4: (0.00436, 0.00604, 0.00756, 0.00897, 0.01058, 0.01139),
    5: (0.00117, 0.00155, 0.00194, 0.00233, 0.0029, 0.00338),
    6: (0.0003, 0.0004, 0.0005, 0.0006, 0.00076, 0.00094),
    7: (7.6e-5, 1e-4, 1.26e-4, 1.52e-4, 1.93e-4, 2.49e-4),
    8: (2e-5, 2.6e-5, 3.2e-5, 3.9e-5, 5e-5, 6.7e-5),
}
"""Squared error as a share of the energy, of normally distributed numbers in tiers of SIZES with one scale: a scale for few
numbers follows them more closely. A test measures it again."""


class Scaled(NamedTuple):
    """Numbers of one tier, (codes + 1/2) * scale: codes [B, C, S, n] in the dtype that was asked for, scale [B, C, S, 1]."""

    codes: Tensor
    scale: Tensor


class Codec(ABC):
    """One scheme of scales. A row of bytes holds a token of one head: its scales, then the codes of every tier; or, where
    tokens share scales, a block of tokens.

    `word`: how tables name it. `bits`: those that a code may have. `fused`: the kernels of cpu.py and triton_kernels.py read
    it (torch's operations read all); `packs_fused`: they make it too. `keeps_scales_apart`: `unpack_scaled` gives codes and
    scales for products that take the scales afterwards. `block_scales`: tokens of a block share scales, and those of a block
    that is not full stay exact.
    """

    word: ClassVar[str] = ""
    bits: ClassVar[tuple[int, ...]] = BITS
    fused: ClassVar[bool] = False
    packs_fused: ClassVar[bool] = False
    keeps_scales_apart: ClassVar[bool] = False
    block_scales: ClassVar[bool] = False

    def obstacle(self, format: NumberFormat) -> str | None:
        """What contradicts itself in a format of this scheme; None where nothing does."""
        return None

    @abstractmethod
    def scale_bytes(self, format: NumberFormat) -> int:
        """Of one token's own scales in one head."""

    def shared_bytes(self, format: NumberFormat) -> int:
        """Of the scales that a block shares, in one head."""
        return 0

    @abstractmethod
    def pack(self, x_BCTR: Tensor, format: NumberFormat) -> Tensor:
        """Numbers [B, C, T, R], float32 at least -> rows [B, C, T / block, block_bytes] of uint8; T is whole blocks."""

    @abstractmethod
    def unpack(self, rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> Tensor:
        """The inverse, but for what quantization lost: [B, C, S, R]."""

    def unpack_scaled(self, rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> list[Scaled]:
        """The same without the scales multiplied in, tier by tier, where `keeps_scales_apart`."""
        raise NotImplementedError("only where keeps_scales_apart")

    @abstractmethod
    def read_row(self, row: list[int], format: NumberFormat) -> list[list[float]]:
        """The tokens of one row, one number at a time: the obvious version, which `unpack` is compared with."""

    def noise(self, format: NumberFormat) -> float:
        """Expected squared error as a share of the energy of what is stored, about."""
        shares = [elements * float(np.interp(elements, SIZES, NOISE[bits])) for elements, bits in format.tiers]
        return sum(shares) / format.width


CONTRACT = Codec


@functools.cache
def codec(scales: str) -> Codec:
    """The scheme that a plan names."""
    return registry.load("codecs", scales)()
