"""cross_layer: one latent for the keys and one for the values of all layers of a group (after xKV, arXiv 2503.18893)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from kvfold.errors import RecipeError
from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.reduced_rank import Term, distortions, solve
from kvfold.methods.low_rank import value_metric
from kvfold.methods.width.base import LayerGroup, WidthMethod, plain_spec
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape

METRICS = ("logit", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossLayer(WidthMethod):
    """The leading directions of the concatenated keys (after rotation) of a group's layers, and of their values.

    metric: `logit` weighs key errors by what they do to scores and value errors by W_O, `none` is the plain SVD of the paper
        (which takes keys before rotation; ours are stored after it, so that nothing is rebuilt on read).
    multiple: stored widths are multiples of this.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries", "values"})
    needs_cross: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    joint: ClassVar[bool] = True

    metric: str = "logit"
    multiple: int = 8

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise RecipeError(f"width.metric = {self.metric!r}; choose 'logit' or 'none'.")
        if self.multiple < 1:
            raise RecipeError("width.multiple must be at least 1.")

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        full = layers * layer.num_kv_heads * layer.head_dim
        return [StoredShape(1, width) for width in sorted({*range(self.multiple, full, self.multiple), full})]

    value_shapes = key_shapes

    def key_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        term = self._keys(group)
        return [len(group) * distortion for distortion in distortions(lambda i: term, 1, shapes)]

    def value_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        term = self._values(group)
        return [len(group) * distortion for distortion in distortions(lambda i: term, 1, shapes)]

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        return dataclasses.replace(
            plain_spec(layer, keys, values),
            joint=True,
            k_projection=True,
            v_projection=True,
        )

    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        keys = solve(lambda i: self._keys(group), 1, 1, spec.head_dim)
        values = solve(lambda i: self._values(group), 1, 1, spec.v_head_dim)
        size = group.owner.num_kv_heads * group.owner.head_dim
        for position in range(len(group)):
            weights = group.weights(position)
            own = slice(position * size, (position + 1) * size)
            yield FoldedWeights.of(
                weights,
                k_a_proj=keys.a_CRF[:, :, own],
                k_b_proj=keys.back(0)[:, own],
                v_a_proj=values.a_CRF[:, :, own],
                v_b_proj=values.back(0)[:, own],
            )

    def _keys(self, group: LayerGroup) -> Term:
        metric = None
        if self.metric == "logit":
            queries = [group.moments(i)["queries"].second_FF for i in range(len(group))]
            metric = BlockDiagonal(torch.cat(queries))
        return self._term(group, "keys", metric)

    def _values(self, group: LayerGroup) -> Term:
        metric = None
        if self.metric == "logit":
            parts = [value_metric(group.layers[i], group.weights(i)) for i in range(len(group))]
            metric = BlockDiagonal(torch.cat([part.blocks_nbb for part in parts]))
        return self._term(group, "values", metric)

    def _term(self, group: LayerGroup, name: str, metric: BlockDiagonal | None) -> Term:
        """The second moment of the concatenated vectors of all layers, without centring: exact and approximate keys meet in
        one softmax, so a constant is no longer ignored."""
        rows = []
        for i in range(len(group)):
            row = [group.cross(max(i, j), min(i, j))[name] for j in range(len(group))]
            rows.append(torch.cat([block if j <= i else block.T for j, block in enumerate(row)], dim=1))
        second = torch.cat(rows)
        return Term(second, second, metric)
