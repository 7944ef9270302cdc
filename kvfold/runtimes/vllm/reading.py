"""Decoding over packed pages where they lie, by the device's kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CacheSpec
from kvfold.runtimes.kernels import cpu_decode, gpu, native
from kvfold.runtimes.kernels.aged_prefill import prefill_by_age
from kvfold.runtimes.kernels.attention import kernels_for, prefill_attention
from kvfold.runtimes.kernels.cpu_layer import Asked, Form, LayerReader
from kvfold.runtimes.kernels.dispatch import FEW_TOKENS
from kvfold.runtimes.kernels.packed_tokens import PagedTokens, by_age, first_numbers, side_by_side
from kvfold.runtimes.transformers.on_read import head_maps, value_map
from kvfold.runtimes.vllm.batches import Batch
from kvfold.runtimes.vllm.pages import RECENT, Kind, Span

AT_ONCE = 1 << 27
"""Numbers of keys, and of values, of a prompt that may be there at once."""


def reads_in_place(device: torch.device, dtype: torch.dtype = torch.bfloat16, specs: Sequence[CacheSpec] = ()) -> bool:
    """Whether decoding sequences are read where their pages lie, of layers with these specs."""
    if device.type == "cpu":
        return native.library() is not None
    return all(map(_by_gpu, specs)) and gpu.works_for(torch.empty(0, dtype=dtype, device=device))


def _by_gpu(spec: CacheSpec) -> bool:
    """Whether the GPU's kernels read what is stored: packed numbers, keys that queries meet as they are or turned."""
    sides = spec.sides[: 1 if spec.shared_latent else 2]
    packed = all(side.format is not None and side.format.codec.fused for side in sides)
    return packed and not spec.hidden and (spec.rope != "on_read" or spec.fast_pairs > 0)


class _FormPages(NamedTuple):
    """Tokens of some ages in one form: their kind of pages, these pages, and the batch as it reads them."""

    kind: Kind
    pages: Tensor
    batch: Batch
    ages: tuple[int, int]


class PageReader:
    """Of one layer: few queries over the pages of its own and of the layers that predict it."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.regions: dict[Kind, tuple[int, Any]] = {}
        self.known: dict[Any, bool] = {}
        self.described: tuple[Any, LayerReader | None] = None, None

    def read(
        self, q_BNTH: Tensor, far: Tensor, batch: Batch, place: int, out_BTNV: Tensor | None = None
    ) -> Tensor | None:
        """[B, T, N, width] of queries, or None where the kernel does not serve. far: pages of the layer's own kind; out:
        memory that may take the result."""
        if batch.queries > FEW_TOKENS:
            return self.prompt(q_BNTH, far, batch, place)
        return self.few(q_BNTH, far, batch, place, out_BTNV)

    def few(
        self, q_BNTH: Tensor, far: Tensor, batch: Batch, place: int, out_BTNV: Tensor | None = None
    ) -> Tensor | None:
        """Of few queries."""
        attention, spec, rotates = self.attention, self.attention.spec, self._rotates
        if spec.hidden or (spec.rope == "on_read" and not rotates):
            return None
        q = q_BNTH if rotates else attention._absorb(q_BNTH)
        asked = self._asked(far, batch, place)
        queries: Any = [q] * len(asked)
        if spec.recent and not rotates:
            widths = (spec.head_dim + spec.predictors, spec.of_recent.head_dim + spec.recent_predictors)
            queries = by_age(q, *widths)
        if kernels_for(q) is cpu_decode:
            return self._by_one_call(queries, asked, batch, out_BTNV)
        return self._part_by_part(queries, asked, batch)

    @property
    def _rotates(self) -> bool:
        return self.attention._rotates_on_read and self.attention.read_tables is not None

    def _by_one_call(
        self, queries: list[Tensor], asked: list[_FormPages], batch: Batch, out_BTNV: Tensor | None
    ) -> Tensor | None:
        state = queries[0].dtype, *(one.pages.data_ptr() for one in asked), *self._weights()
        if self.described[0] != state:
            self.described = state, self._describe(asked, queries[0])
        reader = self.described[1]
        if reader is None:
            return None
        bias = self._bias(batch)
        steps = [
            Asked(q, one.batch.seen(one.ages), one.batch.tables_Bp, bias) for q, one in zip(queries, asked, strict=True)
        ]
        if reader.map:
            fits = out_BTNV is not None and out_BTNV.is_contiguous() and out_BTNV.dtype == queries[0].dtype
            return reader(steps, out=out_BTNV if fits else None)
        return self.attention._lead_values_back(reader(steps))

    def _weights(self) -> list[tuple[int, int]]:
        """Where what the description was made of lies, and how often it has changed."""
        ways = self.attention.k_b_proj, self.attention.v_b_proj
        weights = [x for way in ways if way is not None for x in (way.weight, way.bias) if x is not None]
        return [(x.data_ptr(), x._version) for x in weights]

    def _describe(self, asked: list[_FormPages], q: Tensor) -> LayerReader | None:
        """None where the kernel does not serve."""
        attention, dtype, forms = self.attention, q.dtype, []
        for one in asked:
            keys, values = self._regions(one.kind, one.pages)
            z: Any = side_by_side(keys) if len(keys) > 1 else keys[0]
            y: Any = z if values is None else values
            rebuild = self._rebuild(one.kind, z.shape[3], dtype)
            if not cpu_decode.serves(torch.empty(0, dtype=dtype), z, y) or (self._rotates and rebuild is None):
                return None
            forms.append(Form(z, y, one.ages, rebuild, one.kind == RECENT))
        sizes = {
            "heads": q.shape[1], "scale": attention.scaling, "softcap": attention.layer.softcap, "dtype": dtype,
        }  # fmt: skip
        return LayerReader(forms, attention.spec.read_widths[1], value_map(attention, dtype), **sizes)

    def _rebuild(self, kind: Kind, width: int, dtype: torch.dtype) -> Any:
        """How keys are made of what is stored, where they are rotated on read; None where the kernel does not."""
        maps = head_maps(self.attention, "k_b", dtype) if self._rotates else None
        return maps and maps(width, kind == RECENT).rebuild(*self.attention.read_tables.of_all, evenly=True)

    def prompt(self, q_BNTH: Tensor, far: Tensor, batch: Batch, place: int) -> Tensor | None:
        """The same of many queries, over the source's heads of all tokens that they may see; None where these are not rebuilt
        by the kernel, or are too many to be there at once."""
        attention, spec, kind = self.attention, self.attention.spec, self.attention.attn.kind
        heads = self._heads(far, batch, q_BNTH.dtype)
        if heads is None or attention.layer.softcap is not None:
            return None
        if not spec.recent:
            return prefill_attention(q_BNTH, *heads, attention._mask(batch), scale=attention.scaling)
        near = self._recent_heads(place, q_BNTH.dtype)
        if near is None:
            return None
        (far_k, far_v), (near_k, near_v) = heads, near
        plain = attention.slopes_N is None and batch.sees_all(kind)
        keys, values, mask = (far_k, near_k), (far_v, near_v), None if plain else attention._mask(batch)
        return prefill_by_age(q_BNTH, keys, values, mask, recent=spec.recent, scale=attention.scaling)

    def _heads(self, far: Tensor, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, K, width, H] of the form that all tokens have."""
        kind = self.attention.attn.kind
        spans = batch.once(("span tensor", kind), lambda: torch.tensor(batch.spans(kind), dtype=torch.int64))
        return self._rebuilt(*self._lying(kind, far, batch), dtype, spans, batch.width_of(kind))

    def _recent_heads(self, place: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The same of the finer form of recent tokens: of a prompt's own from where they were packed."""
        attention, spec, owner = self.attention, self.attention.spec, self.attention.owner
        of = functools.partial(attention.recent_tokens, place=place)
        below = [first_numbers(of((layer, "k")), spec.of_recent) for layer in spec.predicted_from]
        keys = of((owner, "k"))
        keys = side_by_side([keys, *below]) if below else keys
        values = keys if spec.shared_latent else of((owner, "v"))
        (span,) = attention.pages.recent.step.batches[place].spans(spec.recent)
        return self._rebuilt(keys, values, dtype, recent=span)

    def _rebuilt(
        self,
        keys: Any,
        values: Any,
        dtype: torch.dtype,
        spans_B2: Tensor | None = None,
        width: int | None = None,
        *,
        recent: Span | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Of tokens in pages by spans and width; `recent`: of these tokens of a sequence, which lie by themselves."""
        attention, (B, _, S, _) = self.attention, keys.shape
        of_keys, of_values = head_maps(attention, "k_b", dtype), head_maps(attention, "v_b", dtype)
        too_many = B * (width or S) * attention.layer.num_kv_heads * attention.layer.head_dim > AT_ONCE
        if of_keys is None or of_values is None or too_many:
            return None
        if not (cpu_decode.reads(keys, dtype) and cpu_decode.reads(values, dtype)):
            return None
        near = recent is not None
        k_map, v_map = of_keys(keys.shape[3], near), of_values(values.shape[3], near)
        k_way = k_map.rebuild(*(attention.read_tables.of_all if self._rotates else ()))
        k_way = k_way if recent is None else k_way.of_tokens(*recent)
        k = cpu_decode.rebuilt(keys, k_way, dtype, spans_B2, width)
        return k, cpu_decode.rebuilt(values, v_map.rebuild(), dtype, spans_B2, width)

    def _asked(self, far: Tensor, batch: Batch, place: int) -> list[_FormPages]:
        """Each form of what the queries may see."""
        kind, recent = self.attention.attn.kind, self.attention.spec.recent
        return batch.once(("forms", kind, recent), lambda: self._forms(far, batch, place))

    def _forms(self, far: Tensor, batch: Batch, place: int) -> list[_FormPages]:
        recent, pages, kind = self.attention.spec.recent, self.attention.pages, self.attention.attn.kind
        oldest: Any = cpu_decode.ALL_OLDER if kind is None else kind
        if not recent:
            return [_FormPages(kind, far, batch, (0, oldest))]
        near = _FormPages(RECENT, pages.recent.kv_cache, pages.recent.step.batches[place], (0, min(recent, oldest)))
        return [_FormPages(kind, far, batch, (recent, max(oldest, recent))), near]

    def _part_by_part(self, queries: list[Tensor], asked: list[_FormPages], batch: Batch) -> Tensor | None:
        attention, dtype = self.attention, queries[0].dtype
        parts = [self._part(q, one, self._bias(batch)) for q, one in zip(queries, asked, strict=True)]
        if any(part is None for part in parts):
            return None
        back = value_map(attention, dtype)
        out: Tensor = kernels_for(queries[0]).values_of(parts, attention.spec.read_widths[1], dtype, back)
        return out if back else attention._lead_values_back(out)

    def _part(self, q: Tensor, asked: _FormPages, bias: Tensor | None) -> Any:
        """Over one form; None where the kernel does not serve."""
        keys, values = self._lying(asked.kind, asked.pages, asked.batch)
        rebuild = self._rebuild(asked.kind, keys.shape[3], q.dtype)
        if not self._serves(asked.kind, q, keys, values) or (self._rotates and rebuild is None):
            return None
        part = kernels_for(q).decode_part(
            q, keys, values, bias, scale=self.attention.scaling, softcap=self.attention.layer.softcap,
            sequences_B3=asked.batch.seen(asked.ages), ages=asked.ages, rebuild=rebuild,
        )  # fmt: skip
        return part._replace(last=asked.kind == RECENT)

    def _serves(self, kind: Kind, q: Tensor, keys: Any, values: Any) -> bool:
        """What does not change from step to step is asked once."""
        asked = kind, q.dtype, q.shape[2]
        if asked not in self.known:
            self.known[asked] = kernels_for(q).serves(q[:1], keys, values)
        return self.known[asked]

    def _lying(self, kind: Kind, pages: Tensor, batch: Batch) -> tuple[Any, Any]:
        """Keys and values, the same object where a layer has one latent of both."""
        place, regions = self.regions.get(kind, (0, None))
        if place != pages.data_ptr():
            regions = self._regions(kind, pages)
            self.regions[kind] = pages.data_ptr(), regions
        keys, values = regions
        parts = [part.of(batch.tables_Bp) for part in keys]
        z: Any = side_by_side(parts) if len(parts) > 1 else parts[0]
        return z, z if values is None else values.of(batch.tables_Bp)

    def _regions(self, kind: Kind, pages: Tensor) -> tuple[list[PagedTokens], PagedTokens | None]:
        """Of this layer and of those that say something of it; None where values are the same numbers as keys."""
        attention, format = self.attention, self.attention.pages.layout.formats[kind]
        spec, owner = attention.spec, attention.owner
        form = spec.of_recent if kind == RECENT else spec
        keys = [format.lying(pages, (owner, "k"))]
        keys += [format.lying(pages, (layer, "k"), form.predicting) for layer in spec.predicted_from]
        return keys, None if spec.shared_latent else format.lying(pages, (owner, "v"))

    def _bias(self, batch: Batch) -> Tensor | None:
        slopes = self.attention.slopes_N
        if slopes is None:
            return None
        return batch.once("slopes", functools.partial(_slopes, slopes, max(batch.lengths)))


def _slopes(slopes_N: Tensor, tokens: int) -> Tensor:
    """[1, N, 1, S]: slopes times positions, the same in all layers."""
    return (slopes_N[:, None, None] * torch.arange(tokens, device=slopes_N.device))[None]
