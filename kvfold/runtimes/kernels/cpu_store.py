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
    """Rows [pages, heads, tokens, row_bytes] for numbers of a format; read: they are wanted as they are read then. side,
    first: of which of the tensors that come in, and from which of its numbers on. ways [known numbers, R], float32: what
    numbers that are known of a token say of these, which is taken off them."""

    rows: Tensor
    format: NumberFormat
    read: bool = False
    side: int = 0
    first: int = 0
    ways: Tensor | None = None


def packs_into(x: Tensor, format: NumberFormat) -> bool:
    """Whether the kernel packs numbers like these where their rows are to lie."""
    packed = format.codec.packs_fused and x.shape[-1] == format.width and x.device.type == "cpu"
    return packed and x.dtype in DTYPES and not recorded(x) and library() is not None


def stores(storage: Storage, x_CTR: Tensor) -> bool:
    """Whether the kernel packs numbers like these into this storage."""
    return pages(storage.rows) and packs_into(x_CTR, storage.format)


class _Known(ctypes.Structure):
    """As pack.cpp declares it."""

    _fields_ = (("rows", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("stride", "numbers")))


class _Storing(ctypes.Structure):
    """As pack.cpp declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("form", "pages", "slots", "x")),
        *((name, ctypes.c_int64) for name in ("head_stride", "token_stride")),
        ("known", ctypes.c_void_p),
        ("places", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ways", "stored")),
    )


class LayerWriter:
    """Of storages that stay where they are. numbers: of each tensor of what is known of a token, how many say something."""

    def __init__(self, storages: Sequence[Storage], numbers: Sequence[Sequence[int]] = ()) -> None:
        self.storages, self.parts = storages, (_Storing * len(storages))()
        self.known = [(_Known * len(own))(*(_Known(None, 0, count) for count in own)) for own in numbers]
        self.kept = [(packing_of(one.format), Pages(one.rows)) for one in storages]
        for place, (part, one, kept) in enumerate(zip(self.parts, storages, self.kept, strict=True)):
            part.form, part.pages = map(ctypes.addressof, kept)
            if one.ways is not None:
                assert one.ways.shape == (sum(numbers[place]), one.format.width) and one.ways.is_contiguous()
                part.ways, part.places = one.ways.data_ptr(), len(numbers[place])
                part.known = ctypes.addressof(self.known[place])

    def __call__(
        self, new: Sequence[Tensor], slots: Sequence[Tensor], known: Sequence[Sequence[Tensor]] = ()
    ) -> list[Tensor | None]:
        """Numbers [C, T, all] of each side into each storage, to its slots [T]: page * tokens + place, -1 for nowhere. known:
        [C, T, numbers] for each storage. Returns [C, T, R] of each of which that is wanted, as it is then read."""
        kernel, (C, T, _), dtype = library(), new[0].shape, new[0].dtype
        assert kernel is not None and len(slots) == len(self.storages), "stores() was asked"
        rows = [x if x.stride(2) == 1 else x.contiguous() for x in new]
        to = [x if x.dtype == torch.int64 and x.is_contiguous() else x.long().contiguous() for x in slots]
        for places, tensors in zip(self.known, known, strict=True):
            for place, x in zip(places, tensors, strict=True):
                assert x.is_contiguous() and x.dtype == dtype and x.shape[:2] == (C, T)
                place.rows, place.stride = x.data_ptr(), x.shape[2]
        stored: list[Tensor | None] = []
        for part, one, slots_T in zip(self.parts, self.storages, to, strict=True):
            x = rows[one.side]
            assert x.dtype == dtype and x.shape[0] == one.rows.shape[1] and x.shape[1] == len(slots_T) == T
            assert x.shape[2] >= one.first + one.format.width
            out = torch.empty(x.shape[0], T, one.format.width, dtype=dtype) if one.read else None
            part.slots, part.x = slots_T.data_ptr(), x.data_ptr() + one.first * x.element_size()
            (part.head_stride, part.token_stride, _), part.stored = x.stride(), None if out is None else out.data_ptr()
            stored.append(out)
        is_bfloat16, count, tokens = ctypes.c_int(dtype == torch.bfloat16), ctypes.c_int(len(stored)), ctypes.c_int64(T)
        kernel.kvfold_store(is_bfloat16, self.parts, count, tokens, ctypes.c_int(torch.get_num_threads()))
        return stored
