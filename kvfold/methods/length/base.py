"""The contract of a length method: which tokens stay, and in which form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class LengthMethod(ABC):
    """A choice of which tokens stay, and in which form. Its dataclass fields are its hyper-parameters, by name in recipes."""

    @property
    def recent(self) -> int:
        """How many of the newest tokens are read in a finer form."""
        return 0

    def recent_of(self, layer: AttentionLayer) -> int:
        """The same in one layer; 0 where a sliding window reaches no further."""
        return 0 if layer.window is not None and layer.window <= self.recent else self.recent

    @abstractmethod
    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        """`spec` with what concerns tokens set for this layer. finer: the form of its own of recent tokens."""


CONTRACT = LengthMethod
