"""kvtc: principal components of a layer's whole keys before rotation, and of its whole values (KVTC, arXiv 2511.01815)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from kvfold.linalg.reduced_rank import Term
from kvfold.methods.low_rank import LowRankWidth
from kvfold.methods.width.base import LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kvtc(LowRankWidth):
    """Centred, and by their own squared error alone: neither queries nor what attention does with them count.

    For the bits method `mixed`, which shares bits out along the spectrum by dynamic programming, as the paper does. Without
    what the paper has beside that: components across all layers (here a layer's cache is filled before the next layer has
    run), entropy coding (rows have one size), and exact numbers of the first 4 and the newest 128 tokens.

    Since the paper shares bits out over all layers at once, the preset has `allocate: greedy`, which does so, too, by squared
    error, though relative to what each side has. The same share for every layer loses more.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys_before_rotation", "values"})
    needs_cross: ClassVar[frozenset[str]] = frozenset({"keys_before_rotation", "values"})
    rebuilds_on_read: ClassVar[bool] = True
    centres_keys: ClassVar[bool] = True
    centres_values: ClassVar[bool] = True

    v_latent: str = "layer"

    def key_term(self, group: LayerGroup, position: int) -> Term:
        returned = group.owner.rotary_dim > 0
        if group.owner.softcap is not None and not returned:  # capped scores notice a constant that nothing gives back
            keys = group.moments(position)["keys_before_rotation"]
            return Term(keys.second_FF, group.cross(position)["keys_before_rotation"])
        return self._centred(group, position, "keys_before_rotation")

    def value_term(self, group: LayerGroup, position: int) -> Term:
        return self._centred(group, position, "values")

    def _centred(self, group: LayerGroup, position: int, name: str) -> Term:
        own, owner = group.moments(position)[name], group.moments(0)[name]
        return Term(own.covariance_FF, group.cross(position)[name] - torch.outer(own.mean_F, owner.mean_F))
