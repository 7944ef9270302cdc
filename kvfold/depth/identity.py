"""identity: every layer owns its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.attention import AttentionLayer
from kvfold.depth.base import DepthMethod


@dataclass(frozen=True, kw_only=True)
class Identity(DepthMethod):
    """No sharing."""

    def targets(self, layers: Sequence[AttentionLayer]) -> tuple[int | None, ...]:
        return (None,) * len(layers)
