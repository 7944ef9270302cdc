"""identity: stored numbers keep the checkpoint's own dtype."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.methods.bits.base import BitsMethod
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Identity(BitsMethod):
    """No change."""

    def format(self, layer: AttentionLayer, side: str, width: int) -> None:
        return None
