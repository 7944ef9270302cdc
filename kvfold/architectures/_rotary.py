"""How fast the pairs of a head turn, as a family's own rotary module says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

CHANGING = frozenset({"dynamic", "longrope"})
"""Kinds of rope scaling whose tables depend on the length of a sequence: keys that are stored turned would keep old ones."""


def rope_types(module: Any) -> Mapping[str | None, str]:
    """Kind of rotation -> its rope_type, of a rotary module."""
    return module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}


def rotated_numbers(module: Any) -> Mapping[str | None, int]:
    """Kind of rotation -> numbers of each head that its tables turn, whatever the config says of them."""
    if module is None:
        return {}
    return {kind: 2 * len(_frequencies(module, kind)) for kind in rope_types(module)}


def _frequencies(module: Any, kind: str | None) -> Any:
    """Radians per token of each pair."""
    return getattr(module, "inv_freq" if kind is None else f"{kind}_inv_freq")


def rotary_speeds(module: Any) -> Mapping[str | None, tuple[float, ...]]:
    """Kind of rotation -> radians per token of each pair, of a rotary module that may be on the meta device; nothing for
    kinds whose tables change."""
    if module is None:
        return {}
    with torch.device("cpu"):
        made = type(module)(config=module.config)
    return {
        kind: tuple(_frequencies(made, kind).tolist())
        for kind, rope_type in rope_types(made).items()
        if rope_type not in CHANGING
    }
