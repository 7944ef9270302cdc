"""integer: every number in the same few bits, with one scale per token and stored head."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.bits.base import BitsMethod, plain_tiers
from kvfold.plan.codecs._codes import BITS
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat

SCALES = ("exponent", "affine")


@dataclass(frozen=True, kw_only=True)
class Integer(BitsMethod):
    """k_bits, v_bits: of keys and of values.

    scales: `exponent` stores one byte per token and head, and chooses the scale with the least squared error, which clips the
        largest numbers; `affine` stores smallest number and scale in four bytes, the form of most packages.
    group_size: numbers that share an affine scale (0: a whole head).
    """

    k_bits: int = 4
    v_bits: int = 4
    scales: str = "exponent"
    group_size: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("k_bits", BITS), ("v_bits", BITS), ("scales", SCALES)):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"bits.{name} = {getattr(self, name)!r}; choose one of {allowed}.")
        if self.group_size < 0 or (self.group_size and self.scales != "affine"):
            raise RecipeError("bits.group_size must be at least 0, and goes with bits.scales=affine.")

    def format(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat:
        bits = self.v_bits if side == "values" else self.k_bits
        return plain_tiers(width, bits, scales=self.scales, group_size=self.group_size)

    def fits(self, width: int) -> bool:
        return not self.group_size or width % self.group_size == 0
