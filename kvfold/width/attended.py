"""attended: latents that keep what attention does with keys and values: the most accurate closed forms that kvfold has."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.averaging import solve_averaged
from kvfold.errors import RecipeError
from kvfold.latents import Latents, Term
from kvfold.lowrank import LowRankWidth, value_metric
from kvfold.plan import CacheSpec
from kvfold.width.base import LayerGroup

ROPES = ("applied", "on_read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended(LowRankWidth):
    """Errors count as far as they move the layer's output (docs/architecture.md).

    Keys: the expected squared error of scores, each weighed by the square of what it does to the output. Values: the squared
    error of the output itself, over values as each head averages them, by alternating least squares.

    rope: `applied` stores latents of rotated keys, which queries meet directly: fast. `on_read` stores latents of keys before
        rotation, of far lower rank; each step rebuilds and rotates what it reads: small.
    sweeps: of alternating least squares.
    """

    needs_cross: ClassVar[frozenset[str]] = frozenset()
    centres_values: ClassVar[bool] = True
    centres_keys: ClassVar[bool] = True
    spans_layers: ClassVar[bool] = False

    v_latent: str = "layer"
    rope: str = "applied"
    sweeps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope not in ROPES:
            raise RecipeError(f"width.rope = {self.rope!r}; choose 'applied' or 'on_read'.")
        if self.sweeps < 0:
            raise RecipeError("width.sweeps must be at least 0.")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({*self._key_statistics, "values", "averaged_values"})

    @property
    def _key_statistics(self) -> tuple[str, str]:
        """Keys as they are stored, and the queries that meet them."""
        return ("keys_before_rotation", "queries_at_keys") if self.rebuilds_on_read else ("keys", "queries_that_matter")

    @property
    def rebuilds_on_read(self) -> bool:  # type: ignore[override]
        return self.rope == "on_read"

    def key_term(self, group: LayerGroup, position: int) -> Term:
        keys, queries = (group.moments(0)[name] for name in self._key_statistics)
        # scores that are capped notice a constant, unless keys get their mean back
        returned = self.rebuilds_on_read and group.owner.rotary_dim > 0
        capped = group.owner.softcap is not None and not returned
        second = keys.second_FF if capped else keys.covariance_FF
        return Term(second, second, torch.block_diag(*queries.second_FF))

    def value_term(self, group: LayerGroup, position: int) -> Term:
        averaged_FF = self._averaged(group).mean(0)
        return Term(averaged_FF, averaged_FF, value_metric(group.owner, group.weights(0)))

    def value_latents(self, group: LayerGroup, spec: CacheSpec) -> Latents:
        metric_FF = value_metric(group.owner, group.weights(0))
        return solve_averaged(self._averaged(group), metric_FF, spec.num_v_heads, spec.v_head_dim, self.sweeps)

    def missing_values(self, group: LayerGroup, position: int, values: Latents) -> Tensor:
        """Every head's mean is that of the values as it averages them."""
        K, back_UFV = group.owner.num_kv_heads, values.back(0)
        means_KF = group.moments(0)["averaged_values"].mean_F.expand(K, -1)
        seen_KF = torch.einsum(
            "ufv,uvg,kug->kuf", back_UFV, values.a_CRF, means_KF.unflatten(1, (len(back_UFV), -1))
        ).flatten(1)
        missing_KKH = (means_KF - seen_KF).unflatten(1, (K, -1))
        return missing_KKH.diagonal(dim1=0, dim2=1).T

    def _averaged(self, group: LayerGroup) -> Tensor:
        """Covariances [K or 1, F, F] of averaged values."""
        return group.moments(0)["averaged_values"].covariance_FF
