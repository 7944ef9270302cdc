"""identity: stored numbers keep the checkpoint's own dtype."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.attention import AttentionLayer
from kvfold.bits.base import BitsMethod


@dataclass(frozen=True, kw_only=True)
class Identity(BitsMethod):
    """No change."""

    def form(self, layer: AttentionLayer, side: str, width: int) -> None:
        return None
