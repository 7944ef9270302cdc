"""pages: a step reads the pages of tokens whose keys could score most (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvfold.errors import RecipeError
from kvfold.methods.length._reading import ReadsSome
from kvfold.plan.cache_spec import CACHE_BLOCK, CacheSpec
from kvfold.plan.reading import BOUNDS_PAGE, Reading


@dataclass(frozen=True, kw_only=True)
class Pages(ReadsSome):
    """Two numbers of every stored number of a key are stored for each page, and read in every step.

    page: tokens.
    """

    page: int = BOUNDS_PAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1 or CACHE_BLOCK % self.page:
            raise RecipeError(f"length.page is {self.page}; pages divide {CACHE_BLOCK} tokens.")

    def _reading(self, spec: CacheSpec, **always: Any) -> Reading:
        return Reading(rule="pages", page=self.page, **always)
