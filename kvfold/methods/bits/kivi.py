"""kivi: keys per channel over blocks of tokens, values per token (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.bits.base import BitsMethod, plain_tiers
from kvfold.plan.cache_spec import CACHE_BLOCK
from kvfold.plan.codecs._codes import BITS
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat


@dataclass(frozen=True, kw_only=True)
class Kivi(BitsMethod):
    """Keys of a block that is not full stay exact. Unlike the paper, values are quantized at once, not after a window.

    Layers with a sliding window, which would cut blocks, store their keys per token.

    k_bits, v_bits: of keys and of values. block: tokens that share the scales of keys. group_size: numbers that share a scale
        of values (0: a whole head).
    """

    k_bits: int = 2
    v_bits: int = 2
    block: int = 32
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise RecipeError(f"bits.group_size is {self.group_size}; it must be at least 0.")
        if not {self.k_bits, self.v_bits} <= set(BITS) or self.block < 2 or CACHE_BLOCK % self.block:
            raise RecipeError(
                f"bits.k_bits = {self.k_bits} and bits.v_bits = {self.v_bits} are of {BITS}; bits.block = {self.block} is at"
                f" least 2 and divides {CACHE_BLOCK} tokens."
            )

    def format(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat:
        bits = self.v_bits if side == "values" else self.k_bits
        if side == "keys" and layer.window is None:
            return plain_tiers(width, bits, scales="channel", block=self.block)
        return plain_tiers(width, bits, scales="affine", group_size=self.group_size)

    def fits(self, width: int) -> bool:
        return not self.group_size or width % self.group_size == 0
