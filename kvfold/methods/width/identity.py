"""identity: every number of the original cache is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from kvfold.methods.width.base import LayerGroup, WidthMethod, as_reader, plain_spec
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(WidthMethod):
    """The cache as it is. Layers that share one take the owner's keys and values for their own, as in KVSharer (arXiv
    2410.18517)."""

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return [StoredShape(layer.num_kv_heads, layer.head_dim)]

    value_shapes = key_shapes

    def key_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return [float(len(group) - 1) for _ in shapes]

    value_distortion = key_distortion

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        return plain_spec(layer, keys, values)

    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        for position in range(len(group)):
            weights = group.weights(position)
            folded = FoldedWeights.of(weights)
            yield as_reader(folded) if position else folded
