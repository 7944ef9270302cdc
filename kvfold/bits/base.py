"""The contract of a bits method: how many bits a stored number takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvfold.attention import AttentionLayer
from kvfold.plan import CacheSpec


@dataclass(frozen=True, kw_only=True)
class BitsMethod(ABC):
    """A choice of `k_bits` and `v_bits`. Its dataclass fields are its hyper-parameters, by name in recipes."""

    @abstractmethod
    def apply(self, layer: AttentionLayer, spec: CacheSpec) -> CacheSpec:
        """`spec` with `k_bits` and `v_bits` set for this layer."""


CONTRACT = BitsMethod
