"""lead: a step reads the first numbers of all keys, and the rest of those tokens that these choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvfold.methods.length._reading import ReadsSome, leading_of
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.reading import Reading


@dataclass(frozen=True, kw_only=True)
class Lead(ReadsSome):
    """Low-rank keys are ordered: their first numbers say most of a score (after Loki, arXiv 2406.02542), and are stored.

    leading: how many.
    """

    leading: int = 16

    def _reading(self, spec: CacheSpec, **always: Any) -> Reading:
        return Reading(rule="lead", leading=leading_of(spec, self.leading), **always)
