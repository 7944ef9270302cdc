"""Attention of one layer under vLLM: what is stored goes into its paged cache, queries meet it as it lies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.selector import get_attn_backend

from kvfold.errors import PlanError
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.tensors import PROJECTIONS, Axis, Shape, tensor_shapes
from kvfold.runtimes.kernels.rotary import apply_rotary, own_tables

LOGGER = init_logger(f"vllm.{__name__}")
USUAL_WIDTH = 64
"""A head size that every kernel takes."""


class FamilyCall(nn.Module):
    """How vLLM's families call their attention, and the output over all processes."""

    o_proj: Any
    _attended: Callable[[Tensor, Any], Tensor]

    def forward(
        self,
        positions: Tensor | None = None,
        hidden_states: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D]. Families differ in what they call positions."""
        assert hidden_states is not None, "every family hands over hidden states"
        return self._attended(hidden_states, position_ids if positions is None else positions)

    def _summed(self, out_TF: Tensor) -> Tensor:
        """[T, D] of what the heads of this process give."""
        out = tensor_model_parallel_all_reduce(self.o_proj.product(out_TF))
        return out if self.o_proj.bias is None else out + self.o_proj.bias


class FoldedAttention(FamilyCall):
    """Takes the place of a family's attention module; keeps its rotation and norms. Tokens [T] of all sequences in a row.

    Under tensor parallelism a rank has its share of the query heads and of the stored heads; where there are fewer stored
    heads than ranks, several ranks store the same ones.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    k_a_proj: Any
    k_b_proj: Any
    k_u_proj: Any
    v_b_proj: Any

    def __init__(
        self, layer: AttentionLayer, spec: CacheSpec, old: nn.Module, stock: Any, target: str | None, vllm_config: Any
    ) -> None:
        super().__init__()
        self.layer, self.spec, self.owns = layer, spec, target is None
        ranks, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if layer.flat_norm and ranks > 1:
            raise PlanError("tensor_parallel_size: this family normalises all heads together; serve it with 1.")
        self.num_heads = layer.num_attention_heads // ranks
        self.groups = max(spec.num_kv_heads // ranks, 1)
        self.rotary_emb = in_halves(getattr(old, "rotary_emb", None)) if layer.rotary_dim else None
        if (size := getattr(self.rotary_emb, "head_size", layer.head_dim)) != layer.head_dim:
            raise PlanError(
                f"head_dim {layer.head_dim}: vLLM's model of this family takes heads of hidden_size / num_attention_heads"
                f" = {size} numbers, so that it cannot serve this checkpoint, folded or not."
            )
        self.q_norm, self.k_norm = getattr(old, "q_norm", None), getattr(old, "k_norm", None) if self.owns else None
        for norm in (self.q_norm, self.k_norm):
            for parameter in norm.parameters() if norm is not None else ():
                parameter.of_rank = whole
        shapes = tensor_shapes(layer, spec, owns=self.owns)
        parts = Parts(self.num_heads, self.rank * self.num_heads, self.groups, self.rank * spec.num_kv_heads // ranks)
        for name in PROJECTIONS:
            setattr(self, name, _Projection(name, shapes, parts, spec) if f"{name}.weight" in shapes else None)
        self.attn = self._paged(stock, max(spec.head_dim, spec.v_head_dim), target, vllm_config)

    def _paged(self, stock: Any, width: int, target: str | None, vllm_config: Any) -> Attention:
        """vLLM's own attention over its paged cache; stored heads are padded to a width that its kernel has."""
        cache = vllm_config.cache_config
        size = _kernel_width(width, cache.cache_dtype)
        if size * 2 != self.spec.head_dim + self.spec.v_head_dim and self.owns:
            LOGGER.warning_once(
                f"stored heads of {self.spec.head_dim} and {self.spec.v_head_dim} numbers take {size} each in this kernel's"
                " cache, which holds fewer tokens for it; kvfold compress --runtime vllm makes heads that need no padding."
            )
        options: dict[str, Any] = {}
        if (slopes := getattr(stock.impl, "alibi_slopes", None)) is not None:
            options["alibi_slopes"] = slopes.tolist()
        return Attention(
            self.num_heads,
            size,
            self.layer.scaling,
            num_kv_heads=self.groups,
            cache_config=cache,
            logits_soft_cap=self.layer.softcap,
            per_layer_sliding_window=window_of(self.layer, stock),
            prefix=stock.layer_name,
            kv_sharing_target_layer_name=target,
            **options,
        )

    def _attended(self, hidden_TD: Tensor, where: Any) -> Tensor:
        q = self._normed(self.q_proj(hidden_TD), self.q_norm)
        k = self._normed(self.k_proj(hidden_TD), self.k_norm) if self.owns else None
        if self.spec.rope == "applied":
            q, k = self._rotated(where, q, k)
        out = self.attn(self._padded(self._absorbed(q)), *self._stored(hidden_TD, k))
        out = out.unflatten(-1, (self.num_heads, -1))[..., : self.spec.v_head_dim]
        if self.v_b_proj is not None:
            out = torch.einsum("tnv,nhv->tnh", out, self._per_head(self.v_b_proj.weight))
        return self._summed(out.flatten(1))

    def _rotated(self, where: Any, q_TF: Tensor, k_TF: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries and keys of this rank, at the positions `where`; a layer that reads another one's cache has no keys."""
        if self.rotary_emb is None:
            return q_TF, k_TF
        if k_TF is None:
            return self.rotary_emb(where, q_TF, q_TF.clone())[0], None
        if not self.spec.k_partial:
            return self.rotary_emb(where, q_TF, k_TF)
        rotated = self.layer.rotary_dim  # this rotation wants whole heads, of which keys have only the part that turns
        keys = F.pad(k_TF.unflatten(-1, (-1, rotated)), (0, self.layer.head_dim - rotated))
        q, k = self.rotary_emb(where, q_TF, keys.flatten(1))
        return q, k.view_as(keys)[..., :rotated].flatten(1)

    def _normed(self, x_TF: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None or self.layer.flat_norm:
            return x_TF if norm is None else norm(x_TF)
        return norm(x_TF.unflatten(-1, (-1, self.layer.head_dim))).flatten(1)

    def _stored(self, hidden_TD: Tensor, k_TF: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What this layer adds to its cache, padded; nothing where it reads another one's."""
        if k_TF is None:
            return None, None
        z = k_TF.unflatten(-1, (self.groups, -1))
        if self.k_a_proj is not None:
            z = torch.einsum("tcf,crf->tcr", z, self.k_a_proj.weight)
        if self.k_u_proj is not None:
            z = z + self.k_u_proj(hidden_TD).unflatten(-1, (self.groups, -1))
        return self._padded(z), self._padded(self.v_proj(hidden_TD).unflatten(-1, (self.groups, -1)))

    def _absorbed(self, q_TF: Tensor) -> Tensor:
        """[T, N, R]: queries that meet stored keys."""
        q = q_TF.unflatten(-1, (self.num_heads, -1))
        if self.k_b_proj is None:
            return q
        return torch.einsum("tnh,nhr->tnr", q, self._per_head(self.k_b_proj.weight))

    def _per_head(self, weight_CFR: Tensor) -> Tensor:
        """[N, H, R] of this rank's query heads: each takes the rows of its key/value head."""
        rows = weight_CFR.unflatten(1, (-1, self.layer.head_dim)).flatten(0, 1)
        queries_per_row = self.layer.num_attention_heads // self.layer.num_kv_heads
        first = self.rank * self.num_heads // queries_per_row % len(rows)  # several ranks may share a group
        count = max(self.num_heads // queries_per_row, 1)
        return rows[first : first + count].repeat_interleave(self.num_heads // count, 0)

    def _padded(self, x_TCR: Tensor) -> Tensor:
        return F.pad(x_TCR, (0, self.attn.head_size - x_TCR.shape[-1])).flatten(1)


def window_of(layer: AttentionLayer, stock: Any) -> int | None:
    """As transformers has it: vLLM's Cohere 2 takes one token more."""
    return None if stock.sliding_window is None else layer.window


def in_halves(rotary_emb: Any) -> Any:
    """vLLM's rotation, or its twin that turns numbers i and i + r/2 of a head where the family's own turns neighbours: so
    are folded weights."""
    if getattr(rotary_emb, "is_neox_style", True):
        return rotary_emb
    if not hasattr(rotary_emb, "twin_in_halves"):  # all layers have the same one
        twin = copy.deepcopy(rotary_emb)
        for module in twin.modules():
            if hasattr(module, "is_neox_style"):
                module.is_neox_style = True
        object.__setattr__(rotary_emb, "twin_in_halves", twin)
    return rotary_emb.twin_in_halves


class TransformersFoldedAttention(FoldedAttention):
    """In models that vLLM takes from transformers: a batch of one row of tokens, cos and sin instead of positions."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """[1, T, D] -> ([1, T, D], no probabilities)."""
        return self._attended(hidden_states[0], kwargs.get("position_embeddings"))[None], None

    def _rotated(self, where: tuple[Tensor, Tensor], q_TF: Tensor, k_TF: Tensor | None) -> tuple[Tensor, Tensor | None]:
        def turned(x_TF: Tensor, heads: int) -> Tensor:
            return apply_rotary(x_TF.unflatten(-1, (heads, -1)).transpose(0, 1)[None], *where)[0].transpose(0, 1)

        where = own_tables(self.layer, where) or where
        q = turned(q_TF, self.num_heads).flatten(1)
        if k_TF is None:
            return q, None
        return q, turned(k_TF, self.groups * self.layer.num_kv_heads // self.spec.num_kv_heads).flatten(1)


class Parts(NamedTuple):
    """What one rank has: so many query heads, from the first one on, and so many stored heads."""

    num_heads: int
    first_head: int
    groups: int
    first_group: int


class _Projection(nn.Module):
    """One map of a layer, of which a rank has the rows and columns of its heads."""

    def __init__(self, name: str, shapes: Mapping[str, Shape], parts: Parts, spec: CacheSpec) -> None:
        super().__init__()
        self.weight = _parameter(shapes[f"{name}.weight"], parts, spec)
        bias = shapes.get(f"{name}.bias")
        self.bias = None if bias is None else _parameter(bias, parts, spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same with another bias, or none."""
        return F.linear(x, self.weight, bias)


def _parameter(axes: Shape, parts: Parts, spec: CacheSpec) -> nn.Parameter:
    """An empty one of a rank's size; `of_rank` cuts it out of the checkpoint's tensor."""
    cuts = [_share(axis, parts, spec) for axis in axes]
    sizes = [axis.size if cut is None else axis.size // cut[0] * cut[1] for axis, cut in zip(axes, cuts, strict=True)]
    parameter = nn.Parameter(torch.empty(*sizes), requires_grad=False)

    def of_rank(full: Tensor) -> Tensor:
        for place, cut in enumerate(cuts):
            if cut is not None:
                total, count, first = cut
                full = full.unflatten(place, (total, -1)).narrow(place, first, count).flatten(place, place + 1)
        return full

    parameter.of_rank = of_rank  # type: ignore[attr-defined]
    return parameter


def _share(axis: Axis, parts: Parts, spec: CacheSpec) -> tuple[int, int, int] | None:
    """(into how many pieces an axis falls, how many of them a rank has, from which on); None where it has the whole."""
    if axis.head_letter == "N":
        return axis.heads, parts.num_heads, parts.first_head
    if axis.head_letter:  # source heads go with the stored head that they are in
        return spec.num_kv_heads, parts.groups, parts.first_group
    return None


def whole(full: Tensor) -> Tensor:
    """What a process has of a tensor that is not cut."""
    return full


def _kernel_width(width: int, cache_dtype: str) -> int:
    """The least head size of this device's kernels that holds `width` numbers. Raises PlanError if none does."""
    exact = -(-width // 8) * 8
    for asked in (exact, USUAL_WIDTH):
        try:
            sizes = get_attn_backend(asked, torch.get_default_dtype(), cache_dtype).get_supported_head_sizes()
        except ValueError:  # no kernel takes it
            continue
        fitting = [size for size in sizes if size >= width] if sizes else [exact]
        if exact in fitting or (fitting and asked == USUAL_WIDTH):
            return min(fitting)
    raise PlanError(f"stored heads of {width} numbers are wider than this device's kernels have them.")
