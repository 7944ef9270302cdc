"""orthogonal: every number of the original cache in another orthogonal basis of its head, in which none is an outlier."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvfold.attention import AttentionLayer
from kvfold.latents import Term
from kvfold.lowrank import LowRankWidth
from kvfold.number_format import StoredShape
from kvfold.width.base import LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonal(LowRankWidth):
    """Every head on its own, at its full width: what quantizes it turns it (after QuaRot, arXiv 2404.00456). Without bits it
    is the cache as it is."""

    latent: str = "group"
    group_size: int = 1

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return super().key_shapes(layer, layers)[-1:]

    def value_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return super().value_shapes(layer, layers)[-1:]

    def key_term(self, group: LayerGroup, position: int) -> Term:
        return self._all(group)

    value_term = key_term

    def _all(self, group: LayerGroup) -> Term:
        everything: Tensor = torch.eye(group.owner.num_kv_heads * group.owner.head_dim, dtype=torch.float64)
        return Term(everything, everything)
