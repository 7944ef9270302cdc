"""eigen_attention: one low-rank basis for keys and queries together, by SVD of [K; Q] (Eigen Attention, arXiv 2408.05646)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from kvfold.linalg.reduced_rank import Term
from kvfold.methods.low_rank import LowRankWidth
from kvfold.methods.width.base import LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class EigenAttention(LowRankWidth):
    """The leading directions of keys and queries stacked, both before rotation; keys are rebuilt and rotated on read.

    Queries count as a block per key/value head: the moments between heads, which the paper's stack of whole layers also has,
    are left out. Values by their own SVD.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys_before_rotation", "queries_before_rotation", "values"})
    needs_cross: ClassVar[frozenset[str]] = frozenset({"keys_before_rotation", "values"})
    rebuilds_on_read: ClassVar[bool] = True

    def key_term(self, group: LayerGroup, position: int) -> Term:
        moments = group.moments(position)
        queries = torch.block_diag(*moments["queries_before_rotation"].second_FF)
        stacked = moments["keys_before_rotation"].second_FF + queries
        if not position:
            return Term(stacked, stacked)
        return Term(stacked, group.cross(position)["keys_before_rotation"])

    def value_term(self, group: LayerGroup, position: int) -> Term:
        return Term(group.moments(position)["values"].second_FF, group.cross(position)["values"])
