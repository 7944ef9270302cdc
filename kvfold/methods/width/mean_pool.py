"""mean_pool: neighbouring key/value heads become their arithmetic mean, over the layers that share a cache too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.methods.width.base import LayerGroup, WidthMethod, as_reader, plain_spec
from kvfold.plan.cache_spec import CacheSpec, divisors
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.number_format import StoredShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanPool(WidthMethod):
    """MHA -> GQA -> MQA (arXiv 2305.13245, section 2.1) and, with a depth method, MLKV (arXiv 2406.09297).

    Queries and output projections stay as they are, so quality is lost until it is healed.
    `kv_heads`: stored heads per cache; 0 leaves the choice to the budget.
    """

    kv_heads: int = 0

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
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

    def key_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return _variance_shares(group, lambda weights: weights.k_proj, shapes)

    def value_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return _variance_shares(group, lambda weights: weights.v_proj, shapes)

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        return dataclasses.replace(
            plain_spec(layer, keys, values),
            k_projection=layer.norms_tell_heads_apart and keys.num_heads < layer.num_kv_heads,
        )

    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        H = group.owner.head_dim
        key_heads = group.owner.num_kv_heads if spec.k_projection else spec.num_kv_heads
        pooled = {
            "k_proj": _mean(group, lambda w: _pool(w.k_proj, key_heads, H)),
            "v_proj": _mean(group, lambda w: _pool(w.v_proj, spec.num_v_heads, H)),
            "k_bias": _mean(group, lambda w: _pool(w.k_bias, key_heads, H)),
            "v_bias": _mean(group, lambda w: _pool(w.v_bias, spec.num_v_heads, H)),
            "k_norm": _mean(group, lambda w: w.k_norm),
            "k_norm_bias": _mean(group, lambda w: w.k_norm_bias),
        }
        if spec.k_projection:  # norms of all heads of a token, or of each one's own, stand before the mean
            each = torch.eye(H, dtype=torch.float64).repeat(1, group.owner.num_kv_heads // spec.num_kv_heads)
            pooled["k_a_proj"] = (each * spec.num_kv_heads / group.owner.num_kv_heads).expand(spec.num_kv_heads, -1, -1)
            pooled["k_b_proj"] = each.T.expand(spec.num_kv_heads, -1, -1)
        for position in range(len(group)):
            weights = group.weights(position)
            folded = FoldedWeights.of(weights, **pooled)
            yield as_reader(folded) if position else folded


def _mean(group: LayerGroup, tensor: Callable[[AttentionWeights], Tensor | None]) -> Tensor | None:
    """The arithmetic mean over the group's layers; every layer has the same share, which a running half-and-half lacks."""
    total = tensor(group.weights(0))
    for position in range(1, len(group)):
        other = tensor(group.weights(position))
        total = None if total is None or other is None else total + other
    return None if total is None else total / len(group)


def _pool(tensor: Tensor | None, groups: int, head_dim: int) -> Tensor | None:
    """[K*H, ...] -> [groups*H, ...], the mean over the heads of each group."""
    if tensor is None:
        return None
    return tensor.unflatten(0, (groups, -1, head_dim)).mean(1).flatten(0, 1)


def _variance_shares(
    group: LayerGroup, projection: Callable[[AttentionWeights], Tensor], shapes: Sequence[StoredShape]
) -> list[float]:
    """Per shape: the share of the projections' energy that the means do not hold, times the number of layers."""
    stack_LFD = torch.stack([projection(group.weights(i)) for i in range(len(group))])
    shares = []
    for shape in shapes:
        heads = stack_LFD.unflatten(1, (shape.num_heads, -1, group.owner.head_dim))  # [L, heads, per mean, H, D]
        lost = (heads - heads.mean((0, 2), keepdim=True)).square().sum() / stack_LFD.square().sum()
        shares.append(len(group) * lost.item())
    return shares
