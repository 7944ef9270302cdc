"""sampled: a step draws the tokens that it reads by what the first numbers of their keys foretell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvfold.methods.length._reading import ReadsSome, leading_of
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.reading import Reading


@dataclass(frozen=True, kw_only=True)
class Sampled(ReadsSome):
    """Importance sampling: what is drawn weighs as it was likely to be, so that sums over it are unbiased.

    leading: of every key so many numbers foretell attention.
    """

    leading: int = 16

    def _reading(self, spec: CacheSpec, **always: Any) -> Reading:
        return Reading(rule="sampled", leading=leading_of(spec, self.leading), **always)
