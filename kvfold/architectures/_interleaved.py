"""Families that rotate numbers 2i and 2i + 1 of a head together, read as if they rotated i and i + r/2.

Scores do not change where queries and keys have their numbers in another order, so the rows that make them are read in the
order that everything else here expects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer, AttentionWeights

REORDERED = ("q_proj", "k_proj", "q_bias", "k_bias", "q_norm", "k_norm")


class Interleaved(Architecture):
    """`tables_interleaved`: whether the family's own tables of cos and sin have every number twice in a row."""

    no_stock_gqa = "kvfold reads the numbers of its heads in another order, and does not write them back."
    tables_interleaved = False

    def facts(self, module: Any, index: int) -> AttentionLayer:
        found = super().facts(module, index)
        return dataclasses.replace(found, interleaved=True, tables_interleaved=self.tables_interleaved)

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        found, order = super().weights(read, layer), list(layer.order_of_numbers)
        parts = {name: getattr(found, name) for name in REORDERED}
        ordered = {
            name: part.unflatten(0, (-1, layer.head_dim))[:, order].flatten(0, 1)
            for name, part in parts.items()
            if part is not None
        }
        return dataclasses.replace(found, **ordered)
