"""The contract of a length method: which tokens stay, and in which form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class LengthMethod(ABC):
    """A choice of which tokens stay, and in which form. Its dataclass fields are its hyper-parameters, by name in recipes."""

    @abstractmethod
    def apply(self, layer: AttentionLayer, spec: CacheSpec) -> CacheSpec:
        """`spec` with what concerns tokens set for this layer."""


CONTRACT = LengthMethod
