"""The contract of a depth method: which layers own a cache, and which read whose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.attention import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class DepthMethod(ABC):
    """A way to share caches between layers. Its dataclass fields are its hyper-parameters, by name in recipes."""

    @abstractmethod
    def targets(self, layers: Sequence[AttentionLayer]) -> tuple[int | None, ...]:
        """Per layer: None where it owns a cache, else the EARLIER layer whose cache it reads."""


CONTRACT = DepthMethod
