"""svd_a: low-rank key/value heads by SVD of activations (Effectively Compress KV Heads for LLM, arXiv 2406.07056)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvfold.linalg.reduced_rank import Term
from kvfold.methods.low_rank import LowRankWidth
from kvfold.methods.width.base import LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdA(LowRankWidth):
    """The right singular vectors of the calibration keys (after rotation) and values, without centring (eqs 7-8).

    They are the eigenvectors of the streamed Gram matrices, so the activations themselves are never kept.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    needs_cross: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    def key_term(self, group: LayerGroup, position: int) -> Term:
        return Term(group.moments(position)["keys"].second_FF, group.cross(position)["keys"])

    def value_term(self, group: LayerGroup, position: int) -> Term:
        return Term(group.moments(position)["values"].second_FF, group.cross(position)["values"])
