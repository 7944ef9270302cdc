"""orthogonal: every number of the original cache in another orthogonal basis of its head, in which none is an outlier."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.linalg.reduced_rank import Latents, Term
from kvfold.methods.low_rank import LowRankWidth
from kvfold.methods.width.base import LayerGroup
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape

SIDES = ("both", "keys")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orthogonal(LowRankWidth):
    """Every head on its own, at its full width: what quantizes it turns it (after QuaRot, arXiv 2404.00456). Without bits it
    is the cache as it is.

    sides: what is turned, `both` keys and values, or `keys` alone, as in TurboQuant (arXiv 2504.19874). The matrix is random
        and the same for all heads of a width; no data is seen.
    """

    latent: str = "group"
    group_size: int = 1
    sides: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sides not in SIDES:
            raise RecipeError(f"width.sides = {self.sides!r}; choose one of {SIDES}.")

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return super().key_shapes(layer, layers)[-1:]

    def value_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return super().value_shapes(layer, layers)[-1:]

    def key_term(self, group: LayerGroup, position: int) -> Term:
        return self._all(group)

    value_term = key_term

    def _stored_latents(self, group: LayerGroup, spec: CacheSpec) -> tuple[Latents, Latents]:
        if self.sides == "keys":  # what is not quantized is not turned
            spec = dataclasses.replace(spec, v_bits=None)
        return super()._stored_latents(group, spec)

    def value_latents(self, group: LayerGroup, spec: CacheSpec) -> Latents:
        if self.sides == "both":
            return super().value_latents(group, spec)
        eye_UVV = torch.eye(spec.v_head_dim, dtype=torch.float64).expand(spec.num_v_heads, -1, -1)
        return Latents(eye_UVV, lambda position: eye_UVV)

    def _all(self, group: LayerGroup) -> Term:
        everything: Tensor = torch.eye(group.owner.num_kv_heads * group.owner.head_dim, dtype=torch.float64)
        return Term(everything, everything)
