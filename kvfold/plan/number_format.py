"""How the numbers of one side of a cache are stored: bits, tiers, scales, and the bytes that this takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from kvfold.errors import PlanError

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
SCALES = ("exponent", "affine", "channel", "float8", "normal")
AFFINE_BYTES = 4
"""A scale and a smallest number, float16 each."""
SCALE_BYTES = {"exponent": 1, "affine": AFFINE_BYTES, "normal": 2}
NORMAL_BITS = (1, 2, 3, 4, 5, 6)
"""Of numbers with the levels that suit normal ones; beyond, equal steps are nearly as good."""

NUMBERS_AT_ONCE = {"cpu": 2**21}
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

    `tiers`: (numbers, bits) of each stored head, from its first number on. `scales` says what turns codes into numbers:
    `exponent`: code c of b bits means (c + 1/2 - 2^(b-1)) 2^((e-128)/8); one byte e per token, head and tier.
    `affine`: low + c * scale, both float16, per token, head and `group_size` numbers of a tier (0: the whole tier).
    `channel`: the same per number of a head over `block` tokens; tokens of a block that is not full stay in the checkpoint's
    dtype (KIVI, arXiv 2402.02750). `float8`: no scale, float8 e4m3 numbers, as servers store them.
    `normal`: level c of the Lloyd-Max quantizer of b bits for normal numbers, times a float16 scale per token, head and tier.
    `norm_correction`: this scale keeps the norm of a token's numbers, not their root mean square before rounding.
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
        if self.scales not in SCALES:
            raise PlanError(f"scales = {self.scales!r} is not one of {SCALES}.")
        if self.scales == "float8" and self.tiers != ((self.width, 8),):
            raise PlanError(f"float8 numbers take 8 bits each; tiers are {self.tiers}.")
        if self.scales == "normal" and not {bits for _, bits in self.tiers} <= set(NORMAL_BITS):
            raise PlanError(f"normal numbers take {NORMAL_BITS[0]} to {NORMAL_BITS[-1]} bits; tiers are {self.tiers}.")
        if self.norm_correction and self.scales != "normal":
            raise PlanError(f"norm_correction goes with normal numbers; scales are {self.scales!r}.")
        if (
            self.block < 1
            or (self.scales == "channel") != (self.block > 1)
            or (self.scales == "channel" and len(self.tiers) > 1)
        ):
            raise PlanError(f"scales per channel go with a block of tokens and one tier; found {self}.")
        if self.group_size and (
            self.scales != "affine" or self.group_size < 0 or any(n % self.group_size for n, _ in self.tiers)
        ):
            raise PlanError(
                f"group_size {self.group_size} goes with affine scales and divides every tier; found {self}."
            )

    @property
    def width(self) -> int:
        """Numbers of one stored head."""
        return sum(numbers for numbers, _ in self.tiers)

    @property
    def scales_per_token(self) -> int:
        """Scales of one token and head: one per tier, or per group of numbers."""
        groups = (numbers // (self.group_size or numbers) for numbers, _ in self.tiers)
        return {"exponent": len(self.tiers), "normal": len(self.tiers), "affine": sum(groups)}.get(self.scales, 0)

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's codes in one head; every plane of bits fills whole bytes."""
        return sum(packed_bytes(numbers, bits) for numbers, bits in self.tiers)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one head, scales that are its own included."""
        return self.code_bytes + self.scales_per_token * SCALE_BYTES.get(self.scales, 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of `block` tokens in one head, the scales that they share included."""
        return self.block * self.row_bytes + (AFFINE_BYTES * self.width if self.scales == "channel" else 0)

    @property
    def bytes_per_token(self) -> float:
        """Of one head; what a block shares is shared out."""
        return self.block_bytes / self.block

    def bytes_allocated(self, tokens: int, itemsize: int) -> int:
        """Of one head with room for `tokens` tokens (whole blocks), and for those of a block that is not full."""
        recent = self.block * self.width * itemsize if self.scales == "channel" else 0
        return tokens // self.block * self.block_bytes + recent


def _is_tier(*tier: Any) -> bool:
    return len(tier) == 2 and all(type(part) is int for part in tier) and tier[0] > 0 and tier[1] in BITS


class StoredShape(NamedTuple):
    """One side (keys or values) of one cache: heads, numbers per head, and how a number is stored (None: as it is)."""

    num_heads: int
    width: int
    form: NumberFormat | None = None

    @property
    def numbers(self) -> int:
        return self.num_heads * self.width

    def bytes_per_token(self, itemsize: int) -> float:
        """Scales included; what several tokens share is shared out."""
        return self.num_heads * (self.width * itemsize if self.form is None else self.form.bytes_per_token)

    def bytes_allocated(self, tokens: int, itemsize: int) -> int:
        """Of a storage with room for `tokens` tokens, which are whole blocks."""
        if self.form is None:
            return self.numbers * tokens * itemsize
        return self.num_heads * self.form.bytes_allocated(tokens, itemsize)


def planes(bits: int) -> list[int]:
    """How a code is cut so that its parts fill bytes: 3 bits are 2 and 1, 6 are 4 and 2."""
    return [part for part in (8, 4, 2, 1) if bits & part]


def packed_bytes(numbers: int, bits: int) -> int:
    """Bytes of `numbers` codes of `bits` bits."""
    return sum(-(-numbers * part // 8) for part in planes(bits))


def tokens_at_once(numbers_per_token: int, device: str) -> int:
    """Tokens of a whole batch that a decode step takes at a time."""
    return max(NUMBERS_AT_ONCE.get(device, ELSEWHERE) // numbers_per_token, FEWEST_TOKENS)
