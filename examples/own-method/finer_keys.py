"""finer_keys: keys in more bits than values, since scores depend on them through an exponential."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.compression.presets import Preset
from kvfold.methods.bits.base import BitsMethod, plain_tiers
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat


@dataclass(frozen=True, kw_only=True)
class FinerKeys(BitsMethod):
    """k_bits, v_bits: of every number; each is a field that `--set bits.k_bits=5` changes."""

    k_bits: int = 6
    v_bits: int = 4

    def format(self, layer: AttentionLayer, side: str, width: int) -> NumberFormat:
        return plain_tiers(width, self.k_bits if side == "keys" else self.v_bits)


PRESET = Preset("keys in 6 bits, values in 4", {"width": {"method": "identity"}, "bits": {"method": "finer_keys"}})
