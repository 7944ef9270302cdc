"""kq_svd: low-rank keys by the SVD of K Q^T, values by that of V W_O (KQ-SVD, arXiv 2512.05916)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.reduced_rank import Term
from kvfold.methods.low_rank import LowRankWidth, value_metric
from kvfold.methods.width.base import LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class KqSvd(LowRankWidth):
    """The best low-rank form of each head's scores over the calibration text, on rotated keys and queries, without centring.

    The paper's form is one latent per head (`latent: group, group_size: 1`, as the preset has it). The singular vectors of
    K Q^T come from S C S, with C the moment of the keys and S^2 that of the queries that read the head.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries", "values"})
    needs_cross: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    def key_term(self, group: LayerGroup, position: int) -> Term:
        moments = group.moments(position)
        metric = BlockDiagonal(moments["queries"].second_FF)
        return Term(moments["keys"].second_FF, group.cross(position)["keys"], metric)

    def value_term(self, group: LayerGroup, position: int) -> Term:
        metric = value_metric(group.layers[position], group.weights(position))
        return Term(group.moments(position)["values"].second_FF, group.cross(position)["values"], metric)
