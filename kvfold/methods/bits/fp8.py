"""fp8: float8 e4m3 numbers without a scale, as servers keep them by default."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.methods.bits.base import BitsMethod, plain_tiers
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat


@dataclass(frozen=True, kw_only=True)
class Fp8(BitsMethod):
    """Numbers beyond 448 are clipped to it."""

    def format(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat:
        return plain_tiers(width, 8, scales="float8")
