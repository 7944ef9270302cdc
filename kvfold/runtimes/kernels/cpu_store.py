"""New tokens into a layer's storages by one call of the CPU's kernel (cpp/pack.cpp).

Packing (`dispatch.pack`) and `paging.scatter` do the same. Here where they go is described once: in a step of a small model
that takes longer than packing a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.cpu import DTYPES, Pages, packing_of, pages
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.recording import recorded


class Storage(NamedTuple):
    """Rows [pages, heads, tokens, row_bytes] for numbers of a format; read: they are wanted as they are read then."""

    rows: Tensor
    format: NumberFormat
    read: bool = False


def packs_into(x: Tensor, format: NumberFormat) -> bool:
    """Whether the kernel packs numbers like these where their rows are to lie."""
    packed = format.codec.packs_fused and x.shape[-1] == format.width and x.device.type == "cpu"
    return packed and x.dtype in DTYPES and not recorded(x) and library() is not None


def stores(storage: Storage, x_CTR: Tensor) -> bool:
    """Whether the kernel packs numbers like these into this storage."""
    return pages(storage.rows) and packs_into(x_CTR, storage.format)


class _Storing(ctypes.Structure):
    """As pack.cpp declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("form", "pages", "slots", "x")),
        *((name, ctypes.c_int64) for name in ("head_stride", "token_stride")),
        ("stored", ctypes.c_void_p),
    )


class LayerWriter:
    """Of storages that stay where they are."""

    def __init__(self, storages: Sequence[Storage]) -> None:
        self.storages, self.parts = storages, (_Storing * len(storages))()
        self.kept = [(packing_of(one.format), Pages(one.rows)) for one in storages]
        for part, kept in zip(self.parts, self.kept, strict=True):
            part.form, part.pages = map(ctypes.addressof, kept)

    def __call__(self, new: Sequence[Tensor], slots: Sequence[Tensor]) -> list[Tensor | None]:
        """Numbers [C, T, R] into each storage, to slots [T]: page * tokens + place, -1 for nowhere; what is wanted of them as
        it is then read."""
        kernel, (_, T, _), dtype = library(), new[0].shape, new[0].dtype
        assert kernel is not None and len(new) == len(slots) == len(self.storages), "stores() was asked"
        used, stored = [], []  # as long as the kernel reads it
        for part, storage, x, slots_T in zip(self.parts, self.storages, new, slots, strict=True):
            x_CTR = x if x.stride(2) == 1 else x.contiguous()
            to = slots_T if slots_T.dtype == torch.int64 and slots_T.is_contiguous() else slots_T.long().contiguous()
            assert x.shape == (storage.rows.shape[1], T, storage.format.width) and x.dtype == dtype and len(to) == T
            out = torch.empty(x.shape, dtype=dtype) if storage.read else None
            part.slots, part.x, part.stored = to.data_ptr(), x_CTR.data_ptr(), None if out is None else out.data_ptr()
            part.head_stride, part.token_stride = x_CTR.stride()[:2]
            used += [x_CTR, to]
            stored.append(out)
        kernel.kvfold_store(
            ctypes.c_int(dtype == torch.bfloat16),
            self.parts,
            ctypes.c_int(len(self.parts)),
            ctypes.c_int64(T),
            ctypes.c_int(torch.get_num_threads()),
        )
        return stored
