"""svd_w: low-rank key/value heads by SVD of the projection weights, the data-free baseline of arXiv 2406.07056."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kvfold.linalg.reduced_rank import Term
from kvfold.methods.low_rank import LowRankWidth
from kvfold.methods.width.base import LayerGroup
from kvfold.plan.layer import AttentionLayer, AttentionWeights


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdW(LowRankWidth):
    """The left singular vectors of the concatenated W_K and W_V: svd_a as if every input x had E[x x^T] = I.

    A bias b is one more column of the weight (an input that is always 1). Where the family normalises each key head, so
    does this: by the head's expected RMS under the same assumption, then by the norm's weight. Layers that share a cache
    are taken to have the same input.
    """

    def key_term(self, group: LayerGroup, position: int) -> Term:
        own, owner = (_keys(group.layers[i], group.weights(i)) for i in (position, 0))
        return Term(own @ own.T, own @ owner.T)

    def value_term(self, group: LayerGroup, position: int) -> Term:
        own, owner = (_with_bias(w.v_proj, w.v_bias) for w in (group.weights(position), group.weights(0)))
        return Term(own @ own.T, own @ owner.T)


def _keys(layer: AttentionLayer, weights: AttentionWeights) -> Tensor:
    """[K*H, D + 1]: the map from an input to the keys."""
    keys = _with_bias(weights.k_proj, weights.k_bias)
    if weights.k_norm is None:
        return keys
    heads = 1 if layer.flat_norm else layer.num_kv_heads
    if layer.centred_norm:
        per_head = keys.unflatten(0, (heads, -1))
        keys = (per_head - per_head.mean(1, keepdim=True)).flatten(0, 1)
    rms = keys.square().sum(1).unflatten(0, (heads, -1)).mean(1).clamp_min(1e-30).sqrt()
    scales = (weights.k_norm.double() + layer.norm_offset).unflatten(0, (heads if layer.own_norms else 1, -1))
    keys = keys * ((1 / rms)[:, None] * scales).flatten()[:, None]
    if weights.k_norm_bias is not None:
        keys[:, -1] += weights.k_norm_bias.double().repeat(heads)
    return keys


def _with_bias(weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    bias_F = weight_FD.new_zeros(weight_FD.shape[0]) if bias_F is None else bias_F
    return torch.cat([weight_FD, bias_F[:, None]], dim=1).double()
