"""How fast the pairs of a head turn, as a family's own rotary module says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.layer import FAST, AttentionLayer

CHANGING = frozenset({"dynamic", "longrope"})
"""Kinds of rope scaling whose tables depend on the length of a sequence: keys that are stored turned would keep old ones."""


def rotary_speeds(module: Any) -> Mapping[str | None, Tensor]:
    """Kind of rotation -> radians per token of each pair, of a rotary module that may be on the meta device; nothing for
    kinds whose tables change."""
    if module is None:
        return {}
    with torch.device("cpu"):
        made = type(module)(config=module.config)
    kinds = made.rope_type if isinstance(made.rope_type, dict) else {None: made.rope_type}
    return {
        kind: getattr(made, "inv_freq" if kind is None else f"{kind}_inv_freq")
        for kind, rope_type in kinds.items()
        if rope_type not in CHANGING
    }


def fast_pairs(speeds: Mapping[str | None, Tensor], layer: AttentionLayer) -> int:
    """How many of the first pairs of a layer's heads turn by more than FAST."""
    speed_P = speeds.get(layer.rotary_kind)
    if speed_P is None or not layer.rotary_dim:
        return 0
    return int((speed_P > FAST).int().cumprod(0).sum())
