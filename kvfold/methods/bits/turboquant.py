"""turboquant: keys in levels that suit normal numbers, values in equal steps (after TurboQuant, arXiv 2504.19874)."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.bits.base import BitsMethod, plain_tiers
from kvfold.plan.codecs._codes import BITS
from kvfold.plan.codecs.normal import Normal
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat

FLOAT8_BITS = 8


@dataclass(frozen=True, kw_only=True)
class TurboQuant(BitsMethod):
    """For keys that a random orthogonal matrix has turned (width method orthogonal, `sides: keys`), so that the numbers of a
    head are nearly normal: a float16 scale per token and head, and the nearest of 2^k_bits Lloyd-Max levels (section 3.1).
    Values: smallest number and step per token and head, float16 each. Neither looks at data.

    As in vLLM, without the paper's second stage (one bit of the residual by QJL, section 3.2). Unlike vLLM, a prompt sees its
    own tokens as they are stored.

    k_bits, v_bits: of keys and of values; keys in 8 bits are float8 e4m3, and then need no turning. norm_correction: scales
        keep the norm of every key; without it rounding shortens keys.
    """

    k_bits: int = 4
    v_bits: int = 4
    norm_correction: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("k_bits", (*Normal.bits, FLOAT8_BITS)), ("v_bits", BITS)):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"bits.{name} = {getattr(self, name)!r}; choose one of {allowed}.")

    def format(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat:
        if side == "values":
            return plain_tiers(width, self.v_bits, scales="affine")
        if self.k_bits == FLOAT8_BITS:
            return plain_tiers(width, FLOAT8_BITS, scales="float8")
        return plain_tiers(width, self.k_bits, scales="normal", norm_correction=self.norm_correction)
