"""identity: every token that the original keeps stays."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.attention import AttentionLayer
from kvfold.length.base import LengthMethod
from kvfold.plan import CacheSpec


@dataclass(frozen=True, kw_only=True)
class Identity(LengthMethod):
    """No change."""

    def apply(self, layer: AttentionLayer, spec: CacheSpec) -> CacheSpec:
        return spec
