"""Packing, unpacking, rotating and paging by the CPU's own kernels (cpp/, compiled by native.py)."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.codecs.exponent import TRIED
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, PagedTokens, SideBySide
from kvfold.runtimes.kernels.recording import followed, recorded

DTYPES = (torch.bfloat16, torch.float32)


class StoredTokens(ctypes.Structure):
    """Where tokens lie, as stored.h declares it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_stride", "page_tokens", "page_stride")),
        *((name, ctypes.c_int64) for name in ("heads", "width", "head_stride", "token_stride")),
        *((name, ctypes.c_int64) for name in ("packed", "narrow", "num_tiers")),
        ("tiers", ctypes.POINTER(ctypes.c_int32)),
    )

    @classmethod
    def of(cls, x: Any) -> StoredTokens:
        """Of a tensor [B, C, S, R], packed rows of it, or pages and the tables that name them."""
        rows, packed = rows_of(x), not isinstance(x, Tensor) and x.format is not None
        tiers = x.format.tiers if packed and x.format.scales == "exponent" else ()
        page, head, token = (stride * rows.element_size() for stride in rows.stride()[:3])
        table: tuple[int | None, int, int] = (None, 0, 0)
        if isinstance(x, PagedTokens):
            table = (x.tables_Bp.data_ptr(), x.tables_Bp.stride(0), rows.shape[2])
        return cls(
            rows.data_ptr(), *table, page, rows.shape[1], x.shape[3], head, token, packed,
            x.dtype == torch.bfloat16, len(tiers), _flat(tiers),
        )  # fmt: skip


class _Rotation(ctypes.Structure):
    """Sizes and strides, as rotate.cpp declares them."""

    _fields_ = (
        ("positions", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_group", "x_token", "table_batch", "out_row", "out_token")),
        *((name, ctypes.c_int32) for name in ("batch", "groups", "heads", "tokens", "width", "rotated", "pairs")),
    )


class Pages(ctypes.Structure):
    """A region of all pages, as pages.h declares it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("page_stride", "heads", "tokens", "row_bytes")),
    )

    def __init__(self, rows_PCtX: Tensor) -> None:
        super().__init__(rows_PCtX.data_ptr(), rows_PCtX.stride(0), *rows_PCtX.shape[1:])


class Packing(ctypes.Structure):
    """How numbers become a row of bytes, as pack.cpp declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tiers", "tried")),
        *((name, ctypes.c_int64) for name in ("num_tiers", "width", "row_bytes")),
    )

    def __init__(self, format: NumberFormat) -> None:
        tiers, tried = _flat(format.tiers), (ctypes.c_int32 * len(format.tiers))()
        tried[:] = [TRIED[bits] for _, bits in format.tiers]
        self.kept = tiers, tried
        super().__init__(
            ctypes.addressof(tiers), ctypes.addressof(tried), len(format.tiers), format.width, format.row_bytes
        )


packing_of = functools.lru_cache(maxsize=4096)(Packing)


@functools.lru_cache(maxsize=4096)
def _flat(tiers: Sequence[tuple[int, int]]) -> Any:
    return (ctypes.c_int32 * (2 * len(tiers)))(*itertools.chain(*tiers))


def rows_of(x: Any) -> Tensor:
    """What lies in memory."""
    assert not isinstance(x, SideBySide), "of these each part lies by itself"
    return x if isinstance(x, Tensor) else x.rows


def packs(x: Tensor) -> bool:
    """Whether the kernel packs these numbers."""
    return x.device.type == "cpu" and x.dtype in (*DTYPES, torch.float16) and library() is not None


def pack(x: Tensor, format: NumberFormat) -> Tensor:
    """Numbers [B, C, T, R] -> rows of an `exponent` format [B, C, T, row_bytes]."""
    kernel = library()
    assert kernel is not None, "packs() was asked"
    elements = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
    rows = torch.empty(*x.shape[:3], format.row_bytes, dtype=torch.uint8, device=x.device)
    kernel.kvfold_pack(
        ctypes.byref(packing_of(format)),
        ctypes.c_void_p(elements.data_ptr()),
        ctypes.c_int64(elements.numel() // format.width),
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return rows


def unpacks(rows_BCSX: Tensor, format: NumberFormat, dtype: torch.dtype) -> bool:
    """Whether the kernel turns these rows into numbers."""
    plain = rows_BCSX.device.type == "cpu" and rows_BCSX.stride(-1) == 1 and not recorded(rows_BCSX)
    return plain and format.codec.fused and format.block == 1 and dtype in DTYPES and library() is not None


def unpack(rows_BCSX: Tensor, format: NumberFormat, out_BCSR: Tensor) -> Tensor:
    """Rows as numbers, into memory whose last stride is 1: as many as there is room for."""
    kernel, width = library(), out_BCSR.shape[3]
    assert kernel is not None and out_BCSR.stride(-1) == 1, "unpacks() was asked"
    assert out_BCSR.shape[:3] == rows_BCSX.shape[:3] and width <= format.width, "not more numbers than there are"
    kernel.kvfold_unpack(
        ctypes.c_int(out_BCSR.dtype == torch.bfloat16),
        ctypes.byref(StoredTokens.of(PackedTokens(rows_BCSX, format, out_BCSR.dtype, width=width))),
        ctypes.c_void_p(out_BCSR.data_ptr()),
        *(ctypes.c_int64(stride) for stride in out_BCSR.stride()[:3]),
        *(ctypes.c_int(number) for number in (out_BCSR.shape[0], out_BCSR.shape[2], torch.get_num_threads())),
    )
    return out_BCSR


def rotates(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel turns these numbers, and nobody wants gradients or a graph of it."""
    tensors = (x, cos, sin)
    if followed(*tensors):
        return False
    plain = all(part.device.type == "cpu" and part.dtype in DTYPES for part in tensors) and x.stride(-1) == 1
    return plain and cos.dtype == sin.dtype and library() is not None


def rotate(x_BCSF: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, head_dim: int, pairs: int | None = None) -> Tensor:
    """Heads [B, C * F / head_dim, S, head_dim] of x, rotated by tables [B or 1, S, r], of which the first `pairs` turn."""
    B, C, S, F = x_BCSF.shape
    heads, r = F // head_dim, cos_BSr.shape[2]
    cos, sin = cos_BSr.contiguous(), sin_BSr.contiguous()
    assert cos.shape == sin.shape and cos.shape[0] in (1, B) and cos.shape[1] == S, "tables are of these tokens"
    out = torch.empty(B, C * heads, S, head_dim, dtype=x_BCSF.dtype, device=x_BCSF.device)
    strides = *x_BCSF.stride()[:3], S * r if len(cos) > 1 else 0, S * head_dim, head_dim
    _rotate(
        _Rotation(None, *strides, B, C, heads, S, head_dim, r, r // 2 if pairs is None else pairs),
        x_BCSF,
        cos,
        sin,
        out,
    )
    return out


def rotate_at(x_NTH: Tensor, positions_T: Tensor, cos_Sr: Tensor, sin_Sr: Tensor, pairs: int | None = None) -> None:
    """Rotate heads where they lie, by the tables' rows at their positions, of which the first `pairs` turn; all if None."""
    (N, T, H), r = x_NTH.shape, cos_Sr.shape[1]
    assert positions_T.dtype == torch.int64 and positions_T.shape == (T,) and positions_T.is_contiguous()
    assert cos_Sr.is_contiguous() and sin_Sr.is_contiguous(), "rows follow each other"
    head, token, _ = x_NTH.stride()
    strides = positions_T.data_ptr(), 0, head, token, 0, head, token
    _rotate(_Rotation(*strides, 1, N, 1, T, H, r, r // 2 if pairs is None else pairs), x_NTH, cos_Sr, sin_Sr, x_NTH)


def _rotate(rotation: _Rotation, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    kernel = library()
    assert kernel is not None, "rotates() was asked"
    kernel.kvfold_rotate(
        ctypes.c_int(x.dtype == torch.bfloat16),
        ctypes.c_int(cos.dtype == torch.bfloat16),
        ctypes.byref(rotation),
        *(ctypes.c_void_p(part.data_ptr()) for part in (x, cos, sin, out)),
        ctypes.c_int(torch.get_num_threads()),
    )


def pages(rows_PCtX: Tensor) -> bool:
    """Whether the kernel takes these bytes out of pages, and puts others there."""
    _, _, tokens, row_bytes = rows_PCtX.shape
    dense = rows_PCtX.stride()[1:] == (tokens * row_bytes, row_bytes, 1)
    return rows_PCtX.device.type == "cpu" and rows_PCtX.dtype == torch.uint8 and dense and library() is not None


def gather(rows_PCtX: Tensor, tables_Bp: Tensor, spans: Sequence[tuple[int, int]], width: int) -> Tensor:
    """As `paging.gather`."""
    kernel, heads, row_bytes = library(), rows_PCtX.shape[1], rows_PCtX.shape[3]
    assert kernel is not None, "pages() was asked"
    assert all(0 <= start < end <= start + width for start, end in spans), "rows are wide enough"
    tables = tables_Bp.to(torch.int32).contiguous()
    ends = (ctypes.c_int64 * (2 * len(spans)))(*itertools.chain(*spans))
    out = torch.empty(len(spans), heads, width, row_bytes, dtype=torch.uint8, device=rows_PCtX.device)
    kernel.kvfold_gather(
        ctypes.byref(Pages(rows_PCtX)),
        ctypes.c_void_p(tables.data_ptr()),
        ctypes.c_int64(tables.stride(0)),
        ends,
        ctypes.c_void_p(out.data_ptr()),
        *(ctypes.c_int(number) for number in (len(spans), width, torch.get_num_threads())),
    )
    return out


def scatter(rows_PCtX: Tensor, slots_T: Tensor, new_CTX: Tensor) -> None:
    """As `paging.scatter`."""
    kernel, slots = library(), slots_T.to(torch.int64).contiguous()
    assert kernel is not None and new_CTX.stride(-1) == 1, "pages() was asked"
    assert new_CTX.dtype == torch.uint8 and new_CTX.shape == (rows_PCtX.shape[1], len(slots), rows_PCtX.shape[3])
    kernel.kvfold_scatter(
        ctypes.byref(Pages(rows_PCtX)),
        ctypes.c_void_p(slots.data_ptr()),
        ctypes.c_void_p(new_CTX.data_ptr()),
        *(ctypes.c_int64(number) for number in (*new_CTX.stride()[:2], len(slots))),
    )
