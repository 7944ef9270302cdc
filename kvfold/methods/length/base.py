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
        """Of how many of the newest tokens the common form does not matter, since they are read in a finer one."""
        return 0

    @abstractmethod
    def apply(self, layer: AttentionLayer, spec: CacheSpec) -> CacheSpec:
        """`spec` with what concerns tokens set for this layer."""


CONTRACT = LengthMethod
