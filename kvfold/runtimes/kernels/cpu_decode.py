"""Attention of few query tokens by the CPU's own kernel (cpp/decode.cpp): over stored keys, or over keys that it rebuilds.

A contiguous cache is one page per sequence, so that caches of both runtimes are read by the same code.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.runtimes.kernels.cpu import DTYPES, StoredTokens, rows_of
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored, parts_of, recorded
from kvfold.runtimes.kernels.turning import TurningFunctions, turning_functions, turns_slowly

TOLERANCE = {torch.bfloat16: 1e-3, torch.float32: 1e-6}
"""By how much cosines and sines of queries that are turned may be off, as numbers of these types are."""
DEPTH = 32
"""Of how many stored numbers a map takes a multiple (tiles.h)."""
ALL_OLDER = 1 << 62
"""An age that no token has."""
ANY_AGE = (-ALL_OLDER, ALL_OLDER)


class HeadMap(NamedTuple):
    """How keys or values of the source's heads are rebuilt: packed, a linear map of each stored head [C, F, R] as `pack_map`
    has it; offset_CF in float32, or none; heads: that F consists of."""

    packed: Tensor
    offset_CF: Tensor | None
    heads: int
    head_dim: int
    turn: Turn | None = None

    @classmethod
    def of(cls, weight_CFR: Tensor, bias_CF: Tensor | None, head_dim: int, speeds: tuple[float, ...] = ()) -> HeadMap:
        """speeds: of keys that turn slowly, in radians per token, for each pair."""
        offset = None if bias_CF is None else bias_CF.detach().float().contiguous()
        turn = Turn.of(weight_CFR.detach(), head_dim, speeds) if turns_slowly(speeds) else None
        return cls(pack_map(weight_CFR.detach()), offset, weight_CFR.shape[1] // head_dim, head_dim, turn)

    def rebuild(self, cos: Tensor | None = None, sin: Tensor | None = None, *, evenly: bool = False) -> Rebuild:
        """With tables [B or 1, S, r] of the tokens, where keys are rotated. evenly: their positions follow each other, from
        the first token on that counts."""
        if cos is None or sin is None:
            return Rebuild(self, None, None)
        of_cos, of_sin = (table if table[0].is_contiguous() else table.contiguous() for table in (cos, sin))
        return Rebuild(self, of_cos, of_sin, evenly)


class Turn(NamedTuple):
    """How queries are turned instead of keys: a map in float32, as turn.h takes it, and functions of a token's place among
    neighbours with what each says of every pair."""

    weights: Tensor
    functions: TurningFunctions

    @classmethod
    def of(cls, weight_CFR: Tensor, head_dim: int, speeds: tuple[float, ...]) -> Turn:
        tolerance = TOLERANCE[weight_CFR.dtype]
        padded_CFR = torch.nn.functional.pad(weight_CFR.float(), (0, -weight_CFR.shape[2] % DEPTH))
        parted = padded_CFR.unflatten(1, (-1, head_dim)).unflatten(3, (-1, 2 * _layout()[0]))
        return cls(parted.transpose(2, 3).contiguous(), turning_functions(speeds, tolerance))

    def described(self) -> _Turn:
        """For the kernel, as long as this lives."""
        basis, shares, speeds = self.functions
        pointers = (x.data_ptr() for x in (self.weights, basis, shares, speeds))
        return _Turn(*pointers, *basis.shape)


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


class _Turn(ctypes.Structure):
    """As rebuild.h declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "basis", "shares", "speeds")),
        *((name, ctypes.c_int64) for name in ("functions", "tokens")),
    )


class _Rebuild(ctypes.Structure):
    """As rebuild.h declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("map", "offset", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("map_bytes", "table_batch", "tables_are_bfloat16")),
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "rotated")),
        ("turn", ctypes.POINTER(_Turn)),
    )


class Queries(ctypes.Structure):
    """As parts.h declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "bias", "sequences")),
        *((name, ctypes.c_int64) for name in ("bias_batch", "bias_row", "batch", "rows", "steps")),
        *((name, ctypes.c_int64) for name in ("youngest", "oldest", "threads")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _Part(ctypes.Structure):
    """As parts.h declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("averages", "log_sums")),
        *((name, ctypes.c_int64) for name in ("width", "column")),
    )


class Values(ctypes.Structure):
    """As parts.h declares it."""

    _fields_ = (
        ("map", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("map_bytes", "depth", "out_width", "batch", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("steps", "threads")),
    )

    @classmethod
    def of(cls, map: ValueMap | None, width: int, *, batch: int, heads: int, steps: int) -> Values:
        """width: of what the map takes, or, without one, of the output."""
        sizes = batch, heads, 1 if map is None else map.kv_heads, steps, torch.get_num_threads()
        if map is None:
            return cls(None, 0, width, width, *sizes)
        return cls(map.packed.data_ptr(), map.map_bytes, width, map.head_dim, *sizes)


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


class Averages(NamedTuple):
    """Over a part of the tokens [B, N, T, V], and the logarithms of the sums [B, N, T] that say what the part counts beside
    others; both float32. last: they are the last numbers of a token where others are the first."""

    averages: Tensor
    log_sums: Tensor
    last: bool = False


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


def serves(q: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether the kernel takes these tensors, and nobody wants gradients or a graph of it."""
    parts = [*parts_of(keys), *parts_of(values)]
    tensors = [q, *map(rows_of, parts)]
    if recorded(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    plain = all(x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
    return plain and all(_is_known(x, q.dtype) for x in parts) and q.dtype in DTYPES and library() is not None


def reads(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether the kernel makes heads of `dtype` of what is stored, and nobody wants gradients or a graph of it."""
    return serves(torch.empty(0, dtype=dtype), stored, stored)


def _is_known(x: Any, dtype: torch.dtype) -> bool:
    packed = x.format if not isinstance(x, Tensor) else None
    alone = not isinstance(x, PackedTokens) or x.recent is None
    return x.dtype == dtype and alone and (packed is None or (packed.codec.fused and packed.block == 1))


def decode_part(
    q_BNTR: Tensor,
    keys: Stored,
    values: Stored,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sequences_B3: Tensor | None = None,
    position: int | None = None,
    ages: tuple[int, int] = ANY_AGE,
    rebuild: Rebuild | None = None,
) -> Averages:
    """Of queries over stored tokens.

    sequences_B3: of each, the first token, the one behind the last, and where the first query stands: without it all tokens,
    and queries at `position`, or at their end. A query sees tokens of ages from ages[0] to below ages[1]. rebuild: how keys
    are made of what is stored; without it queries meet stored keys. Values that are the same object as keys are read once.
    Packed tokens become numbers of q's dtype, block by block, in the processor's own cache.
    Sums are float32; probabilities are rounded to the dtype before they weigh values, as in torch.
    """
    B, N, T, _ = q_BNTR.shape
    kernel, shared, V = library(), keys is values, values.shape[3]
    assert kernel is not None, "serves() was asked"
    exact: dict[str, Any] = {"dtype": torch.float32, "device": q_BNTR.device}  # whatever torch's defaults are
    queries, out = float_rows(q_BNTR), torch.empty(B, N, T, V, **exact)
    log_sums = torch.empty(B, N, T, **exact)
    if sequences_B3 is None:
        S = keys.shape[2]
        at = S - T if position is None else position
        sequences_B3 = torch.tensor([[0, S, at]] * B, dtype=torch.int64, device=q_BNTR.device)
    rows = None if bias is None else bias_rows(bias, B, N, T)
    facts = Queries(
        queries.data_ptr(), None if rows is None else rows.data_ptr(), sequences_B3.data_ptr(),
        *((0, 0) if rows is None else rows.stride()[:2]), B, N * T, T, *ages, torch.get_num_threads(), scale, softcap or 0.0,
    )  # fmt: skip
    parts = [StoredTokens.of(x) for x in parts_of(keys)]
    kernel.kvfold_decode(
        ctypes.c_int(q_BNTR.dtype == torch.bfloat16),
        ctypes.byref(facts),
        (StoredTokens * len(parts))(*parts),
        ctypes.c_int(len(parts)),
        None if shared else ctypes.byref(StoredTokens.of(values)),
        None if rebuild is None else ctypes.byref(rebuild.described()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(log_sums.data_ptr()),
    )
    return Averages(out, log_sums)


def float_rows(q_BNTR: Tensor) -> Tensor:
    """The same numbers in float32, behind each other."""
    if q_BNTR.dtype == torch.float32 and q_BNTR.is_contiguous():
        return q_BNTR.detach()
    return torch.empty(q_BNTR.shape, dtype=torch.float32, device=q_BNTR.device).copy_(q_BNTR)


def bias_rows(bias: Tensor, B: int, N: int, T: int) -> Tensor:
    """[B, N * T, S] of numbers to add to scores, in which one token's mask need not be copied."""
    S = bias.shape[-1]
    rows = bias.expand(B, N, T, S)[:, :, 0] if T == 1 else bias.expand(B, N, T, S).reshape(B, N * T, S)
    if rows.stride(-1) == 1:
        return rows
    return torch.empty(rows.shape, dtype=torch.float32, device=bias.device).copy_(rows)


def values_of(parts: Sequence[Averages], width: int, dtype: torch.dtype, map: ValueMap | None) -> Tensor:
    """[B, T, N, H] of averages and log-sums over parts of the tokens, as `decode_part` gives them: with averages o and
    log-sums l, sum_i e^(l_i) o_i / sum_i e^(l_i), led back by the map. width: of what it takes, of which a part may have the
    first or the `last` numbers only. Without a map [B, T, N, width]."""
    B, N, T, _ = parts[0].averages.shape
    kernel, out_width = library(), width if map is None else map.head_dim
    assert kernel is not None, "serves() was asked"
    out = torch.empty(B, T, N, out_width, dtype=dtype, device=parts[0].averages.device)
    described = [
        _Part(o.data_ptr(), log_sums.data_ptr(), o.shape[3], width - o.shape[3] if last else 0)
        for o, log_sums, last in parts
    ]
    facts = Values.of(map, width, batch=B, heads=N, steps=T)
    kernel.kvfold_values(
        ctypes.c_int(dtype == torch.bfloat16),
        ctypes.byref(facts),
        (_Part * len(described))(*described),
        ctypes.c_int(len(described)),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


def rebuilt(
    stored: Stored, rebuild: Rebuild, dtype: torch.dtype, spans_B2: Tensor | None = None, width: int | None = None
) -> Tensor:
    """[B, K, width, H]: the source's heads of the tokens start:end of each sequence, at the end of rows of zeros; without
    spans of all tokens."""
    kernel, parts, (B, _, S, _) = library(), [StoredTokens.of(x) for x in parts_of(stored)], stored.shape
    if spans_B2 is None or width is None:
        spans_B2, width = torch.tensor([[0, S]] * B, dtype=torch.int64, device=rows_of(parts_of(stored)[0]).device), S
    assert kernel is not None, "serves() was asked"
    heads = stored.shape[1] * rebuild.map.heads
    out = torch.empty(B, heads, width, rebuild.map.head_dim, dtype=dtype, device=spans_B2.device)
    kernel.kvfold_rebuild(
        ctypes.c_int(dtype == torch.bfloat16),
        (StoredTokens * len(parts))(*parts),
        ctypes.c_int(len(parts)),
        ctypes.byref(rebuild.described()),
        ctypes.c_void_p(spans_B2.data_ptr()),
        ctypes.c_int64(B),
        ctypes.c_int64(width),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out
