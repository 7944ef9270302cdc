"""identity: every layer owns its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.methods.depth.base import DepthMethod, Sample, Targets
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Identity(DepthMethod):
    """No sharing."""

    def layouts(self, layers: Sequence[AttentionLayer], sample: Sample | None) -> list[Targets]:
        return [(None,) * len(layers)]
