"""recent: every token stays, and the newest are read in a finer form than all others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import NumberFormat

MOST_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Recent(LengthMethod):
    """Most of what a prediction needs stands a few tokens back: these are kept twice, as all others and finely.

    tokens: how many. more_bits: what each of their numbers gets beyond its bits in the common form, at most 8 together.
    rest_bits: of the numbers that the common form leaves out.
    """

    tokens: int = 64
    more_bits: int = 2
    rest_bits: int = 3

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.more_bits < 0 or not 1 <= self.rest_bits <= MOST_BITS:
            raise RecipeError("length.tokens must be at least 1, length.more_bits 0, length.rest_bits 1 to 8.")

    @property
    def recent(self) -> int:
        return self.tokens

    def apply(self, layer: AttentionLayer, spec: CacheSpec) -> CacheSpec:
        if layer.window is not None and layer.window <= self.tokens:
            return spec
        keys, values = self._widths(layer, spec)
        return dataclasses.replace(
            spec,
            recent=self.tokens,
            recent_head_dim=keys,
            v_recent_head_dim=values,
            k_recent_bits=self._format(spec.k_bits, keys),
            v_recent_bits=self._format(spec.v_bits, values),
            v_projection=spec.v_projection or values > layer.head_dim,
        )

    def _widths(self, layer: AttentionLayer, spec: CacheSpec) -> tuple[int, int]:
        """All numbers of a stored head: what its latents leave out is made, too."""
        if spec.shared_latent:
            return (2 * layer.num_kv_heads * layer.head_dim,) * 2
        if not spec.k_projection:
            return spec.head_dim, spec.v_head_dim
        return tuple(layer.num_kv_heads // heads * layer.head_dim for heads in (spec.num_kv_heads, spec.num_v_heads))  # type: ignore[return-value]

    def _format(self, format: NumberFormat | None, width: int) -> NumberFormat | None:
        if format is None:
            return None
        tiers = [(count, min(bits + self.more_bits, MOST_BITS)) for count, bits in format.tiers]
        if width > format.width:
            tiers.append((width - format.width, self.rest_bits))
        return dataclasses.replace(format, tiers=tuple(tiers))
