"""Attention of few query tokens by the CPU's own kernel (cpp/decode.cpp): over stored keys, or over keys that it rebuilds.

A contiguous cache is one page per sequence, so that caches of both runtimes are read by the same code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.runtimes.kernels.cpu import DTYPES, StoredTokens, rows_of
from kvfold.runtimes.kernels.cpu_maps import HeadMap as HeadMap
from kvfold.runtimes.kernels.cpu_maps import Rebuild, ValueMap
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored, parts_of
from kvfold.runtimes.kernels.recording import followed

ALL_OLDER = 1 << 62
"""An age that no token has."""
ANY_AGE = (-ALL_OLDER, ALL_OLDER)


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
        *((name, ctypes.c_void_p) for name in ("averages", "log_sums", "heads")),
        *((name, ctypes.c_int64) for name in ("own_heads", "width", "column")),
    )


class Values(ctypes.Structure):
    """As parts.h declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("map", "sinks")),
        *((name, ctypes.c_int64) for name in ("map_bytes", "depth", "out_width", "batch", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("steps", "threads")),
    )

    @classmethod
    def of(
        cls, map: ValueMap | None, width: int, *, batch: int, heads: int, steps: int, sinks: Tensor | None = None
    ) -> Values:
        """width: of what the map takes, or, without one, of the output. sinks: float32, as long as this is used."""
        sizes = batch, heads, 1 if map is None else map.kv_heads, steps, torch.get_num_threads()
        at = None if sinks is None else sinks.data_ptr()
        if map is None:
            return cls(None, at, 0, width, width, *sizes)
        return cls(map.packed.data_ptr(), at, map.map_bytes, width, map.head_dim, *sizes)


class Averages(NamedTuple):
    """Over a part of the tokens [B, N, T, V], and the logarithms of the sums [B, N, T] that say what the part counts beside
    others; both float32. last: they are the last numbers of a token where others are the first."""

    averages: Tensor
    log_sums: Tensor
    last: bool = False


def serves(q: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether the kernel takes these tensors, and nobody wants gradients or a graph of it."""
    parts = [*parts_of(keys), *parts_of(values)]
    tensors = [q, *map(rows_of, parts)]
    if followed(*tensors):
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
        _Part(o.data_ptr(), log_sums.data_ptr(), None, N, o.shape[3], width - o.shape[3] if last else 0)
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
