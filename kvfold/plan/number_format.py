"""How the numbers of one side of a cache are stored: bits, tiers, scales, and the bytes that this takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvfold import registry
from kvfold.errors import PlanError
from kvfold.plan.codecs._codes import BITS, packed_bytes
from kvfold.plan.codecs.base import Codec, codec

ELEMENTS_AT_ONCE = {"cpu": 2**21}
"""Numbers of one side that a decode step unpacks or rebuilds at a time, by device: on a CPU they stay in its cache, and
storage for them is reused from piece to piece."""
ELSEWHERE = 2**26
"""On other devices, where every piece costs a dozen launches."""
FEWEST_TOKENS = 32
"""Tokens that it takes at a time however many numbers they have."""

LEAST_VARIANCE = 1e-4
"""Of the largest: numbers that vary less are divided, before they are turned, as if they varied so much. Larger ratios would
be lost where weights are stored in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Bits of every stored number of one side (keys or values) of one cache; part of the plan.

    `tiers`: (numbers, bits) of each stored head, from its first number on. `scales`: what turns codes into numbers, a file of
    plan/codecs/. `group_size`: of `affine` scales, numbers of a tier that share one (0: the whole tier). `block`: of
    `channel` scales, tokens that share them. `norm_correction`: of `normal` ones, how the scale is chosen.
    Raises PlanError where these contradict each other.
    """

    tiers: tuple[tuple[int, int], ...]
    scales: str = "exponent"
    group_size: int = 0
    block: int = 1
    norm_correction: bool = False

    def __post_init__(self) -> None:
        tiers = self.tiers if isinstance(self.tiers, list | tuple) else ()
        if not tiers or not all(isinstance(tier, list | tuple) and _is_tier(*tier) for tier in tiers):
            raise PlanError(f"tiers {self.tiers} are not (numbers, bits) with bits of {BITS}.")
        object.__setattr__(self, "tiers", tuple(map(tuple, tiers)))  # JSON has lists
        if self.scales not in registry.names("codecs"):
            raise PlanError(registry.unknown("scheme of scales", self.scales, registry.names("codecs")))
        if wrong := sorted({bits for _, bits in self.tiers} - {*self.codec.bits}):
            first, last = self.codec.bits[0], self.codec.bits[-1]
            bits = f"{last} bits each" if first == last else f"bits {first} to {last}"
            raise PlanError(f"{self.scales} numbers take {bits}, not {wrong}; tiers are {self.tiers}.")
        if self.block < 1 or self.codec.block_scales != (self.block > 1):
            raise PlanError(f"a block of tokens goes with scales per channel; found {self}.")
        if self.group_size and self.scales != "affine":
            raise PlanError(f"group_size {self.group_size} goes with affine scales; found {self}.")
        if self.norm_correction and self.scales != "normal":
            raise PlanError(f"norm_correction goes with normal numbers; scales are {self.scales!r}.")
        if obstacle := self.codec.obstacle(self):
            raise PlanError(f"{obstacle}; found {self}.")

    @property
    def codec(self) -> Codec:
        """What the scheme of its scales means."""
        return codec(self.scales)

    @functools.cached_property
    def width(self) -> int:
        """Numbers of one stored head."""
        return sum(elements for elements, _ in self.tiers)

    @functools.cached_property
    def mean_bits(self) -> float:
        """Of one number's code."""
        return sum(elements * bits for elements, bits in self.tiers) / self.width

    @functools.cached_property
    def code_bytes(self) -> int:
        """Bytes of one token's codes in one head; every plane of bits fills whole bytes."""
        return sum(packed_bytes(elements, bits) for elements, bits in self.tiers)

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one token in one head, scales that are its own included."""
        return self.code_bytes + self.codec.scale_bytes(self)

    def bytes_of_first(self, width: int) -> int:
        """Of the first `width` numbers of one token in one head, with all its scales."""
        codes, left = 0, width
        for numbers, bits in self.tiers:
            codes, left = codes + packed_bytes(min(numbers, left), bits), max(left - numbers, 0)
        return codes + self.codec.scale_bytes(self)

    @property
    def block_bytes(self) -> int:
        """Bytes of `block` tokens in one head, the scales that they share included."""
        return self.block * self.row_bytes + self.codec.shared_bytes(self)

    @property
    def bytes_per_token(self) -> float:
        """Of one head; what a block shares is shared out."""
        return self.block_bytes / self.block

    def bytes_allocated(self, tokens: int, itemsize: int) -> int:
        """Of one head with room for `tokens` tokens (whole blocks), and for those of a block that is not full."""
        recent = self.block * self.width * itemsize if self.codec.block_scales else 0
        return tokens // self.block * self.block_bytes + recent


def _is_tier(*tier: Any) -> bool:
    return len(tier) == 2 and all(type(part) is int for part in tier) and tier[0] > 0 and tier[1] in BITS


class StoredShape(NamedTuple):
    """One side (keys or values) of one cache: heads, numbers per head, and how a number is stored (None: as it is)."""

    num_heads: int
    width: int
    format: NumberFormat | None = None

    @property
    def elements(self) -> int:
        return self.num_heads * self.width

    def bytes_per_token(self, itemsize: int) -> float:
        """Scales included; what several tokens share is shared out."""
        return self.num_heads * (self.width * itemsize if self.format is None else self.format.bytes_per_token)

    def bytes_allocated(self, tokens: int, itemsize: int) -> int:
        """Of a storage with room for `tokens` tokens, which are whole blocks."""
        if self.format is None:
            return self.elements * tokens * itemsize
        return self.num_heads * self.format.bytes_allocated(tokens, itemsize)


def tokens_at_once(elements_per_token: int, device: str) -> int:
    """Tokens of a whole batch that a decode step takes at a time."""
    return max(ELEMENTS_AT_ONCE.get(device, ELSEWHERE) // elements_per_token, FEWEST_TOKENS)
