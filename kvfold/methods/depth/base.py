"""The contract of a depth method: which layers own a cache, and which read whose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfold.plan.layer import AttentionLayer

Targets = tuple[int | None, ...]
"""Per layer: None where it owns a cache, else the EARLIER layer whose cache it reads."""

Sample = Callable[[int], Mapping[str, Tensor]]
"""Layer index -> {"keys", "values"} of the same tokens in every layer, [tokens, K*H]."""


@dataclass(frozen=True, kw_only=True)
class DepthMethod(ABC):
    """A way to share caches between layers. Its dataclass fields are its hyper-parameters, by name in recipes.

    `needs_sample`: it looks at keys and values of calibration text before it decides.
    """

    needs_sample: ClassVar[bool] = False

    @abstractmethod
    def layouts(self, layers: Sequence[AttentionLayer], sample: Sample | None) -> list[Targets]:
        """The layouts to choose from, preferred ones first; `allocate` takes the first that uses most of the budget."""


CONTRACT = DepthMethod


def by_window(layers: Sequence[AttentionLayer]) -> list[list[int]]:
    """Layers that could share a cache with each other: those with the same sliding window."""
    kinds: dict[int | None, list[int]] = {}
    for layer in layers:
        kinds.setdefault(layer.window, []).append(layer.index)
    return list(kinds.values())


def targets_of(owner_of: Mapping[int, int]) -> Targets:
    """Layer -> the owner whose cache it uses, as targets."""
    return tuple(None if owner_of[layer] == layer else owner_of[layer] for layer in sorted(owner_of))
