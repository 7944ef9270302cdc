"""The newest tokens in a finer form beside that of all tokens."""

from __future__ import annotations

import dataclasses

from kvfold.errors import RecipeError
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


def with_recent(layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None, tokens: int) -> CacheSpec:
    """`spec` with so many recent tokens in the form of `finer`, or, where there is none, as numbers before quantization; the
    same where nothing is quantized. Raises RecipeError where both forms do not fit."""
    if finer is not None:
        return _beside(layer, spec, finer, tokens)
    quantized = spec.k_bits is not None or spec.v_bits is not None
    return dataclasses.replace(spec, recent=tokens) if quantized else spec


def _beside(layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec, tokens: int) -> CacheSpec:
    differ = [name for name in SAME_FOR_BOTH if getattr(spec, name) != getattr(finer, name)]
    if differ:
        raise RecipeError(
            f"layer {layer.index}: the finer form of recent tokens differs in {', '.join(differ)}; choose latents of"
            " whole layers (width.latent and width.v_latent: layer)."
        )
    return dataclasses.replace(
        spec,
        recent=tokens,
        recent_head_dim=finer.head_dim,
        v_recent_head_dim=finer.v_head_dim,
        k_recent_bits=finer.k_bits,
        v_recent_bits=finer.v_bits,
        **{n: getattr(spec, n) or getattr(finer, n) for n in ("k_projection", "v_projection", "stored_bias")},
    )
