"""What passes through one layer's attention, and the vectors whose moments are statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.attention import AttentionLayer
from kvfold.reference import alibi_slope, causal
from kvfold.runtime.attention import apply_rotary

KEYS_LOOKED_FROM = 16
"""Keys per sequence from whose positions queries are seen."""

NUMBERS_AT_ONCE = 2**22
"""Of queries that are turned at once."""

POOLED_ABOVE = 2**27
"""Numbers in one layer's moments of averaged values above which all heads share one moment instead of having their own."""


class Seen(NamedTuple):
    """q [B, N, T, H] and k [B, K, T, H] after rotation, v [B, K, T, H]; cos and sin [1 or B, T, r], None without rotation.

    k_gradient, v_gradient: of sampled labels' log-probabilities by k and v (`streaming.py`), where they are asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    k_gradient: Tensor | None = None
    v_gradient: Tensor | None = None

    def sequences(self) -> Iterator[Seen]:
        """One sequence after the other, each still with its batch dimension."""
        for b in range(len(self.q)):
            row = slice(b, b + 1)
            tables = (None if x is None else x[row] if len(x) > 1 else x for x in (self.cos, self.sin))
            yield Seen(self.q[row], self.k[row], self.v[row], *tables)

    def detached(self) -> Seen:
        """Without the graph that gradients need."""
        return self._replace(q=self.q.detach(), k=self.k.detach(), v=self.v.detach())


def _flat(x_BKTH: Tensor) -> Tensor:
    return x_BKTH.transpose(1, 2).flatten(2).flatten(0, 1)


def _per_kv_head(q_BNTH: Tensor, heads: int) -> Tensor:
    """[B * G * T, K, H]: every query head of a key/value head is one more vector of it."""
    return q_BNTH.unflatten(1, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 2)


def _unrotated(k_BKTH: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Keys before rotation. Rope scaling may also stretch cos and sin; that is undone as well."""
    if cos is None or sin is None:
        return k_BKTH
    stretch = cos.square() + sin.square()
    return apply_rotary(k_BKTH, cos / stretch, -sin / stretch)


VECTORS: dict[str, Callable[[Seen], Tensor]] = {
    "keys": lambda seen: _flat(seen.k),
    "keys_before_rotation": lambda seen: _flat(_unrotated(seen.k, seen.cos, seen.sin)),
    "values": lambda seen: _flat(seen.v),
    "queries": lambda seen: _per_kv_head(seen.q, seen.k.shape[1]),
    "queries_before_rotation": lambda seen: _per_kv_head(_unrotated(seen.q, seen.cos, seen.sin), seen.k.shape[1]),
}
"""Statistic -> the vectors [tokens, K*H] whose moment it is; `queries...` are [vectors, K, H], a moment per head."""


def _before_rotation(gradient_BKTH: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Gradients by keys before rotation: rotation is linear, and its transpose turns back."""
    return gradient_BKTH if cos is None or sin is None else apply_rotary(gradient_BKTH, cos, -sin)


GRADIENTS: dict[str, Callable[[Seen], Tensor]] = {
    "keys": lambda seen: _flat(_known(seen.k_gradient)),
    "keys_before_rotation": lambda seen: _flat(_before_rotation(_known(seen.k_gradient), seen.cos, seen.sin)),
    "values": lambda seen: _flat(_known(seen.v_gradient)),
}
"""Of VECTORS -> their gradients [tokens, K*H]."""


def _known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "gradients are seen on the way down only"
    return gradient


@dataclass(frozen=True)
class Attended:
    """One sequence with its attention, for statistics that ask where attention goes and what it brings.

    output_NHH: W_O^n.T W_O^n of every query head, in which errors of values count.
    """

    layer: AttentionLayer
    seen: Seen
    output_NHH: Tensor

    @cached_property
    def probs_NTS(self) -> Tensor:
        """Attention probabilities in float32."""
        layer, q_NTH, k_NSH = self.layer, self.seen.q[0].float(), self._per_query_head(self.seen.k)
        scores = q_NTH @ k_NSH.transpose(1, 2) * layer.scaling
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        if layer.alibi:
            slopes = [alibi_slope(n, len(scores)) for n in range(len(scores))]
            scores += torch.outer(torch.tensor(slopes), torch.arange(scores.shape[2])).to(scores)[:, None]
        seen_TS = causal(scores.shape[2], layer.window).to(scores.device)
        return scores.masked_fill_(~seen_TS, float("-inf")).softmax(-1)

    @cached_property
    def effect_NTS(self) -> Tensor:
        """p^2 |W_O (v_s - o_t)|^2: how far an error in the score of query t and key s moves the layer's output, squared.

        It is the diagonal of the second-order form: to first order the output moves by sum_s p_s (v_s - o) dscore_s.
        """
        v_NSH = self._per_query_head(self.seen.v)
        o_NTH = self.probs_NTS @ v_NSH
        weighed_NTH = o_NTH @ self.output_NHH
        apart = -2 * weighed_NTH @ v_NSH.transpose(1, 2)
        apart += (weighed_NTH * o_NTH).sum(-1)[:, :, None] + ((v_NSH @ self.output_NHH) * v_NSH).sum(-1)[:, None]
        return self.probs_NTS.square() * apart.clamp_min(0)

    def _per_query_head(self, x_BKSH: Tensor) -> Tensor:
        return x_BKSH[0].float().repeat_interleave(self.seen.q.shape[1] // x_BKSH.shape[1], dim=0)


def queries_that_matter(attended: Attended) -> Iterator[Tensor]:
    """Queries [G*T, K, H], each weighed by the effect of an error in its scores."""
    effect_NT = attended.effect_NTS.sum(2)
    yield _per_kv_head((attended.seen.q[0] * effect_NT.sqrt().unsqueeze(-1))[None], attended.seen.k.shape[1])


def queries_at_keys(attended: Attended) -> Iterator[Tensor]:
    """The same with queries turned as keys before rotation see them: for a key at s, q_t . R_s k = (R_-s q_t) . k."""
    q, k, _, cos, sin, *_ = attended.seen
    T = q.shape[2]
    positions = torch.arange(0, T, -(-T // KEYS_LOOKED_FROM), device=q.device)
    for part_s in positions.split(max(NUMBERS_AT_ONCE // q.numel(), 1)):
        from_key = q.expand(len(part_s), -1, -1, -1)
        if cos is not None and sin is not None:
            from_key = apply_rotary(from_key, cos[0, part_s, None], -sin[0, part_s, None])
        weight_sNT = attended.effect_NTS[:, :, part_s].movedim(2, 0).sqrt()
        yield _per_kv_head(from_key * weight_sNT.unsqueeze(-1), k.shape[1])


def averaged_values(attended: Attended) -> Iterator[Tensor]:
    """What attention makes of the layer's values: sum_s p_s v_s of all heads' values, for every query head [G*T, K, K*H].

    [G*T*K, 1, K*H] where moments per head would take too much memory (POOLED_ABOVE).
    """
    v_SF = _flat(attended.seen.v).float()
    K = attended.seen.k.shape[1]
    averaged_NTF = attended.probs_NTS @ v_SF
    pooled = K * v_SF.shape[1] ** 2 > POOLED_ABOVE
    for head_KTF in averaged_NTF.unflatten(0, (K, -1)).unbind(1):
        yield head_KTF.flatten(0, 1)[:, None] if pooled else head_KTF.transpose(0, 1)


EFFECTS: dict[str, Callable[[Attended], Iterator[Tensor]]] = {
    function.__name__: function for function in (queries_that_matter, queries_at_keys, averaged_values)
}
"""Statistic -> vectors [vectors, K, ...] whose moment it is, part by part; they need the attention of whole sequences."""
