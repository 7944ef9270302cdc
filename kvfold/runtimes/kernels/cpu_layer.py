"""Attention of few queries of one layer by one call of the CPU's kernel (cpp/layer.cpp).

`decode_part` for each form of its tokens and `values_of` do the same (cpu_decode.py). Here what does not change from step to
step is described once: in a step of a small model that takes longer than reading the tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.runtimes.kernels.attention import additive
from kvfold.runtimes.kernels.cpu import StoredTokens, rows_of
from kvfold.runtimes.kernels.cpu_decode import (
    ANY_AGE,
    Queries,
    Rebuild,
    ValueMap,
    Values,
    bias_rows,
    serves,
)
from kvfold.runtimes.kernels.native import library
from kvfold.runtimes.kernels.packed_tokens import parts_of
from kvfold.runtimes.kernels.recording import recorded


class Form(NamedTuple):
    """Tokens of the same form. values: the same object as keys where they are the same numbers; ages, rebuild: as
    `decode_part` takes them; last: as `Averages` has it; heads: of the queries' heads, which see these tokens (None: all)."""

    keys: Any
    values: Any
    ages: tuple[int, int] = ANY_AGE
    rebuild: Rebuild | None = None
    last: bool = False
    heads: tuple[int, ...] | None = None


class Asked(NamedTuple):
    """Queries [B, own heads, T, R] as they meet one form. sequences_B3: as `decode_part` takes them; table_Bp, int32: pages
    of the tokens, where they lie in pages; bias [B or 1, own heads or 1, T, tokens]: added to scores, float32."""

    queries: Tensor
    sequences_B3: Tensor
    table_Bp: Tensor | None = None
    bias: Tensor | None = None


def asked_of(
    q_BNTR: Tensor, tokens: int, mask: Tensor | None, some: tuple[int, int] | None = None, first: int = 0
) -> Asked:
    """Queries at the end of so many tokens, of which they see what a mask says, or all that came before them. some: for which
    of them this form is read; first: so many tokens before them its storage begins (below 0: behind the first ones)."""
    B, _, T, _ = q_BNTR.shape
    start, end = some or (0, tokens)
    rows = [[start + first, end + first, tokens - T + first]] * B
    sequences_B3 = torch.tensor(rows, dtype=torch.int64, device=q_BNTR.device)
    bias = additive(mask, T, tokens, 0, tokens, q_BNTR)
    added = None if bias is None else bias.float()
    return Asked(q_BNTR, sequences_B3, None, added if added is None or not first else F.pad(added, (first, 0)))


class _Form(ctypes.Structure):
    """As layer.cpp declares it."""

    _fields_ = (
        ("queries", Queries),
        ("given", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("narrow", "batch_stride", "head_stride", "step_stride")),
        ("table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "map", "heads")),
        *((name, ctypes.c_int64) for name in ("places", "width", "column")),
    )


class LayerReader:
    """Of tokens that stay where they are, and tables. width: of what the map takes; without one, of the output. heads: of
    queries."""

    def __init__(
        self,
        forms: Sequence[Form],
        width: int,
        map: ValueMap | None,
        *,
        heads: int,
        dtype: torch.dtype,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> None:
        self.dtype, self.width, self.map, self.heads = dtype, width, map, heads
        self.out_width = width if map is None else map.head_dim
        self.sinks = None if sinks is None else sinks.detach().float().contiguous()
        self.values = Values.of(map, width, batch=0, heads=heads, steps=0, sinks=self.sinks)
        self.kept: list[Any] = []  # what pointers lead to; not the tokens, whose memory is their owner's
        self.forms = (_Form * len(forms))()
        self.ways: list[Any] = []
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
        own = None if form.heads is None else self._own(form.heads)
        described.heads = None if own is None else ctypes.addressof(own)
        self.kept += [places, own, form.rebuild and form.rebuild.map, *(getattr(x, "format", None) for x in keys)]
        self.ways.append(way)

    def _own(self, heads: tuple[int, ...]) -> Any:
        """Of all heads, which of these each is."""
        own = (ctypes.c_int32 * self.heads)(*[-1] * self.heads)
        for place, head in enumerate(heads):
            own[head] = place
        return own

    def __call__(
        self, asked: Sequence[Asked], tables: Sequence[Rebuild | None] | None = None, out: Tensor | None = None
    ) -> Tensor:
        """[B, T, N, H] of queries. tables: of each form, whose cos and sin take the place of those it was described with.
        out: memory for the result."""
        kernel, threads = library(), torch.get_num_threads()
        assert kernel is not None, "serves() was asked"
        B, _, T, _ = asked[0].queries.shape
        used = [
            _ask(form, one, threads) for form, one in zip(self.forms, asked, strict=True)
        ]  # until the kernel has read it
        for way, table in zip(self.ways, tables or (), strict=False):
            if way is not None and table is not None:
                table.turn_by(way)
        shape = B, T, self.heads, self.out_width
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device=asked[0].queries.device)
        assert out.shape == shape and out.is_contiguous() and out.dtype == self.dtype
        self.values.batch, self.values.steps, self.values.threads = B, T, threads
        is_bfloat16, count = ctypes.c_int(self.dtype == torch.bfloat16), ctypes.c_int(len(used))
        kernel.kvfold_layer(is_bfloat16, self.forms, count, ctypes.byref(self.values), ctypes.c_void_p(out.data_ptr()))
        return out


def _ask(form: _Form, asked: Asked, threads: int) -> list[Tensor | None]:
    """Describe what is asked; what it points to."""
    (q, sequences_B3, table_Bp, bias), facts = asked, form.queries
    B, N, T, _ = q.shape
    as_it_lies = q.dtype == torch.float32 and q.is_contiguous()
    q = q if q.stride(3) == 1 else q.contiguous()
    rows = None if bias is None else bias_rows(bias, B, N, T)
    form.given, facts.data = (None, q.data_ptr()) if as_it_lies else (q.data_ptr(), None)
    form.narrow, (form.batch_stride, form.head_stride, form.step_stride, _) = q.dtype == torch.bfloat16, q.stride()
    facts.sequences, facts.batch, facts.rows, facts.steps, facts.threads = sequences_B3.data_ptr(), B, N * T, T, threads
    facts.bias = None if rows is None else rows.data_ptr()
    facts.bias_batch, facts.bias_row = (0, 0) if rows is None else rows.stride()[:2]
    form.table, form.table_stride = (None, 0) if table_Bp is None else (table_Bp.data_ptr(), table_Bp.stride(0))
    return [q, rows]


class Steps:
    """Few queries at a time over a layer's tokens in one piece of memory each, described anew when they have moved."""

    def __init__(self) -> None:
        self.described: tuple[Any, LayerReader | None] = None, None

    def __reduce__(self) -> Any:
        return Steps, ()  # what is described lies in this process

    def read(
        self,
        forms: Sequence[Form],
        asked: Sequence[Asked],
        width: int,
        map: ValueMap | None,
        *,
        sinks: Tensor | None = None,
        **sizes: Any,
    ) -> Tensor | None:
        """As LayerReader gives it; None where the kernel does not serve."""
        queries = [one.queries for one in asked]
        state = None  # what is recorded, or may get gradients, is looked at every time
        if not torch.is_grad_enabled() and not recorded(*queries):
            state = (
                queries[0].dtype,
                tuple(sizes.items()),
                width,
                None if map is None else id(map.packed),
                None if sinks is None else (sinks.data_ptr(), sinks._version),
                *(_state(form) for form in forms),
            )
        known, reader = self.described  # at once: other threads may read other caches
        if state is None or known != state:
            reader = self._describe(forms, queries, width, map, sinks, sizes)
        if state is not None:
            self.described = state, reader
        return None if reader is None else reader(asked, [form.rebuild for form in forms])

    @staticmethod
    def _describe(
        forms: Sequence[Form],
        queries: Sequence[Tensor],
        width: int,
        map: ValueMap | None,
        sinks: Tensor | None,
        sizes: dict[str, Any],
    ) -> LayerReader | None:
        wanted = sinks is not None and sinks.requires_grad and torch.is_grad_enabled()  # a gradient
        if wanted or not all(serves(q, form.keys, form.values) for q, form in zip(queries, forms, strict=True)):
            return None
        return LayerReader(forms, width, map, dtype=queries[0].dtype, sinks=sinks, **sizes)


def _state(form: Form) -> tuple[Any, ...]:
    """What a description of it says."""
    sides = [*parts_of(form.keys), *([] if form.values is form.keys else parts_of(form.values))]
    way = form.rebuild
    rebuild = None if way is None else (id(way.map.packed), way.evenly, None if way.cos is None else way.cos.dtype)
    places = [(id(getattr(x, "format", None)), *_place(x)) for x in sides]
    return (*places, form.ages, form.last, form.heads, rebuild)


def _place(stored: Any) -> tuple[Any, ...]:
    rows = rows_of(stored)
    width = rows.shape[3] if stored is rows else stored.width
    return rows.data_ptr(), *rows.shape[:2], width, *rows.stride()
