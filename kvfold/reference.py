"""The oracle: attention of any plan, head by head, in plain PyTorch, without a cache.

Slow and obvious on purpose. Tests compare every runtime with it. It never builds on runtime code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.attention import AttentionLayer, AttentionWeights, FoldedWeights
from kvfold.plan import CacheSpec

NORM_EPS = 1e-6


def rotate(x_TH: Tensor, cos_Tr: Tensor, sin_Tr: Tensor) -> Tensor:
    """RoPE in the half-split form: numbers i and i + r/2 of one head are a pair that turns by the angle of i."""
    half = cos_Tr.shape[-1] // 2
    first, second = x_TH[:, :half], x_TH[:, half : 2 * half]
    turned_first = first * cos_Tr[:, :half] - second * sin_Tr[:, :half]
    turned_second = second * cos_Tr[:, half:] + first * sin_Tr[:, half:]
    return torch.cat([turned_first, turned_second, x_TH[:, 2 * half :]], dim=1)


def causal(tokens: int, window: int | None = None) -> Tensor:
    """[T, S] bool: which of S = T tokens each query sees."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def normalise(x_TH: Tensor, weight_H: Tensor | None, eps: float = NORM_EPS) -> Tensor:
    """RMSNorm over one head, or nothing."""
    if weight_H is None:
        return x_TH
    return weight_H * x_TH * (x_TH.square().mean(-1, keepdim=True) + eps).rsqrt()


def attention(
    layer: AttentionLayer, weights: AttentionWeights, hidden_TD: Tensor, cos_Tr: Tensor, sin_Tr: Tensor, seen_TS: Tensor
) -> Tensor:
    """The original layer's attention output [T, D] for one sequence."""
    H = layer.head_dim
    queries = _linear(hidden_TD, weights.q_proj, weights.q_bias).split(H, dim=1)
    keys = _linear(hidden_TD, weights.k_proj, weights.k_bias).split(H, dim=1)
    values = _linear(hidden_TD, weights.v_proj, weights.v_bias).split(H, dim=1)
    keys = [rotate(normalise(k, weights.k_norm), cos_Tr, sin_Tr) for k in keys]
    heads = []
    for n, q_TH in enumerate(queries):
        kv = n * layer.num_kv_heads // layer.num_attention_heads
        q_TH = rotate(normalise(q_TH, weights.q_norm), cos_Tr, sin_Tr)
        heads.append(_attend(q_TH, keys[kv], values[kv], seen_TS, layer.scaling))
    return _linear(torch.cat(heads, dim=1), weights.o_proj, weights.o_bias)


def stored(
    layer: AttentionLayer,
    spec: CacheSpec,
    weights: FoldedWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the owner of a cache stores of one sequence: key heads [T, R] and value heads [T, V]."""
    assert weights.k_proj is not None and weights.v_proj is not None, "a reader stores nothing"
    keys = _linear(hidden_TD, weights.k_proj, weights.k_bias).split(layer.head_dim, dim=1)
    keys = [normalise(k, weights.k_norm) for k in keys]
    if spec.rope == "applied":
        keys = [rotate(k, cos_Tr, sin_Tr) for k in keys]
    values = _linear(hidden_TD, weights.v_proj, weights.v_bias).split(spec.v_head_dim, dim=1)
    return _stored_keys(spec, weights, keys), list(values)


def folded_attention(
    layer: AttentionLayer,
    spec: CacheSpec,
    weights: FoldedWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    seen_TS: Tensor,
    cache: tuple[list[Tensor], list[Tensor]],
    is_reader: bool = False,
) -> Tensor:
    """The folded layer's attention output [T, D] for one sequence: score = q . B z, z = A kappa.

    `cache` is what the layer itself stored, or (`is_reader`) the owner whose cache it reads.
    """
    H, K, N = layer.head_dim, layer.num_kv_heads, layer.num_attention_heads
    stored_keys, stored_values = cache
    queries = _linear(hidden_TD, weights.q_proj, weights.q_bias).split(H, dim=1)
    heads = []
    for n, q_TH in enumerate(queries):
        kv = n * K // N
        c, u = kv * spec.num_kv_heads // K, kv * spec.num_v_heads // K
        q_TH = rotate(normalise(q_TH, weights.q_norm), cos_Tr, sin_Tr)
        k_SH = stored_keys[c]
        if weights.k_b_proj is not None:
            k_SH = k_SH @ weights.k_b_proj[c].split(H, dim=0)[kv % (K // spec.num_kv_heads)].T
        if spec.rope == "on_read" and (spec.readers_rotate or not is_reader):
            k_SH = rotate(k_SH, cos_Tr, sin_Tr)
        head = _attend(q_TH, k_SH, stored_values[u], seen_TS, layer.scaling)
        if weights.v_b_proj is not None:
            head = head @ weights.v_b_proj[u].split(H, dim=0)[kv % (K // spec.num_v_heads)].T
        heads.append(head)
    return _linear(torch.cat(heads, dim=1), weights.o_proj, weights.o_bias)


def joint_attention(
    layer: AttentionLayer,
    weights: FoldedWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    past: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A joint layer's output [T, D] for T new tokens after the latents `past` ([S, R], [S, V]), and its share of theirs."""
    H, K, N = layer.head_dim, layer.num_kv_heads, layer.num_attention_heads
    assert weights.k_a_proj is not None and weights.k_b_proj is not None, (
        "joint layers have a way to the latents and back"
    )
    assert weights.v_a_proj is not None and weights.v_b_proj is not None, "the same for values"
    keys = _linear(hidden_TD, weights.k_proj, weights.k_bias).split(H, dim=1)
    keys = [rotate(normalise(k, weights.k_norm), cos_Tr, sin_Tr) for k in keys]
    values = _linear(hidden_TD, weights.v_proj, weights.v_bias).split(H, dim=1)
    past_keys = (past[0] @ weights.k_b_proj[0].T).split(H, dim=1)
    past_values = (past[1] @ weights.v_b_proj[0].T).split(H, dim=1)
    S, T = len(past[0]), len(hidden_TD)
    seen_TS = torch.cat([torch.ones(T, S, dtype=torch.bool), causal(T)], dim=1)
    heads = []
    for n, q_TH in enumerate(_linear(hidden_TD, weights.q_proj, weights.q_bias).split(H, dim=1)):
        kv = n * K // N
        q_TH = rotate(normalise(q_TH, weights.q_norm), cos_Tr, sin_Tr)
        k_SH, v_SH = torch.cat([past_keys[kv], keys[kv]]), torch.cat([past_values[kv], values[kv]])
        heads.append(_attend(q_TH, k_SH, v_SH, seen_TS, layer.scaling))
    share = torch.cat(keys, dim=1) @ weights.k_a_proj[0].T, torch.cat(list(values), dim=1) @ weights.v_a_proj[0].T
    return _linear(torch.cat(heads, dim=1), weights.o_proj, weights.o_bias), share


def _stored_keys(spec: CacheSpec, weights: FoldedWeights, keys: list[Tensor]) -> list[Tensor]:
    if weights.k_a_proj is None:
        return keys
    t = len(keys) // spec.num_kv_heads
    groups = [torch.cat(keys[c * t : (c + 1) * t], dim=1) for c in range(spec.num_kv_heads)]
    return [kappa @ weights.k_a_proj[c].T for c, kappa in enumerate(groups)]


def _attend(q_TR: Tensor, z_SR: Tensor, y_SV: Tensor, seen_TS: Tensor, scaling: float) -> Tensor:
    scores = (q_TR @ z_SR.T * scaling).masked_fill(~seen_TS, float("-inf"))
    return scores.softmax(-1) @ y_SV


def _linear(x_TD: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None, "this layer has no such projection"
    out = x_TD @ weight.T
    return out if bias is None else out + bias
