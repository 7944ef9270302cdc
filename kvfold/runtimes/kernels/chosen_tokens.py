"""Steps that read some of the stored tokens by the CPU's own kernels: what leading numbers choose (cpp/lead.cpp), and
attention over what was chosen, where it lies.

Each chosen token is a page of its own, so that the kernel which walks block tables reads it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.cpu import StoredTokens, rows_of
from kvfold.runtimes.kernels.gathering import in_rows, row_numbers
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, PagedTokens, Stored
from kvfold.runtimes.kernels.recording import recorded


class _Leading(ctypes.Structure):
    """As lead.cpp declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "bias")),
        *((name, ctypes.c_int64) for name in ("bias_batch", "bias_row", "batch", "rows", "groups", "tokens")),
        *((name, ctypes.c_int64) for name in ("count", "sinks", "newest", "threads")),
        ("softcap", ctypes.c_float),
    )


def chooses(queries: Tensor, keys: Stored) -> bool:
    """Whether the kernel finds the best tokens of these keys, and nobody records what is done with the queries."""
    return isinstance(keys, Tensor | PackedTokens) and not recorded(queries) and cpu_decode.reads(keys, keys.dtype)


def best_by_leading(
    queries_BNTR: Tensor,
    keys: Stored,
    seen: Tensor | None,
    *,
    leading: int,
    groups: int,
    count: int,
    sinks: int,
    newest: int,
    softcap: float | None = None,
) -> Tensor:
    """[B, groups, count]: of each group of stored heads the tokens that its queries, which are scaled, attend to most by the
    `leading` numbers of keys, beside those that are always read: the first that they see, and the newest.

    seen: [B or 1, N or 1, T, S], numbers to add to scores.
    """
    kernel, (B, N, T, _), S = library(), queries_BNTR.shape, keys.shape[2]
    assert kernel is not None and isinstance(keys, Tensor | PackedTokens), "chooses() was asked"
    numbers = min(leading, keys.shape[3])
    queries = queries_BNTR[..., :numbers].to(torch.float32, copy=True).contiguous()
    bias = None if seen is None else cpu_decode.bias_rows(seen.float(), B, N, T)
    first = (
        PackedTokens(keys.rows, keys.format, keys.dtype, width=numbers)
        if isinstance(keys, PackedTokens)
        else keys[..., :numbers]
    )
    found = torch.empty(B, groups, count, dtype=torch.int32, device=queries.device)
    facts = _Leading(
        queries.data_ptr(), None if bias is None else bias.data_ptr(), *((0, 0) if bias is None else bias.stride()[:2]),
        B, N * T, groups, S, count, sinks, newest, torch.get_num_threads(), softcap or 0.0,
    )  # fmt: skip
    described = StoredTokens.of(first)
    kernel.kvfold_lead(
        ctypes.c_int(keys.dtype == torch.bfloat16),
        ctypes.byref(facts),
        ctypes.byref(described),
        ctypes.c_void_p(found.data_ptr()),
    )
    return found


def attends(q: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether the kernel reads chosen ones of these tokens."""
    in_one = (isinstance(x, Tensor | PackedTokens) and in_rows(rows_of(x)) for x in (keys, values))
    return cpu_decode.serves(q, keys, values) and all(in_one)


def attend_to(
    q_BNTR: Tensor,
    keys: Stored,
    values: Stored,
    index_BGn: Tensor,
    hidden: Tensor | None,
    *,
    scale: float,
    map: cpu_decode.ValueMap | None,
) -> Tensor:
    """Attention [B, T, N, V] of few query tokens over chosen ones, of each group of stored heads its own.

    hidden: [B, N, T, n] to add to the scores, or none.
    """
    (B, N, T, R), (_, G, n) = q_BNTR.shape, index_BGn.shape
    grouped = q_BNTR.reshape(B * G, N // G, T, R)
    bias = None if hidden is None else hidden.float().expand(B, N, T, n).reshape(B * G, N // G, T, n)
    k: Any = in_pages(keys, index_BGn)
    v: Any = k if values is keys else in_pages(values, index_BGn)
    part = cpu_decode.decode_part(grouped, k, v, bias, scale=scale)
    whole = cpu_decode.Averages(part.averages.view(B, N, T, -1), part.log_sums.view(B, N, T))
    return cpu_decode.values_of([whole], values.shape[3], q_BNTR.dtype, map)


def in_pages(stored: Stored, index_BGn: Tensor) -> PagedTokens:
    """Of each group of stored heads tokens of its own, as sequences [B * G] whose pages hold one token each."""
    assert isinstance(stored, Tensor | PackedTokens), "attends() was asked"
    rows_BCSX, (B, G, n) = rows_of(stored), index_BGn.shape
    (_, C, _, X), (_, head, row, _) = rows_BCSX.shape, rows_BCSX.stride()
    numbers_BGn, count = row_numbers(rows_BCSX, index_BGn)
    pages = rows_BCSX.as_strided((count, C // G, 1, X), (row, head, row, 1))
    format = stored.format if isinstance(stored, PackedTokens) else None
    return PagedTokens(pages, format, stored.dtype, numbers_BGn.to(torch.int32).view(B * G, n), stored.shape[3])
