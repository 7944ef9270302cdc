"""Which of the stored tokens a decode step reads, where it does not read them all."""

from __future__ import annotations

import math
from dataclasses import dataclass

BOUNDS_PAGE = 16
"""Tokens whose keys share bounds (Quest, arXiv 2406.10774)."""


MOST_BITS = 15
"""Of a signature."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Few queries (FEW_TOKENS) read of a context of L tokens at most min(L, max(least, ceil(share * L))): the first `sinks`,
    the `newest`, and what `rule` chooses (a file of runtimes/readers/), head by head. Every token is stored, and prompts read
    them all.

    `leading`: of every stored key the first so many numbers are read of all tokens. `page`: so many tokens share bounds of
    their keys, a lower and an upper one for every number. `tables`: signatures of every stored key, of `bits` bits each.
    """

    rule: str
    share: float
    least: int = 256
    sinks: int = 4
    newest: int = 32
    leading: int = 0
    page: int = 0
    bits: int = 0
    tables: int = 0

    def chosen(self, context_len: int) -> int:
        """Tokens that are read of `context_len` at most."""
        return min(context_len, max(self.least, math.ceil(self.share * context_len)))

    @property
    def signature_bytes(self) -> int:
        """Of one signature."""
        return 1 if self.bits <= 8 else 2

    def index_bytes_per_token(self, width: int, itemsize: int) -> float:
        """What is stored of a head of `width` numbers to choose by, shared out among the tokens of a page."""
        bounds = 2 * width * itemsize / self.page if self.page else 0.0
        return bounds + self.tables * self.signature_bytes

    def index_bytes(self, room: int, width: int, itemsize: int) -> int:
        """The same of a storage with room for so many tokens; signatures are of keys less a vector that is stored once."""
        bounds = 2 * width * itemsize * (room // self.page) if self.page else 0
        signatures = self.tables * self.signature_bytes * room + width * itemsize if self.tables else 0
        return bounds + signatures
