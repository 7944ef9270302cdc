"""Attention of one layer under vLLM: what is stored goes into its paged cache, queries meet it as it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.selector import get_attn_backend

from kvfold.attention import AttentionLayer
from kvfold.errors import PlanError
from kvfold.plan import CacheSpec


class FoldedAttention(nn.Module):
    """Takes the place of a family's attention module; keeps its rotation and norms.

    Under tensor parallelism a rank has its share of the query heads and of the stored heads; where there are fewer stored
    heads than ranks, several ranks store the same ones.
    """

    def __init__(
        self, layer: AttentionLayer, spec: CacheSpec, old: nn.Module, stock: Any, target: str | None, vllm_config: Any
    ) -> None:
        super().__init__()
        self.layer, self.spec, self.owns = layer, spec, target is None
        D, N, H, K = layer.hidden_size, layer.num_attention_heads, layer.head_dim, layer.num_kv_heads
        C, R, V = spec.num_kv_heads, spec.head_dim, spec.v_head_dim
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if N % ranks or (C % ranks and ranks % C):
            raise PlanError(f"{C} stored heads of layer {layer.index} cannot be shared by {ranks} ranks.")
        self.num_heads, self.groups = N // ranks, max(C // ranks, 1)
        first = rank * C // ranks
        self.rotary_emb = getattr(old, "rotary_emb", None)
        self.q_norm, self.k_norm = getattr(old, "q_norm", None), getattr(old, "k_norm", None)
        for norm in (self.q_norm, self.k_norm):
            for parameter in norm.parameters() if norm is not None else ():
                parameter.of_rank = _whole

        def heads(count: int, start: int, total: int, axis: int = 0) -> Callable[[Tensor], Tensor]:
            """Of a tensor with `total` heads along an axis, `count` from `start` on."""
            return lambda full: full.unflatten(axis, (total, -1)).narrow(axis, start, count).flatten(axis, axis + 1)

        absorbed = spec.rope == "none" and not spec.k_projection
        mine = heads(self.num_heads, rank * self.num_heads, N)
        self.q_proj = _Weights(self.num_heads * (R if absorbed else H), D, mine, bias=layer.qkv_bias)
        out_bias = layer.o_bias or spec.output_bias
        inner = H if spec.v_projection else V
        self.o_proj = _Weights(D, self.num_heads * inner, heads(self.num_heads, rank * self.num_heads, N, 1))
        self.o_bias = out_bias
        if out_bias:
            self.o_proj.bias = _parameter((D,), _whole)
        groups = heads(self.groups, first, C)
        t = K // C
        self.k_b_proj = _Stacked((self.groups, t * H, R), groups) if spec.k_projection else None
        self.v_b_proj = _Stacked((self.groups, t * H, V), groups) if spec.v_projection else None
        if self.owns:
            apart = spec.k_projection and spec.rope == "applied"
            width = layer.rotary_dim if spec.k_partial else H
            self.k_proj = _Weights(self.groups * (t * width if apart else R), D, groups, bias=layer.qkv_bias)
            self.k_a_proj = _Stacked((self.groups, R, t * width), groups) if apart else None
            self.k_u_proj = _Weights(self.groups * R, D, groups, bias=layer.qkv_bias) if spec.k_partial else None
            self.v_proj = _Weights(self.groups * V, D, groups, bias=layer.qkv_bias)
        self.attn = self._paged(stock, max(R, V), target, vllm_config)

    def _paged(self, stock: Any, width: int, target: str | None, vllm_config: Any) -> Attention:
        """vLLM's own attention over its paged cache; stored heads are padded to a width that its kernel has."""
        backend = get_attn_backend(64, torch.get_default_dtype(), vllm_config.cache_config.cache_dtype)
        sizes = backend.get_supported_head_sizes()
        fitting = [size for size in sizes if size >= width] if sizes else [-(-width // 8) * 8]
        if not fitting:
            raise PlanError(f"stored heads of {width} numbers are wider than vLLM's kernel has them ({max(sizes)}).")
        options: dict[str, Any] = {}
        if (slopes := getattr(stock.impl, "alibi_slopes", None)) is not None:
            options["alibi_slopes"] = slopes.tolist()
        return Attention(
            self.num_heads,
            min(fitting),
            self.layer.scaling,
            num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config,
            logits_soft_cap=self.layer.softcap,
            per_layer_sliding_window=stock.sliding_window,
            prefix=stock.layer_name,
            kv_sharing_target_layer_name=target,
            **options,
        )

    def forward(
        self,
        positions: Tensor | None = None,
        hidden_states: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """[tokens, D] -> [tokens, D]. Families differ in what they call positions."""
        assert hidden_states is not None, "every family hands over hidden states"
        q, k = self._rotated(position_ids if positions is None else positions, hidden_states)
        out = self.attn(self._padded(self._absorbed(q)), *self._stored(hidden_states, k))
        out = out.unflatten(-1, (self.num_heads, -1))[..., : self.spec.v_head_dim]
        if self.v_b_proj is not None:
            out = torch.einsum("tnv,nhv->tnh", out, self._per_head(self.v_b_proj.weight))
        out = tensor_model_parallel_all_reduce(F.linear(out.flatten(1), self.o_proj.weight))
        return out if self.o_proj.bias is None else out + self.o_proj.bias

    def _rotated(self, positions: Tensor | None, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries [T, N*H], and keys of this rank's groups as k_proj gives them, both normalised and rotated."""
        q = self._normed(self.q_proj(hidden_TD), self.q_norm)
        k = self._normed(self.k_proj(hidden_TD), self.k_norm) if self.owns else None
        if self.rotary_emb is not None and self.spec.rope == "applied":
            q, k = self.rotary_emb(positions, q, k if k is not None else q.clone())
            k = k if self.owns else None
        return q, k

    def _normed(self, x_TF: Tensor, norm: nn.Module | None) -> Tensor:
        return x_TF if norm is None else norm(x_TF.unflatten(-1, (-1, self.layer.head_dim))).flatten(1)

    def _stored(self, hidden_TD: Tensor, k: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What this layer adds to its cache, padded; nothing where it reads another one's."""
        if k is None:
            return None, None
        z = k.unflatten(-1, (self.groups, -1))
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
        per_rank = self.num_heads * self.layer.num_kv_heads // self.layer.num_attention_heads or 1
        if per_rank < len(rows):  # several ranks share a group
            start = get_tensor_model_parallel_rank() * per_rank % len(rows)
            rows = rows[start : start + per_rank]
        return rows.repeat_interleave(self.num_heads // len(rows), 0)

    def _padded(self, x_TCR: Tensor) -> Tensor:
        return F.pad(x_TCR, (0, self.attn.head_size - x_TCR.shape[-1])).flatten(1)


class _Weights(nn.Module):
    """A linear map, of which a rank has a part."""

    def __init__(self, rows: int, columns: int, of_rank: Callable[[Tensor], Tensor], *, bias: bool = False) -> None:
        super().__init__()
        self.weight = _parameter((rows, columns), of_rank)
        self.bias = _parameter((rows,), of_rank) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Stacked(nn.Module):
    """One matrix per stored head."""

    def __init__(self, shape: tuple[int, ...], of_rank: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = _parameter(shape, of_rank)


def _parameter(shape: tuple[int, ...], of_rank: Callable[[Tensor], Tensor]) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape), requires_grad=False)
    parameter.of_rank = of_rank  # type: ignore[attr-defined]
    return parameter


def _whole(full: Tensor) -> Tensor:
    return full
