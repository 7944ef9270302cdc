"""Where the tiers of packed numbers lie in a row, in tiles of as many numbers as a GPU's kernels take at a time.

Tables, not constants of the kernels: layers whose tiers differ share what is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from kvfold.plan.codecs._codes import packed_bytes
from kvfold.plan.number_format import NumberFormat

NUMBERS = 64
TIER_FIELDS, TILE_FIELDS = 6, 7


@functools.lru_cache(maxsize=4096)
def tiers_in_tiles(format: NumberFormat, width: int, column: int, device: torch.device) -> tuple[int, Tensor]:
    """The sum of the kinds of planes that there are, and of each tier that has some of the first `width` numbers: where its
    codes begin in a row (bytes), the place of its first tile among all, how many tiles are wanted, its numbers, place and
    bits. column: tiles before."""
    found: list[tuple[int, ...]] = []
    kinds = 0
    for (at, _, stored, tier, bits), wanted in _within(format, width):
        kinds |= bits
        found.append((at, column, -(-wanted // NUMBERS), stored, tier, bits))
        column += found[-1][2]
    return kinds, _table(found, device)


@functools.lru_cache(maxsize=4096)
def tiles_of(format: NumberFormat, width: int, device: torch.device) -> tuple[int, Tensor]:
    """The sum of the kinds of planes that there are, and of each tile: where the codes of its tier begin in a row, its first
    number in a head, the numbers of its tier, the tier's place and bits, its first number there, how many are wanted."""
    found: list[tuple[int, ...]] = []
    kinds = 0
    for (at, first, stored, tier, bits), wanted in _within(format, width):
        kinds |= bits
        for before in range(0, wanted, NUMBERS):
            found.append((at, first + before, stored, tier, bits, before, min(NUMBERS, wanted - before)))
    return kinds, _table(found, device)


@functools.lru_cache(maxsize=1024)
def order_of(parts: tuple[tuple[NumberFormat, int], ...], device: torch.device) -> Tensor:
    """The number at each place of tiles, -1 where there is none, over all formats that numbers side by side have."""
    found, before = [], 0
    for format, width in parts:
        for (_, first, _, _, _), wanted in _within(format, width):
            room = -(-wanted // NUMBERS) * NUMBERS
            found += [before + first + i if i < wanted else -1 for i in range(room)]
        before += width
    return torch.tensor(found, dtype=torch.int32, device=device)


def count_of(format: NumberFormat, width: int) -> int:
    """Tiles of the first `width` numbers of a head."""
    return sum(-(-wanted // NUMBERS) for _, wanted in _within(format, width))


@functools.lru_cache(maxsize=4096)
def tiers_of(format: NumberFormat, device: torch.device) -> Tensor:
    """Whole tiers: as tiles are, of all their numbers."""
    return _table([(*place, 0, place[2]) for place in _places(format)], device)


def _places(format: NumberFormat) -> Iterator[tuple[int, int, int, int, int]]:
    """Of every tier: the first byte of its codes, its first number and how many, its place, and bits."""
    byte, first = format.row_bytes - format.code_bytes, 0
    for tier, (numbers, bits) in enumerate(format.tiers):
        yield byte, first, numbers, tier, bits
        byte, first = byte + packed_bytes(numbers, bits), first + numbers


def _within(format: NumberFormat, width: int) -> Iterator[tuple[tuple[int, int, int, int, int], int]]:
    """Tiers that have some of the first `width` numbers, and how many."""
    for place in _places(format):
        if place[1] < width:
            yield place, min(place[2], width - place[1])


def _table(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)
