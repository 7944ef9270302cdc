"""How keys and values are made of stored numbers, as the CPU's kernels take it (cpp/rebuild.h)."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.turning import TILES, TurningFunctions, turning_functions, turns_slowly

TOLERANCE = {torch.bfloat16: 1e-3, torch.float32: 1e-6}
OF_PACKED, TURNED_BITS, FURTHEST = 2.0**-4, (0, 4, 8), 2.0
"""By how much cosines and sines of queries that are turned may be off, of numbers as they are and of those of no bits
(`tolerance_of`); from how many bits on numbers behind the first tier meet the first function of a turned query, the second,
and all others (`met_by`), for tokens among which keys turn by so many radians at most."""
DEPTH = 32
"""Of how many stored numbers a map takes a multiple (tiles.h)."""


def tolerance_of(dtype: torch.dtype, format: NumberFormat | None = None) -> float:
    """By how much cosines and sines of queries that are turned may be off: as numbers of such queries are; where they meet
    packed numbers, an eighth of what these are off by on average."""
    own = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    return own if format is None else max(own, OF_PACKED / 2**format.mean_bits)


def met_by(function: int, format: NumberFormat | None) -> int:
    """How many of the numbers, the first ones, a function of a turned query meets: of those that are stored in few bits it
    says less than they are off by. (Each says some 2^-4 of what the one before says, on average over slow pairs.)
    Nothing of numbers as they are, which are not counted."""
    if format is None:
        return 0
    least = TURNED_BITS[min(function, len(TURNED_BITS) - 1)]
    tiers = itertools.takewhile(lambda tier: not tier[0] or tier[1][1] >= least, enumerate(format.tiers))
    return sum(numbers for _, (numbers, _) in tiers)


def tiles_for(speed: float | None, tokens: int | None) -> Sequence[int]:
    """For how many tokens queries may be turned at a time: among which keys that turn so fast turn by FURTHEST at most, if a
    speed is given, and no more than there are."""
    most = TILES[-1] if speed is None else int(FURTHEST / speed)
    most = most if tokens is None else min(most, tokens + -tokens % TILES.step)
    return TILES[: max((most - TILES.start) // TILES.step + 1, 1)]


class HeadMap(NamedTuple):
    """How keys or values of the source's heads are rebuilt: packed, a linear map of each stored head [C, F, R] as `pack_map`
    has it; offset_CF in float32, or none; heads: that F consists of."""

    packed: Tensor
    offset_CF: Tensor | None
    heads: int
    head_dim: int
    turn: Turn | None = None

    @classmethod
    def of(
        cls,
        weight_CFR: Tensor,
        bias_CF: Tensor | None,
        head_dim: int,
        speeds: tuple[float, ...] = (),
        *,
        format: NumberFormat | None = None,
        tokens: int | None = None,
    ) -> HeadMap:
        """speeds: of keys that turn slowly, in radians per token, for each pair. format: of the numbers that they are made
        of, the first ones, if these are packed. tokens: how many of these there are at most, if that is known."""
        offset = None if bias_CF is None else bias_CF.detach().float().contiguous()
        weight = weight_CFR.detach()
        turn = Turn.of(weight, head_dim, speeds, format, tokens) if turns_slowly(speeds) else None
        return cls(pack_map(weight), offset, weight_CFR.shape[1] // head_dim, head_dim, turn)

    def rebuild(self, cos: Tensor | None = None, sin: Tensor | None = None, *, evenly: bool = False) -> Rebuild:
        """With tables [B or 1, S, r] of the tokens, where keys are rotated. evenly: their positions follow each other, from
        the first token on that counts."""
        if cos is None or sin is None:
            return Rebuild(self, None, None)
        of_cos, of_sin = (table if table[0].is_contiguous() else table.contiguous() for table in (cos, sin))
        return Rebuild(self, of_cos, of_sin, evenly)


class Turn(NamedTuple):
    """How queries are turned instead of keys: a map in float32, as turn.h takes it, and functions of a token's place among
    neighbours with what each says of every pair. coarse [m], int32: how many of the first `fine` numbers each meets."""

    weights: Tensor
    functions: TurningFunctions
    coarse: Tensor
    fine: int

    @classmethod
    def of(
        cls,
        weight_CFR: Tensor,
        head_dim: int,
        speeds: tuple[float, ...],
        format: NumberFormat | None,
        tokens: int | None,
    ) -> Turn:
        R, step = weight_CFR.shape[2], 2 * _layout()[0]
        padded_CFR = torch.nn.functional.pad(weight_CFR.float(), (0, -R % DEPTH))
        parted = padded_CFR.unflatten(1, (-1, head_dim)).unflatten(3, (-1, step))
        own = 0 if format is None else format.width
        told = tuple((math.ceil(met_by(k, format) / step) * step + R - own) / R for k in range(len(TURNED_BITS)))
        tolerance = tolerance_of(weight_CFR.dtype, format)
        tiles = tiles_for(None if format is None else max(speeds), tokens)
        functions = turning_functions(speeds, tolerance, tiles, told, format is not None)
        coarse = torch.tensor([met_by(k, format) for k in range(len(functions.basis))], dtype=torch.int32)
        return cls(parted.transpose(2, 3).contiguous(), functions, coarse, own)

    def described(self) -> _Turn:
        """For the kernel, as long as this lives."""
        pointers = (x.data_ptr() for x in (self.weights, *self.functions, self.coarse))
        return _Turn(*pointers, *self.functions.basis.shape, self.fine)


class Rebuild(NamedTuple):
    """A map and the tables of the tokens that it is for."""

    map: HeadMap
    cos: Tensor | None
    sin: Tensor | None
    evenly: bool = False

    def of_tokens(self, start: int, end: int) -> Rebuild:
        """Of some of the tokens."""
        if self.cos is None or self.sin is None:
            return self
        return self._replace(cos=self.cos[:, start:end], sin=self.sin[:, start:end])

    def described(self) -> _Rebuild:
        """For the kernel, as long as this lives."""
        (packed, offset, heads, head_dim, turn), cos, sin, evenly = self.map, self.cos, self.sin, self.evenly
        map = (packed.data_ptr(), None if offset is None else offset.data_ptr())
        map_bytes = packed[0].numel() * packed.element_size()
        if cos is None or sin is None:
            return _Rebuild(*map, None, None, map_bytes, 0, False, heads, head_dim, 0, None)
        table_batch = cos.stride(0) if len(cos) > 1 else 0
        tables = (cos.data_ptr(), sin.data_ptr(), map_bytes, table_batch, cos.dtype == torch.bfloat16)
        turned = ctypes.pointer(turn.described()) if turn is not None and evenly else None
        return _Rebuild(*map, *tables, heads, head_dim, cos.shape[2], turned)

    def turn_by(self, way: Any) -> None:
        """These tables instead of those that were described."""
        if self.cos is not None and self.sin is not None:
            way.cos, way.sin = self.cos.data_ptr(), self.sin.data_ptr()
            way.table_batch = self.cos.stride(0) if len(self.cos) > 1 else 0


class _Turn(ctypes.Structure):
    """As rebuild.h declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "basis", "shares", "speeds", "reach", "coarse")),
        *((name, ctypes.c_int64) for name in ("functions", "tokens", "fine")),
    )


class _Rebuild(ctypes.Structure):
    """As rebuild.h declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("map", "offset", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("map_bytes", "table_batch", "tables_are_bfloat16")),
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "rotated")),
        ("turn", ctypes.POINTER(_Turn)),
    )


class ValueMap(NamedTuple):
    """How values of the source's heads are made of stored ones: packed, a map of each head of keys and values [K, H, V], and
    its widths."""

    packed: Tensor
    kv_heads: int
    head_dim: int

    @property
    def map_bytes(self) -> int:
        """Of each head."""
        return self.packed.numel() * self.packed.element_size() // self.kv_heads

    @classmethod
    def of(cls, weight_UFV: Tensor, head_dim: int) -> ValueMap:
        weight_KHV = weight_UFV.detach().reshape(-1, head_dim, weight_UFV.shape[2])
        return cls(pack_map(weight_KHV), len(weight_KHV), head_dim)


def pack_map(weight_CFR: Tensor) -> Tensor:
    """[C, F / L, R, L] of a map, with R and F padded by zeros, where vectors of the processor have L numbers. In bfloat16, if
    it multiplies those, two numbers of a column lie side by side: [C, F / L, R / 2, L, 2]."""
    (C, F, R), (lanes, bytes) = weight_CFR.shape, _layout()
    pair = 2 if weight_CFR.dtype == torch.bfloat16 and bytes == 2 else 1
    exact = weight_CFR.dtype if pair == 2 else torch.float32
    padded = weight_CFR.new_zeros(C, -(-F // (2 * lanes)) * 2 * lanes, -(-R // DEPTH) * DEPTH, dtype=exact)
    padded[:, :F, :R] = weight_CFR
    return padded.view(C, -1, lanes, padded.shape[2] // pair, pair).transpose(2, 3).contiguous()


@functools.cache
def _layout() -> tuple[int, int]:
    """(columns of a map that lie side by side, bytes of its numbers where heads are bfloat16)"""
    kernel, lanes, size = library(), ctypes.c_int32(), ctypes.c_int32()
    assert kernel is not None, "serves() was asked"
    kernel.kvfold_layout(ctypes.byref(lanes), ctypes.byref(size))
    return lanes.value, size.value
