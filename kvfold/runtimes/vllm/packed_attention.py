"""Attention of one layer under vLLM over packed tokens: made, stored and read as the transformers runtime does, in pages."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.errors import PlanError
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, first_numbers, side_by_side
from kvfold.runtimes.kernels.rotary import own_tables
from kvfold.runtimes.transformers.attention import FoldedAttention
from kvfold.runtimes.vllm.attention import FamilyCall, window_of
from kvfold.runtimes.vllm.batches import Batch
from kvfold.runtimes.vllm.linear import GroupedLinear, Linear
from kvfold.runtimes.vllm.packed_layers import PackedAttention, PackedPages
from kvfold.runtimes.vllm.pages import RECENT
from kvfold.runtimes.vllm.reading import PageReader, reads_in_place
from kvfold.runtimes.vllm.rotary_tables import Positions, RotaryTables
from kvfold.runtimes.vllm.writing import PageWriter


class PackedFoldedAttention(FamilyCall, FoldedAttention):  # type: ignore[misc]
    """Takes the place of a family's attention module in vLLM. Tokens [T] of all sequences in a row."""

    slopes_N: Tensor | None

    def __init__(
        self,
        layer: AttentionLayer,
        spec: CacheSpec,
        old: nn.Module,
        stock: Any,
        owner: int,
        pages: PackedPages,
        tables: RotaryTables | None,
    ) -> None:
        norms = getattr(old, "q_norm", None), getattr(old, "k_norm", None)
        config: Any = SimpleNamespace(_attn_implementation="sdpa")
        rank, owns = pages.rank, owner == layer.index
        if layer.flat_norm and rank.count > 1:
            raise PlanError("tensor_parallel_size: this family normalises all heads together; serve it with 1.")
        shapes = rank.shapes(layer, spec, owns=owns)
        super().__init__(
            config, rank.reader(layer), rank.spec(spec), norms, owner, shapes, linear=Linear, to_stored=GroupedLinear
        )
        if self.k_p_proj is not None:
            self.k_p_proj.keep()
        self.pages, self.tables, self.made_heads = pages, tables, rank.made_heads(layer, spec)
        for name in shapes:
            if "norm" not in name:
                cut = functools.partial(rank.cut, name, layer=layer, spec=spec)
                self.get_parameter(name).of_rank = cut  # type: ignore[attr-defined]
        slopes = getattr(stock.impl, "alibi_slopes", None)
        slopes_N = None if slopes is None else torch.as_tensor(slopes, dtype=torch.float32)
        self.register_buffer("slopes_N", slopes_N, persistent=False)
        self.attn = PackedAttention(self, pages, stock.layer_name, window_of(layer, stock))
        self.read_tables = None if tables is None else tables.of_slow(spec.fast_pairs)
        self.reader, self.writer = PageReader(self), PageWriter(self)

    def _attended(self, hidden_TD: Tensor, where: Any) -> Tensor:
        rotary = None if self.tables is None or where is None else self.tables.at(where, hidden_TD)
        return self._turned(hidden_TD[None], rotary)

    def _turn(self, x_1NTH: Tensor, rotary: Any, pairs: int | None = None) -> Tensor:
        if not isinstance(rotary, Positions):
            return super()._turn(x_1NTH, rotary, pairs)
        rotary.turn(x_1NTH[0], pairs)
        return x_1NTH

    def _turned(self, hidden_1TD: Tensor, rotary: Any) -> Tensor:
        """[1, T, D] -> [T, D], with what rotates heads of these tokens."""
        q = self._queries(hidden_1TD, rotary)[0].transpose(0, 1)
        z = y = None
        if self.owner == self.layer_idx:
            z, y = (x[0].transpose(0, 1) for x in self._new_keys_values(hidden_1TD, rotary))
        heads = self.layer.num_attention_heads
        out = self.attn(q, z, y, self.o_proj.in_features // heads)
        return self._output(out[None], None)[0]

    def _output(self, out_1TNH: Tensor, residual: Tensor | None) -> Tensor:
        if self.pages.rank.count == 1:
            return super()._output(out_1TNH, residual)
        return self._summed(out_1TNH.flatten(2))

    def store(self, z_TCE: Tensor, y_TUG: Tensor, far: Tensor, slots_T: Tensor) -> None:
        """Into pages, in both forms where there are two; less what the numbers of layers below say."""
        sides = (z_TCE,) if self.spec.shared_latent else (z_TCE, y_TUG)
        stored = self.writer.write([x[: len(slots_T)].transpose(0, 1) for x in sides], far, slots_T)
        if self.layer_idx in self.pages.last_reader:
            self.pages.new[self.layer_idx] = stored

    def read(self, q_tNH: Tensor, far: Tensor, batch: Batch, place: int, out_tNV: Tensor | None = None) -> Tensor:
        """[t, N, width] for the queries of a batch, the `place`-th of its step. out: memory that may take the result."""
        B, T = len(batch.lengths), batch.queries
        q = q_tNH.unflatten(0, (B, T)).transpose(1, 2)
        if reads_in_place(far.device, q_tNH.dtype):
            memory = None if out_tNV is None else out_tNV.unflatten(0, (B, T))
            out = self.reader.read(q, far, batch, place, memory)
            if out is not None:
                return out_tNV if out_tNV is not None and out is memory else out.flatten(0, 1)
        z, y = self._tokens(self.owner, far, batch, place)
        batch.gathered[self.owner] = z
        below = [first_numbers(batch.gathered[i], self.spec) for i in self.spec.predicted_from]
        z, y = (side_by_side([z, *below]),) * 2 if below else (z, y)
        for i in (i for i in [*batch.gathered] if self.pages.last_reader.get(i, 0) <= self.layer_idx):
            del batch.gathered[i]
        tables = None
        if self._rotates_on_read and self.read_tables is not None:
            tables = batch.once(self.read_tables, functools.partial(self.read_tables.of, batch.positions_BS))
        return self._read(q, z, y, self._mask(batch), tables)[0].flatten(0, 1)

    def _tokens(self, owner: int, far: Tensor, batch: Batch, place: int) -> tuple[Any, Any]:
        """What a layer has stored of the tokens that a batch may see."""
        spec, window = self.pages.owned[owner], self.attn.kind
        format = self.pages.layout.formats[window]
        where = batch.tables_Bp, batch.spans(window), batch.width_of(window)
        z = format.read(far, (owner, "k"), *where)
        y = z if spec.shared_latent else format.read(far, (owner, "v"), *where)
        if not spec.recent:
            return z, y
        near_z = self.recent_tokens((owner, "k"), place)
        near_y = near_z if spec.shared_latent else self.recent_tokens((owner, "v"), place)
        return AgedTokens(z, near_z, spec.recent), AgedTokens(y, near_y, spec.recent)

    def recent_tokens(self, key: tuple[int, str], place: int) -> Any:
        """One side of what a layer has stored in the finer form of the newest tokens that the queries of a batch may see."""
        pages, recent = self.pages.recent, self.spec.recent
        step, format = pages.step, self.pages.layout.formats[RECENT]
        batch = step.batches[place]
        where = batch.tables_Bp, batch.spans(recent), batch.width_of(recent)
        return format.read(pages.kv_cache, key, *where, step.fresh_of(key, batch))

    def _mask(self, batch: Batch) -> Tensor | None:
        if self.slopes_N is None:
            return batch.mask(self.attn.kind)
        return batch.once("alibi", functools.partial(self._alibi, batch))

    def _alibi(self, batch: Batch) -> Tensor:
        """[B, N, T, S] to add: slopes, the same in all layers, times positions, and what queries do not see."""
        assert self.slopes_N is not None and self.attn.kind is None, "families with alibi have no windows"
        mask, S = batch.mask(None), batch.positions_BS
        bias_BN1S = self.slopes_N[:, None, None].to(S.device) * S[:, None, None]
        if mask is None:
            mask = torch.ones(batch.queries, batch.width, dtype=torch.bool, device=S.device)
            mask = mask.tril(batch.width - batch.queries)
        return bias_BN1S.masked_fill(~mask, torch.finfo(torch.float32).min)


class TransformersPackedAttention(PackedFoldedAttention):
    """In models that vLLM takes from transformers: a batch of one row of tokens."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """[1, T, D] -> ([1, T, D], no probabilities)."""
        return self._turned(hidden_states, own_tables(self.layer, kwargs.get("position_embeddings")))[None], None
