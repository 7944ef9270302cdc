"""The oracle: attention of any plan, head by head, in plain PyTorch, without a cache.

Slow and obvious on purpose. Tests compare every runtime with it. It never builds on runtime code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.number_format import NumberFormat

NORM_EPS = 1e-6


def rotate(x_TH: Tensor, cos_Tr: Tensor | None, sin_Tr: Tensor | None) -> Tensor:
    """RoPE in the half-split form: numbers i and i + r/2 of one head are a pair that turns by the angle of i."""
    if cos_Tr is None or sin_Tr is None:
        return x_TH
    half = cos_Tr.shape[-1] // 2
    first, second = x_TH[:, :half], x_TH[:, half : 2 * half]
    turned_first = first * cos_Tr[:, :half] - second * sin_Tr[:, :half]
    turned_second = second * cos_Tr[:, half:] + first * sin_Tr[:, half:]
    return torch.cat([turned_first, turned_second, x_TH[:, 2 * half :]], dim=1)


def _of_pairs(
    cos_Tr: Tensor | None, sin_Tr: Tensor | None, first: int, end: int
) -> tuple[Tensor | None, Tensor | None]:
    """Tables that turn some pairs and leave the others as they are."""
    if cos_Tr is None or sin_Tr is None:
        return None, None
    cos_Tr, sin_Tr, half = cos_Tr.clone(), sin_Tr.clone(), cos_Tr.shape[1] // 2
    for i in range(half):
        if not first <= i < end:
            cos_Tr[:, [i, half + i]], sin_Tr[:, [i, half + i]] = 1.0, 0.0
    return cos_Tr, sin_Tr


def causal(tokens: int, window: int | None = None) -> Tensor:
    """[T, S] bool: which of S = T tokens each query sees."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def made_heads(
    layer: AttentionLayer, weights: AttentionWeights | FoldedWeights, side: str, x_TD: Tensor, width: int | None
) -> list[Tensor]:
    """Queries (side q) or keys (k) as heads of `width` numbers (None: as many heads as there are query heads), after a norm
    over each or over all of a token."""
    projection, bias, norm, norm_bias = (
        getattr(weights, side + part) for part in ("_proj", "_bias", "_norm", "_norm_bias")
    )
    x_TF = _linear(x_TD, projection, bias)
    width = width or x_TF.shape[1] // layer.num_attention_heads
    if norm is None:
        return list(x_TF.split(width, dim=1))
    norm = norm + layer.norm_offset
    if layer.flat_norm:
        return list(_normalise(x_TF, norm).split(width, dim=1))
    heads = list(x_TF.split(width, dim=1))
    if layer.centred_norm:
        heads = [head - head.mean(-1, keepdim=True) for head in heads]
    of_heads = norm.split(width) if layer.own_norms else [norm] * len(heads)
    normalised = [_normalise(head, own) for head, own in zip(heads, of_heads, strict=True)]
    return normalised if norm_bias is None else [head + norm_bias for head in normalised]


def tempered(layer: AttentionLayer, q_TH: Tensor) -> Tensor:
    """Queries of a whole sequence as they meet keys, token by token."""
    if layer.temperature is None:
        return q_TH
    scale, floor = layer.temperature
    factors = [1 + scale * math.log(1 + (t + 1) // floor) for t in range(len(q_TH))]
    return q_TH * torch.tensor(factors).to(q_TH)[:, None]


def _normalise(x_TF: Tensor, weight_F: Tensor, eps: float = NORM_EPS) -> Tensor:
    return weight_F * x_TF * (x_TF.square().mean(-1, keepdim=True) + eps).rsqrt()


def attention(
    layer: AttentionLayer,
    weights: AttentionWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor | None,
    sin_Tr: Tensor | None,
    seen_TS: Tensor,
) -> Tensor:
    """The original layer's attention output [T, D] for one sequence."""
    H = layer.head_dim
    queries = made_heads(layer, weights, "q", hidden_TD, H)
    keys = made_heads(layer, weights, "k", hidden_TD, H)
    values = _linear(hidden_TD, weights.v_proj, weights.v_bias).split(H, dim=1)
    keys = [rotate(k, cos_Tr, sin_Tr) for k in keys]
    heads = []
    for n, q_TH in enumerate(queries):
        kv = n * layer.num_kv_heads // layer.num_attention_heads
        q_TH = tempered(layer, rotate(q_TH, cos_Tr, sin_Tr))
        heads.append(_attend(layer, n, q_TH, keys[kv], values[kv], seen_TS, weights.sinks))
    return _linear(torch.cat(heads, dim=1), weights.o_proj, weights.o_bias)


def stored(
    layer: AttentionLayer,
    spec: CacheSpec,
    weights: FoldedWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor | None,
    sin_Tr: Tensor | None,
    known_TP: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the owner of a cache makes of one sequence: key heads [T, E] and value heads [T, G], of which the first R and V
    are stored for all tokens (E = R and G = V without recent ones), the last for the newest. known_TP: what caches give back
    that predict this one, of all tokens and then in the form of recent ones."""
    assert weights.k_proj is not None, "a reader stores nothing"
    width = spec.made_widths[0] if weights.k_a_proj is None else layer.rotary_dim if spec.k_partial else layer.head_dim
    keys = made_heads(layer, weights, "k", hidden_TD, width)
    if spec.rope == "applied":
        keys = [rotate(k, cos_Tr, sin_Tr) for k in keys]
    if spec.fast_pairs:
        keys = [rotate(k, *_of_pairs(cos_Tr, sin_Tr, 0, spec.fast_pairs)) for k in keys]
    values: Sequence[Tensor] = ()
    if weights.v_proj is not None:
        values = _linear(hidden_TD, weights.v_proj, weights.v_bias).split(spec.made_widths[1], dim=1)
    if spec.hidden:
        heads = _linear(hidden_TD, weights.v_proj, weights.v_bias).split(layer.head_dim, dim=1)
        values = _grouped(spec.num_v_heads, list(heads), weights.v_a_proj)
        values = _with_networks(weights, "v_a", list(heads), values)
    latents = _stored_keys(spec, weights, keys)
    if weights.k_a_bias is not None:
        latents = [latent + bias for latent, bias in zip(latents, weights.k_a_bias, strict=True)]
    if spec.hidden:
        latents = _with_networks(weights, "k_a", keys, latents)
    if weights.k_u_proj is not None:
        others = _linear(hidden_TD, weights.k_u_proj, weights.k_u_bias).split(spec.head_dim, dim=1)
        latents = [rotated + other for rotated, other in zip(latents, others, strict=True)]
    if spec.shared_latent:
        if values:
            latents = [latent + value for latent, value in zip(latents, values, strict=True)]
        if known_TP is not None:
            latents = [latents[0] - _linear(known_TP, weights.k_p_proj, None)]
        return latents, latents
    return latents, list(values)


def stays(spec: CacheSpec, head: int, tokens: int) -> Tensor:
    """[T, S] bool: which of S = T tokens a stored head still has when each query comes, and its own."""
    stay_TS = torch.ones(tokens, tokens, dtype=torch.bool)
    if spec.tokens is not None:
        run = next(run for run in spec.tokens.runs if head in run.heads)
        for t in range(tokens):
            kept = min(t + 1, max(run.least, math.ceil(run.share * (t + 1))))
            newest = kept - spec.tokens.sinks
            stay_TS[t, spec.tokens.sinks : max(t + 1 - newest, spec.tokens.sinks)] = False
    return stay_TS


def folded_attention(
    layer: AttentionLayer,
    spec: CacheSpec,
    weights: FoldedWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor | None,
    sin_Tr: Tensor | None,
    seen_TS: Tensor,
    cache: tuple[list[Tensor], list[Tensor]],
    is_reader: bool = False,
) -> Tensor:
    """The folded layer's attention output [T, D] for one sequence: score = q . B z, z = A kappa.

    `cache` is what the layer itself stored, or (`is_reader`) the owner whose cache it reads; behind that what caches give
    back that predict it.
    """
    H, K, N = layer.head_dim, layer.num_kv_heads, layer.num_attention_heads
    stored_keys, stored_values = cache
    queries = made_heads(layer, weights, "q", hidden_TD, None)
    heads = []
    for n, q_TH in enumerate(queries):
        kv = n * K // N
        c, u = kv * spec.num_kv_heads // K, kv * spec.num_v_heads // K
        q_TH = tempered(layer, rotate(q_TH, cos_Tr, sin_Tr))
        k_SH = stored_keys[c]
        if weights.k_b_proj is not None:
            k_SH = k_SH @ weights.k_b_proj[c].split(H, dim=0)[kv % (K // spec.num_kv_heads)].T
        if spec.hidden:
            k_SH = k_SH + _network(weights, "k_b", c, stored_keys[c]).split(H, dim=1)[kv % (K // spec.num_kv_heads)]
        if weights.k_b_bias is not None:
            k_SH = k_SH + weights.k_b_bias[c].split(H)[kv % (K // spec.num_kv_heads)]
        if spec.rope == "on_read" and (spec.readers_rotate or not is_reader):
            k_SH = rotate(k_SH, *_of_pairs(cos_Tr, sin_Tr, spec.fast_pairs, layer.head_dim))
        if spec.hidden:
            assert weights.v_b_proj is not None, "networks stand beside linear ways"
            whole = stored_values[u] @ weights.v_b_proj[u].T + _network(weights, "v_b", u, stored_values[u])
            v_SH = whole.split(H, dim=1)[kv % (K // spec.num_v_heads)]
            heads.append(_attend(layer, n, q_TH, k_SH, v_SH, seen_TS, weights.sinks))
            continue
        seen = seen_TS & stays(spec, c, len(q_TH))
        head = _attend(layer, n, q_TH, k_SH, stored_values[u], seen, weights.sinks)
        if weights.v_b_proj is not None:
            head = head @ weights.v_b_proj[u].split(H, dim=0)[kv % (K // spec.num_v_heads)].T
        heads.append(head)
    return _linear(torch.cat(heads, dim=1), weights.o_proj, weights.o_bias)


def folded_attention_by_age(
    layer: AttentionLayer,
    spec: CacheSpec,
    weights: FoldedWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor | None,
    sin_Tr: Tensor | None,
    seen_TS: Tensor,
    far: tuple[list[Tensor], list[Tensor]],
    near: tuple[list[Tensor], list[Tensor]],
) -> Tensor:
    """The same where the newest `recent` tokens are seen in another form: query by query, over a cache mixed for it."""
    pad, rows = torch.nn.functional.pad, []
    for t in range(len(hidden_TD)):
        fine_S1 = (t - torch.arange(len(hidden_TD)) < spec.recent)[:, None]
        mixed = [
            [
                torch.where(fine_S1, pad(new, (width - new.shape[1], 0)), pad(old, (0, width - old.shape[1])))
                for old, new in zip(*heads, strict=True)
            ]
            for width, *heads in zip(spec.read_widths, far, near, strict=True)
        ]
        cache = (mixed[0], mixed[1])
        rows.append(folded_attention(layer, spec, weights, hidden_TD, cos_Tr, sin_Tr, seen_TS, cache)[t])
    return torch.stack(rows)


def joint_attention(
    layer: AttentionLayer,
    weights: FoldedWeights,
    hidden_TD: Tensor,
    cos_Tr: Tensor | None,
    sin_Tr: Tensor | None,
    past: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A joint layer's output [T, D] for T new tokens after the latents `past` ([S, R], [S, V]), and its share of theirs."""
    H, K, N = layer.head_dim, layer.num_kv_heads, layer.num_attention_heads
    assert weights.k_a_proj is not None and weights.k_b_proj is not None, (
        "joint layers have a way to the latents and back"
    )
    assert weights.v_a_proj is not None and weights.v_b_proj is not None, "the same for values"
    keys = made_heads(layer, weights, "k", hidden_TD, H)
    keys = [rotate(k, cos_Tr, sin_Tr) for k in keys]
    values = _linear(hidden_TD, weights.v_proj, weights.v_bias).split(H, dim=1)
    past_keys = (past[0] @ weights.k_b_proj[0].T).split(H, dim=1)
    past_values = (past[1] @ weights.v_b_proj[0].T).split(H, dim=1)
    S, T = len(past[0]), len(hidden_TD)
    seen_TS = torch.cat([torch.ones(T, S, dtype=torch.bool), causal(T)], dim=1)
    heads = []
    queries = made_heads(layer, weights, "q", hidden_TD, H)
    for n, q_TH in enumerate(queries):
        kv = n * K // N
        q_TH = tempered(layer, rotate(q_TH, cos_Tr, sin_Tr))
        k_SH, v_SH = torch.cat([past_keys[kv], keys[kv]]), torch.cat([past_values[kv], values[kv]])
        heads.append(_attend(layer, n, q_TH, k_SH, v_SH, seen_TS, weights.sinks))
    share = torch.cat(keys, dim=1) @ weights.k_a_proj[0].T, torch.cat(list(values), dim=1) @ weights.v_a_proj[0].T
    return _linear(torch.cat(heads, dim=1), weights.o_proj, weights.o_bias), share


def _stored_keys(spec: CacheSpec, weights: FoldedWeights, keys: list[Tensor]) -> list[Tensor]:
    return keys if weights.k_a_proj is None else _grouped(spec.num_kv_heads, keys, weights.k_a_proj)


def _grouped(groups: int, heads: list[Tensor], a_CRF: Tensor | None) -> list[Tensor]:
    """Latents of neighbouring heads."""
    assert a_CRF is not None, "there is a way to the latents"
    t = len(heads) // groups
    return [torch.cat(heads[c * t : (c + 1) * t], dim=1) @ a_CRF[c].T for c in range(groups)]


def _with_networks(weights: FoldedWeights, way: str, heads: list[Tensor], latents: list[Tensor]) -> list[Tensor]:
    t = len(heads) // len(latents)
    groups = [torch.cat(heads[c * t : (c + 1) * t], dim=1) for c in range(len(latents))]
    return [latent + _network(weights, way, c, x) for c, (latent, x) in enumerate(zip(latents, groups, strict=True))]


def _network(weights: FoldedWeights, way: str, group: int, x_TF: Tensor) -> Tensor:
    up, bias, down = (getattr(weights, f"{way}_{part}")[group] for part in ("up_proj", "up_bias", "down_proj"))
    inner = x_TF @ up.T + bias
    return inner * (1 + torch.erf(inner / math.sqrt(2))) / 2 @ down.T


def decoded(rows_SX: Tensor, format: NumberFormat) -> Tensor:
    """Stored bytes of one head as numbers [tokens, width], one number at a time (docs/format.md)."""
    return torch.tensor(
        [token for row in rows_SX.tolist() for token in format.codec.read_row(row, format)], dtype=torch.float64
    )


def alibi_slope(head: int, heads: int) -> float:
    """ALiBi's slope of a head (arXiv 2108.12409): 2^(-8 i / n) for n a power of two, the rest from twice as many."""
    power = 2 ** math.floor(math.log2(heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-4 * (2 * (head - power) + 1) / power)


def _attend(
    layer: AttentionLayer,
    head: int,
    q_TR: Tensor,
    z_SR: Tensor,
    y_SV: Tensor,
    seen_TS: Tensor,
    sinks_N: Tensor | None = None,
) -> Tensor:
    scores = q_TR @ z_SR.T * layer.scaling
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if layer.alibi:
        scores = scores + alibi_slope(head, layer.num_attention_heads) * torch.arange(len(z_SR)).to(scores)
    scores = scores.masked_fill(~seen_TS, float("-inf"))
    if sinks_N is not None:  # as if a token in front of all had this score, and a value of zeros
        sink_T1 = sinks_N[head].expand(len(q_TR), 1).to(scores)
        scores, y_SV = torch.cat([sink_T1, scores], dim=1), torch.cat([torch.zeros_like(y_SV[:1]), y_SV])
    return scores.softmax(-1) @ y_SV


def _linear(x_TD: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None, "this layer has no such projection"
    out = x_TD @ weight.T
    return out if bias is None else out + bias
