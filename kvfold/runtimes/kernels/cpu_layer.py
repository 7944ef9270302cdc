"""Attention of few queries of one layer over its pages by one call of the CPU's kernel (cpp/layer.cpp).

`decode_part` for each form of its tokens and `values_of` do the same (cpu_decode.py). Here what does not change from step to
step is described once: in a step of a small model that takes longer than reading the tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.runtimes.kernels.cpu import StoredTokens
from kvfold.runtimes.kernels.cpu_decode import Queries, Rebuild, ValueMap, Values, bias_rows, float_rows
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.packed_tokens import parts_of


class Form(NamedTuple):
    """Tokens in pages of the same form. values: the same object as keys where they are the same numbers; ages, rebuild: as
    `decode_part` takes them; last: as `Averages` has it."""

    keys: Any
    values: Any
    ages: tuple[int, int]
    rebuild: Rebuild | None
    last: bool


class _Form(ctypes.Structure):
    """As layer.cpp declares it."""

    _fields_ = (
        ("queries", Queries),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "map")),
        *((name, ctypes.c_int64) for name in ("places", "width", "column")),
    )


class LayerReader:
    """Of pages that stay where they are. width: of what the map takes; without one, of the output."""

    def __init__(
        self,
        forms: Sequence[Form],
        width: int,
        map: ValueMap | None,
        *,
        dtype: torch.dtype,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.dtype, self.width, self.map = dtype, width, map
        self.out_width = width if map is None else map.head_dim
        self.kept: list[Any] = [forms]  # what pointers lead to
        self.forms = (_Form * len(forms))()
        self.places: list[list[StoredTokens]] = []
        for described, form in zip(self.forms, forms, strict=True):
            self._describe(described, form)
            queries = described.queries
            (queries.youngest, queries.oldest), queries.scale, queries.softcap = form.ages, scale, softcap or 0.0

    def _describe(self, described: _Form, form: Form) -> None:
        keys, shared = parts_of(form.keys), form.keys is form.values
        places = (StoredTokens * (len(keys) + (not shared)))(
            *map(StoredTokens.of, [*keys, *([] if shared else [form.values])])
        )
        described.keys, described.places = ctypes.addressof(places), len(keys)
        described.values = None if shared else ctypes.addressof(places[len(keys)])
        described.width = form.values.shape[3]
        described.column = self.width - described.width if form.last else 0
        way = None if form.rebuild is None else form.rebuild.described()
        described.map = None if way is None else ctypes.addressof(way)
        self.kept += [places, way]
        self.places.append(list(places))

    def __call__(
        self,
        queries: Sequence[Tensor],
        sequences: Sequence[Tensor],
        tables: Sequence[Tensor],
        bias: Tensor | None = None,
    ) -> Tensor:
        """[B, T, N, H] of queries [B, N, T, R] as they meet each form; sequences [B, 3] as `decode_part` takes them, tables
        [B, pages], int32: of each form's pages."""
        B, N, T, _ = queries[0].shape
        kernel, threads = library(), torch.get_num_threads()
        assert kernel is not None, "serves() was asked"
        rows = None if bias is None else bias_rows(bias, B, N, T)
        used = [float_rows(q) for q in queries]
        for form, q, sequences_B3 in zip(self.forms, used, sequences, strict=True):
            facts = form.queries
            facts.data, facts.sequences = q.data_ptr(), sequences_B3.data_ptr()
            facts.batch, facts.rows, facts.steps, facts.threads = B, N * T, T, threads
            facts.bias = None if rows is None else rows.data_ptr()
            facts.bias_batch, facts.bias_row = (0, 0) if rows is None else rows.stride()[:2]
        for places, table_Bp in zip(self.places, tables, strict=True):
            for place in places:
                place.table, place.table_stride = table_Bp.data_ptr(), table_Bp.stride(0)
        out = torch.empty(B, T, N, self.out_width, dtype=self.dtype, device=queries[0].device)
        values = Values.of(self.map, self.width, batch=B, heads=N, steps=T)
        kernel.kvfold_layer(
            ctypes.c_int(self.dtype == torch.bfloat16),
            self.forms,
            ctypes.c_int(len(self.forms)),
            ctypes.byref(values),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out
