"""fisher: latents that keep what predictions depend on, errors counted in nats: the most accurate closed forms of kvfold."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvfold.errors import RecipeError
from kvfold.linalg.reduced_rank import Term, energy
from kvfold.linalg.sensitivity import WEIGHTED, sensitivities
from kvfold.methods.low_rank import LowRankWidth, fisher_metric
from kvfold.methods.width.base import LayerGroup

ROPES = ("applied", "on_read", "banded")
STATISTICS = dict(zip(ROPES, ("keys", "keys_before_rotation", "banded_keys"), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fisher(LowRankWidth):
    """Errors of keys and values count by the Fisher information of the model's predictions (`sensitivity.py`).

    Expected distortions are nats, and can be compared between layers, keys and values.

    rope: `applied` stores latents of rotated keys, which queries meet directly: fast. `on_read` stores latents of keys before
        rotation, of far lower rank; each step rebuilds and rotates what it reads: small. `banded` stores those numbers of
        keys after rotation whose angle changes fast, so that a step has to rebuild nothing (docs/kernels.md).
    """

    needs_cross: ClassVar[frozenset[str]] = frozenset()
    centres_values: ClassVar[bool] = True
    centres_keys: ClassVar[bool] = True
    spans_layers: ClassVar[bool] = False
    in_nats: ClassVar[bool] = True
    two_forms: ClassVar[bool] = True

    v_latent: str = "layer"
    rope: str = "applied"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope not in ROPES:
            raise RecipeError(f"width.rope = {self.rope!r}; choose 'applied', 'on_read' or 'banded'.")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return sensitivities(self._keys) | sensitivities("values")

    @property
    def _keys(self) -> str:
        return STATISTICS[self.rope]

    @property
    def rebuilds_on_read(self) -> bool:  # type: ignore[override]
        return self.rope != "applied"

    @property
    def banded(self) -> bool:  # type: ignore[override]
        return self.rope == "banded"

    @property
    def stored_statistics(self) -> tuple[str, str]:
        return (WEIGHTED + self._keys, WEIGHTED + "values")

    def key_term(self, group: LayerGroup, position: int) -> Term:
        # scores that are capped notice a constant, unless keys get their mean back
        returned = self.rebuilds_on_read and group.owner.rotary_dim > 0
        moment = group.moments(0)[WEIGHTED + self._keys]
        capped = group.owner.softcap is not None and not returned
        second_FF = moment.second_FF if capped else moment.covariance_FF
        return Term(second_FF, second_FF, fisher_metric(group, self._keys, self.latent))

    def value_term(self, group: LayerGroup, position: int) -> Term:
        covariance_FF = group.moments(0)[WEIGHTED + "values"].covariance_FF
        return Term(covariance_FF, covariance_FF, fisher_metric(group, "values", self.v_latent))

    def scale(self, side: str, group: LayerGroup) -> float:
        term = self.key_term(group, 0) if side == "keys" else self.value_term(group, 0)
        return float(energy(term)) / 2
