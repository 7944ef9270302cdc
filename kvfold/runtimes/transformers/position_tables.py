"""cos and sin of positions, kept from step to step: of a long cache they would take longer to make than attention does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.cache_spec import round_up
from kvfold.runtimes.kernels.rotary import Tables

BLOCK = 1024
"""Positions that tables grow by."""


class PositionTables:
    """Of one model, for positions from 0 on; they do not depend on how long a sequence is."""

    def __init__(self) -> None:
        self.made: dict[Hashable, Tables] = {}

    def __reduce__(self) -> Any:
        return PositionTables, ()  # copies of a model make their own

    def of(self, name: Hashable, positions_BS: Tensor, make: Callable[[Tensor], Tables]) -> Tables:
        """cos and sin [B or 1, S, r] of positions on a CPU. make: of positions [1, P], which `name` stands for."""
        positions = int(positions_BS.max()) + 1
        if positions > 2 * positions_BS.shape[1] + BLOCK:  # far between, for all that are there
            return make(positions_BS)
        cos, sin = self._known(name, positions, make)
        counted_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
        if torch.equal(positions_BS, counted_S.expand_as(positions_BS)):
            return cos[:, : len(counted_S)], sin[:, : len(counted_S)]
        return cos[0][positions_BS], sin[0][positions_BS]

    def _known(self, name: Hashable, positions: int, make: Callable[[Tensor], Tables]) -> Tables:
        known = self.made.get(name)
        if known is None or known[0].shape[1] < positions:
            with torch.inference_mode(False), torch.no_grad():  # who trains later reads them too
                known = self.made[name] = make(torch.arange(round_up(positions, BLOCK))[None])
        return known
