"""svd_a: low-rank key/value heads by SVD of activations (Effectively Compress KV Heads for LLM, arXiv 2406.07056)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from kvfold.attention import AttentionLayer, AttentionWeights
from kvfold.linalg import Moment
from kvfold.lowrank import LowRankWidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdA(LowRankWidth):
    """The right singular vectors of the calibration keys (after rotation) and values, without centring (eqs 7-8).

    They are the eigenvectors of the streamed Gram matrices, so the activations themselves are never kept.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    def key_moment(self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment]) -> Tensor:
        return moments["keys"].second_FF

    def value_moment(self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment]) -> Tensor:
        return moments["values"].second_FF
