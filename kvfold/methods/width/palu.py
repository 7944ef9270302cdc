"""palu: low-rank keys before rotation and low-rank values, by whitened SVD of the weights (Palu, arXiv 2407.21118)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kvfold.linalg.reduced_rank import Term
from kvfold.methods.low_rank import LowRankWidth
from kvfold.methods.width.base import LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Palu(LowRankWidth):
    """Keys are rebuilt and rotated on read. With S S^T = E[x x^T], the left singular vectors of W S are the eigenvectors of
    W S S^T W^T, which is the moment of the keys before rotation: so the whitening needs no moment of the inputs.

    The paper's forms: groups of four heads (`latent: group, group_size: 4`, as the preset has it) and whole layers. Its ranks
    per layer from Fisher information are left to `allocate`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys_before_rotation", "values"})
    needs_cross: ClassVar[frozenset[str]] = frozenset({"keys_before_rotation", "values"})
    rebuilds_on_read: ClassVar[bool] = True

    def key_term(self, group: LayerGroup, position: int) -> Term:
        keys = group.moments(position)["keys_before_rotation"]
        return Term(keys.second_FF, group.cross(position)["keys_before_rotation"])

    def value_term(self, group: LayerGroup, position: int) -> Term:
        return Term(group.moments(position)["values"].second_FF, group.cross(position)["values"])
