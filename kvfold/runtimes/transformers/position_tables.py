"""cos and sin of positions, kept from step to step: of a long cache they would take longer to make than attention does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.plan.cache_spec import round_up
from kvfold.runtimes.kernels.rotary import Tables

BLOCK = 1024
"""Positions that tables grow by."""


class _Kept(NamedTuple):
    """Tables, and the numbers that they were made by, as they were."""

    tables: Tables
    made_by: tuple[Tensor, ...]
    versions: list[int]


class PositionTables:
    """Of one model, for positions from 0 on; they do not depend on how long a sequence is."""

    def __init__(self) -> None:
        self.made: dict[Hashable, _Kept] = {}

    def __reduce__(self) -> Any:
        return PositionTables, ()  # copies of a model make their own

    def of(
        self, name: Hashable, positions_BS: Tensor, make: Callable[[Tensor], Tables], made_by: Sequence[Tensor] = ()
    ) -> Tables:
        """cos and sin [B or 1, S, r] of positions on a CPU. make: of positions [1, P], which `name` stands for as long as the
        tensors that it reads, `made_by`, are the same and not written to."""
        least, most = (int(x) for x in positions_BS.aminmax())
        if least < 0 or most > 2 * positions_BS.shape[1] + BLOCK:  # far between, for all that are there
            return make(positions_BS)
        cos, sin = self._known(name, most + 1, make, tuple(made_by))
        counted_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
        if torch.equal(positions_BS, counted_S.expand_as(positions_BS)):
            return cos[:, : len(counted_S)], sin[:, : len(counted_S)]
        return cos[0][positions_BS], sin[0][positions_BS]

    def _known(
        self, name: Hashable, positions: int, make: Callable[[Tensor], Tables], made_by: tuple[Tensor, ...]
    ) -> Tables:
        known, versions = self.made.get(name), [0 if x.is_inference() else x._version for x in made_by]
        same = known is not None and known.versions == versions and all(map(operator.is_, known.made_by, made_by))
        if known is None or not same or known.tables[0].shape[1] < positions:
            with torch.inference_mode(False), torch.no_grad():  # who trains later reads them too
                tables = make(torch.arange(round_up(positions, BLOCK), device="cpu")[None])
            known = self.made[name] = _Kept(tables, made_by, versions)
        return known.tables
