"""Methods by which every token is stored, and a decode step reads some."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.reading import Reading


@dataclass(frozen=True, kw_only=True)
class ReadsSome(LengthMethod):
    """How many. Layers with a sliding window read all of it.

    share: of the context, at most. least: tokens, however short it is. sinks, newest: tokens that are always read.
    """

    share: float = 0.125
    least: int = 256
    sinks: int = 4
    newest: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"length.share is {self.share}; it is a share of the tokens, above 0 and at most 1.")
        if self.sinks < 0 or self.newest < 1 or self.least < self.sinks + self.newest:
            raise RecipeError(
                f"length.least is {self.least}, length.sinks {self.sinks} and length.newest {self.newest}; what is always"
                " read is part of the least, and one of it is new."
            )

    @property
    def after_reading(self) -> bool:
        return True

    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        if layer.window is not None:
            return spec
        always = {"share": self.share, "least": self.least, "sinks": self.sinks, "newest": self.newest}
        return dataclasses.replace(spec, reading=self._reading(spec, **always))

    @abstractmethod
    def _reading(self, spec: CacheSpec, **always: float) -> Reading:
        """As the plan has it."""


def leading_of(spec: CacheSpec, leading: int) -> int:
    """So many numbers of a stored key, or all that it has."""
    if leading < 1:
        raise RecipeError(f"length.leading is {leading}; at least one number of every key is read.")
    return min(leading, spec.head_dim)
