"""mean_pool: neighbouring key/value heads become their arithmetic mean (GQA paper, arXiv 2305.13245, section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from kvfold.attention import AttentionLayer, AttentionWeights, FoldedWeights
from kvfold.errors import RecipeError
from kvfold.linalg import Moment
from kvfold.plan import CacheSpec, divisors
from kvfold.width.base import StoredShape, WidthMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanPool(WidthMethod):
    """MHA -> GQA -> MQA. Queries and output projection stay as they are, so quality is lost until it is healed.

    `kv_heads`: stored heads per layer; 0 leaves the choice to the budget.
    """

    kv_heads: int = 0

    def key_shapes(self, layer: AttentionLayer) -> list[StoredShape]:
        heads = divisors(layer.num_kv_heads)
        if self.kv_heads:
            if self.kv_heads not in heads:
                raise RecipeError(
                    f"width.kv_heads = {self.kv_heads} does not divide the {layer.num_kv_heads} key/value heads of layer"
                    f" {layer.index}; choose one of {heads}."
                )
            heads = [self.kv_heads]
        return [StoredShape(count, layer.head_dim) for count in heads]

    value_shapes = key_shapes

    def key_damage(
        self,
        layer: AttentionLayer,
        weights: AttentionWeights,
        moments: Mapping[str, Moment],
        shapes: Sequence[StoredShape],
    ) -> list[float]:
        return [_variance_share(weights.k_proj, layer, shape.num_heads) for shape in shapes]

    def value_damage(
        self,
        layer: AttentionLayer,
        weights: AttentionWeights,
        moments: Mapping[str, Moment],
        shapes: Sequence[StoredShape],
    ) -> list[float]:
        return [_variance_share(weights.v_proj, layer, shape.num_heads) for shape in shapes]

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
        originals = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
        pooled = {
            "k_proj": _pool(weights.k_proj, spec.num_kv_heads, layer.head_dim),
            "v_proj": _pool(weights.v_proj, spec.num_v_heads, layer.head_dim),
            "k_bias": _pool(weights.k_bias, spec.num_kv_heads, layer.head_dim),
            "v_bias": _pool(weights.v_bias, spec.num_v_heads, layer.head_dim),
        }
        return FoldedWeights(**originals | pooled)


def _pool(tensor: Tensor | None, groups: int, head_dim: int) -> Tensor | None:
    """[K*H, ...] -> [groups*H, ...], the mean over the heads of each group."""
    if tensor is None:
        return None
    return tensor.unflatten(0, (groups, -1, head_dim)).mean(1).flatten(0, 1)


def _variance_share(weight: Tensor, layer: AttentionLayer, groups: int) -> float:
    """Share of a projection's energy that its group means do not hold."""
    heads = weight.unflatten(0, (groups, -1, layer.head_dim))
    return ((heads - heads.mean(1, keepdim=True)).square().sum() / weight.square().sum()).item()
