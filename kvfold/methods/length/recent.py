"""recent: every token stays, and the newest are read in a finer form than all others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer

SAME_FOR_BOTH = (
    "num_kv_heads",
    "num_v_heads",
    "rope",
    "shared_latent",
    "k_partial",
    "k_offset",
    "output_bias",
    "window",
)


@dataclass(frozen=True, kw_only=True)
class Recent(LengthMethod):
    """Most of what a prediction needs stands a few tokens back: these are kept twice, as all others and finely.

    Where leading numbers get more bits than later ones, the finer form is one of its own, made for queries that stand close
    by, and bytes are shared out between both by what they save. Elsewhere it is the same numbers before quantization; where
    nothing is quantized there is none.

    tokens: how many.
    """

    tokens: int = 64

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise RecipeError(f"length.tokens must be at least 1; found {self.tokens}.")

    @property
    def recent(self) -> int:
        return self.tokens

    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        if not self.recent_of(layer):
            return spec
        if finer is not None:
            return self._beside(layer, spec, finer)
        quantized = spec.k_bits is not None or spec.v_bits is not None
        return dataclasses.replace(spec, recent=self.tokens) if quantized else spec

    def _beside(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec) -> CacheSpec:
        differ = [name for name in SAME_FOR_BOTH if getattr(spec, name) != getattr(finer, name)]
        if differ:
            raise RecipeError(
                f"layer {layer.index}: the finer form of recent tokens differs in {', '.join(differ)}; choose latents of"
                " whole layers (width.latent and width.v_latent: layer)."
            )
        return dataclasses.replace(
            spec,
            recent=self.tokens,
            recent_head_dim=finer.head_dim,
            v_recent_head_dim=finer.v_head_dim,
            k_recent_bits=finer.k_bits,
            v_recent_bits=finer.v_bits,
            **{n: getattr(spec, n) or getattr(finer, n) for n in ("k_projection", "v_projection", "stored_bias")},
        )
