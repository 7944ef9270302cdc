"""The contract of a length method: which tokens stay, and in which form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.rounding import whole


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

    @property
    def drops(self) -> bool:
        """Whether some tokens are forgotten; how many is decided when all else is (`keep`)."""
        return False

    @property
    def after_reading(self) -> bool:
        """Whether tokens are dropped or chosen only when a prompt was read, so that a forward without a cache sees all."""
        return False

    @property
    def share_kept(self) -> float | None:
        """Of the tokens, in the mean over heads; None for what a budget leaves."""
        return None

    @property
    def weighs_heads(self) -> bool:
        """Whether it asks what forgetting costs each head."""
        return False

    @property
    def competes(self) -> bool:
        """Whether the heads of a layer share its tokens by what a scorer says of them; all layers then keep as many."""
        return False

    @property
    def foresees(self) -> bool:
        """Whether it asks what a token will be worth by the layer's input."""
        return False

    def sizes(self, context_len: int, sizes: Sequence[int]) -> list[int]:
        """Of a method that drops tokens: how many of `context_len` a head may keep, from few to all."""
        raise NotImplementedError("only where tokens are dropped")

    def spread(self, mean: float, layers: int, context_len: int) -> list[int]:
        """Of a method that asks for no costs: how many of `context_len` tokens the heads of each layer keep, in the mean
        `mean`."""
        return [min(whole(mean), context_len)] * layers

    def keep(self, spec: CacheSpec, tokens_C: Sequence[int], context_len: int) -> CacheSpec:
        """The same method's cache whose stored heads keep so many tokens of `context_len`."""
        raise NotImplementedError("only where tokens are dropped")

    @abstractmethod
    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        """`spec` with what concerns tokens set for this layer. finer: the form of its own of recent tokens."""


CONTRACT = LengthMethod
