"""Decoding over packed pages where they lie, by the CPU's kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from kvfold.runtimes.kernels import cpu_decode, native
from kvfold.runtimes.kernels.aged_kernels import ALL_OLDER, together
from kvfold.runtimes.kernels.dispatch import FEW_TOKENS
from kvfold.runtimes.kernels.packed_tokens import SideBySide, by_age
from kvfold.runtimes.transformers.keys_on_read import key_maps
from kvfold.runtimes.vllm.batches import Batch
from kvfold.runtimes.vllm.pages import RECENT, Kind


def reads_in_place(device: torch.device) -> bool:
    """Whether decoding sequences are read where their pages lie."""
    return device.type == "cpu" and native.library() is not None


class PageReader:
    """Of one layer: few queries over the pages of its own and of the layers that predict it."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def read(self, q_BNTH: Tensor, far: Tensor, batch: Batch, place: int) -> Tensor | None:
        """[B, T, N, width] of queries, or None where the kernel does not serve. far: pages of the layer's own kind."""
        attention, spec = self.attention, self.attention.spec
        maps = key_maps(attention) if attention._rotates_on_read and attention.tables is not None else None
        if batch.queries > FEW_TOKENS or spec.hidden or (spec.rope == "on_read" and maps is None):
            return None
        q = q_BNTH if maps is not None else attention._absorb(q_BNTH)
        found = self._by_age(q, far, batch, place, maps) if spec.recent else self._all(q, far, batch, maps)
        return None if found is None else attention._lead_values_back(found.to(q_BNTH.dtype).transpose(1, 2))

    def _all(self, q: Tensor, far: Tensor, batch: Batch, maps: Any) -> Tensor | None:
        kind = self.attention.attn.kind
        found = self._form(q, kind, far, batch, (0, ALL_OLDER if kind is None else kind), maps)
        return None if found is None else found[0]

    def _by_age(self, q: Tensor, far: Tensor, batch: Batch, place: int, maps: Any) -> Tensor | None:
        """Each form by itself, then one softmax over both."""
        spec, pages, kind = self.attention.spec, self.attention.pages.recent, self.attention.attn.kind
        recents = get_forward_context().attn_metadata[pages.layer_name].batches[place]
        widths = (spec.head_dim + spec.predictors, spec.of_recent.head_dim + spec.recent_predictors)
        meeting = (q, q) if maps is not None else by_age(q, *widths)
        oldest = ALL_OLDER if kind is None else kind
        near = self._form(meeting[1], RECENT, pages.kv_cache, recents, (0, min(spec.recent, oldest)), maps)
        old = self._form(meeting[0], kind, far, batch, (spec.recent, max(oldest, spec.recent)), maps)
        return None if near is None or old is None else together(old, near, spec.read_widths[1])

    def _form(
        self, q: Tensor, kind: Kind, pages: Tensor, batch: Batch, ages: tuple[int, int], maps: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Averages and log-sums over the tokens of some ages in one form; None where the kernel does not serve."""
        attention = self.attention
        keys, values = self._lying(kind, pages, batch)
        if not cpu_decode.serves(q, keys, values):
            return None
        rebuild = None
        if maps is not None:
            tables = attention.tables
            rebuild = maps(keys.shape[3], kind == RECENT).rebuild(tables.cos_Sr[None], tables.sin_Sr[None])
        return cpu_decode.decode_part(
            q, keys, values, self._bias(batch), scale=attention.scaling, softcap=attention.layer.softcap,
            sequences_B3=batch.seen(ages), ages=ages, rebuild=rebuild,
        )  # fmt: skip

    def _lying(self, kind: Kind, pages: Tensor, batch: Batch) -> tuple[Any, Any]:
        """Keys and values, the same object where a layer has one latent of both."""
        attention, format = self.attention, self.attention.pages.layout.formats[kind]
        tables, below = batch.tables_Bp, attention.spec.predicted_from
        keys: Any = format.lying(pages, (attention.owner, "k"), tables)
        if below:
            keys = SideBySide([keys, *(format.lying(pages, (layer, "k"), tables) for layer in below)])
        return keys, keys if attention.spec.shared_latent else format.lying(pages, (attention.owner, "v"), tables)

    def _bias(self, batch: Batch) -> Tensor | None:
        slopes = self.attention.slopes_N
        if slopes is None:
            return None
        return batch.once("slopes", functools.partial(_slopes, slopes, max(batch.lengths)))


def _slopes(slopes_N: Tensor, tokens: int) -> Tensor:
    """[1, N, 1, S]: slopes times positions, the same in all layers."""
    return (slopes_N[:, None, None] * torch.arange(tokens))[None]
