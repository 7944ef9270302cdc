"""svd_w: low-rank key/value heads by SVD of the projection weights, the data-free baseline of arXiv 2406.07056."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from kvfold.attention import AttentionLayer, AttentionWeights
from kvfold.linalg import Moment
from kvfold.lowrank import LowRankWidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdW(LowRankWidth):
    """The left singular vectors of the concatenated W_K and W_V: svd_a as if every input x had E[x x^T] = I.

    A bias b is one more column of the weight (an input that is always 1). Where the family normalises each key head, so
    does this: by the head's expected RMS under the same assumption, then by the norm's weight.
    """

    def key_moment(self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment]) -> Tensor:
        moment = _gram(weights.k_proj, weights.k_bias)
        if weights.k_norm is None:
            return moment
        rms_K = moment.diagonal().unflatten(0, (layer.num_kv_heads, -1)).mean(1).clamp_min(1e-30).sqrt()
        scale = torch.outer(1 / rms_K, weights.k_norm.double()).flatten()
        return moment * torch.outer(scale, scale)

    def value_moment(self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment]) -> Tensor:
        return _gram(weights.v_proj, weights.v_bias)


def _gram(weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    weight_FD = weight_FD.double()
    gram = weight_FD @ weight_FD.T
    return gram if bias_F is None else gram + torch.outer(bias_F.double(), bias_F.double())
