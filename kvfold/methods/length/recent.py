"""recent: every token stays, and the newest are read in a finer form than all others."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.length._recent_form import with_recent
from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Recent(LengthMethod):
    """Most of what a prediction needs stands a few tokens back: these are kept twice, as all others and finely.

    Where leading numbers get more bits than later ones, the finer form is one of its own, made for queries that stand close
    by, and bytes are shared out between both by what they save. Elsewhere it is the same numbers before quantization; where
    nothing is quantized there is none.

    tokens: how many.
    """

    tokens: int = 64

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise RecipeError(f"length.tokens must be at least 1; found {self.tokens}.")

    @property
    def recent(self) -> int:
        return self.tokens

    def apply(self, layer: AttentionLayer, spec: CacheSpec, finer: CacheSpec | None = None) -> CacheSpec:
        return with_recent(layer, spec, finer, self.tokens) if self.recent_of(layer) else spec
