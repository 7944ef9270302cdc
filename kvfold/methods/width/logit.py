"""logit: low-rank keys that keep attention scores, low-rank values that keep the attention's output."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.reduced_rank import Term
from kvfold.methods.low_rank import LowRankWidth, value_metric
from kvfold.methods.width.base import LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logit(LowRankWidth):
    """svd_a with the errors weighed by what they do, and with means that cost nothing (docs/architecture.md).

    Keys: the expected squared error of all scores, sum_n E[(q_n . (k - k'))^2]; softmax ignores a constant added to all
    scores of a query, so keys count without their mean. Values: the squared error that reaches the residual stream
    through W_O; attention weights sum to one, so the mean goes into an output bias.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries", "values"})
    needs_cross: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    centres_values: ClassVar[bool] = True

    def key_term(self, group: LayerGroup, position: int) -> Term:
        queries = group.moments(position)["queries"].second_FF  # [K, H, H], the mean over the query heads of each
        metric = BlockDiagonal(queries)
        if group.layers[position].softcap is not None:  # capped scores notice a constant
            return Term(group.moments(position)["keys"].second_FF, group.cross(position)["keys"], metric)
        return self._centred(group, position, "keys", metric)

    def value_term(self, group: LayerGroup, position: int) -> Term:
        metric = value_metric(group.layers[position], group.weights(position))
        return self._centred(group, position, "values", metric)

    def _centred(self, group: LayerGroup, position: int, name: str, metric: BlockDiagonal) -> Term:
        own, owner = group.moments(position)[name], group.moments(0)[name]
        cross = group.cross(position)[name] - torch.outer(own.mean_F, owner.mean_F)
        return Term(own.covariance_FF, cross, metric)
