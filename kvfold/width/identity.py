"""identity: every number of the original cache is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from kvfold.attention import AttentionLayer, AttentionWeights, FoldedWeights
from kvfold.linalg import Moment
from kvfold.plan import CacheSpec
from kvfold.width.base import StoredShape, WidthMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(WidthMethod):
    """The cache as it is, under kvfold's runtime. For the other axes to work on, and as a control."""

    def key_shapes(self, layer: AttentionLayer) -> list[StoredShape]:
        return [StoredShape(layer.num_kv_heads, layer.head_dim)]

    value_shapes = key_shapes

    def key_damage(
        self,
        layer: AttentionLayer,
        weights: AttentionWeights,
        moments: Mapping[str, Moment],
        shapes: Sequence[StoredShape],
    ) -> list[float]:
        return [0.0 for _ in shapes]

    value_damage = key_damage

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        return CacheSpec(
            num_kv_heads=keys.num_heads,
            head_dim=keys.width,
            num_v_heads=values.num_heads,
            v_head_dim=values.width,
            window=layer.window,
        )

    def fold(
        self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment], spec: CacheSpec
    ) -> FoldedWeights:
        return FoldedWeights(**{f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)})
