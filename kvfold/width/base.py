"""The contract of a width method: which shapes it can store, what they cost in quality, and the folded weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from kvfold.attention import AttentionLayer, AttentionWeights, FoldedWeights
from kvfold.linalg import Moment
from kvfold.plan import CacheSpec


class StoredShape(NamedTuple):
    """One side (keys or values) of one cache: heads, and numbers per head."""

    num_heads: int
    width: int

    @property
    def numbers(self) -> int:
        return self.num_heads * self.width


@dataclass(frozen=True, kw_only=True)
class WidthMethod(ABC):
    """A way to store fewer numbers per token. Its dataclass fields are its hyper-parameters, by name in recipes.

    `needs`: the statistics it reads, out of `calibrate.STATISTICS`; empty where weights are enough.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def key_shapes(self, layer: AttentionLayer) -> Sequence[StoredShape]:
        """The shapes in which this method can store the layer's keys, from few to many numbers; the last loses nothing."""

    @abstractmethod
    def value_shapes(self, layer: AttentionLayer) -> Sequence[StoredShape]:
        """The same for values."""

    @abstractmethod
    def key_damage(
        self,
        layer: AttentionLayer,
        weights: AttentionWeights,
        moments: Mapping[str, Moment],
        shapes: Sequence[StoredShape],
    ) -> list[float]:
        """Expected damage of storing the keys in each of `shapes`: 0 for none, 1 for losing everything."""

    @abstractmethod
    def value_damage(
        self,
        layer: AttentionLayer,
        weights: AttentionWeights,
        moments: Mapping[str, Moment],
        shapes: Sequence[StoredShape],
    ) -> list[float]:
        """The same for values."""

    @abstractmethod
    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        """The cache of this layer with the chosen shapes."""

    @abstractmethod
    def fold(
        self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment], spec: CacheSpec
    ) -> FoldedWeights:
        """The weights that obey `spec`. `weights` are float64; so is the result."""


CONTRACT = WidthMethod
