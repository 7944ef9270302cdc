"""identity: every token that the original keeps stays."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Identity(LengthMethod):
    """No change."""

    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        return spec
