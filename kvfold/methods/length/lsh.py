"""lsh: a step reads tokens whose signatures collide with the query's, weighed as they are likely to (arXiv 2410.16179)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvfold.errors import RecipeError
from kvfold.methods.length._reading import ReadsSome
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.reading import MOST_BITS, Reading


@dataclass(frozen=True, kw_only=True)
class Lsh(ReadsSome):
    """MagicPIG. Signatures are stored beside every key, and are larger than most keys; they are meant for caches that lie far
    from where they are read.

    hash_bits, tables: of signatures; fewer bits or more tables read more tokens.
    """

    share: float = 0.25
    hash_bits: int = 8
    tables: int = 75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.hash_bits <= MOST_BITS or self.tables < 2:
            raise RecipeError(
                f"length.hash_bits is {self.hash_bits} and length.tables {self.tables}; signatures have 1 to {MOST_BITS}"
                " bits, in two tables or more."
            )

    def _reading(self, spec: CacheSpec, **always: Any) -> Reading:
        return Reading(rule="lsh", bits=self.hash_bits, tables=self.tables, **always)
