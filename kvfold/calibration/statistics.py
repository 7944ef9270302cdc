"""What passes through one layer's attention, and the vectors whose moments are statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.runtimes.kernels.rotary import apply_rotary, slow_tables


class Seen(NamedTuple):
    """q [B, N, T, H] and k [B, K, T, H] after rotation, v [B, K, T, H]; cos and sin [1 or B, T, r], None without rotation;
    fast_pairs: as of the layer.

    k_gradient, v_gradient: of sampled labels' log-probabilities by k and v (`layerwise_model.py`), where they are asked for.
    recent_k, recent_v: the same numbers as queries see them that stand close by, where those are told apart: k and v are then
    what all other queries see, and so are the gradients. out [B, T, N*H]: what attention gives to the projection behind it,
    where its gradient is asked for. hidden [B, T, D]: the layer's input, where `out` is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    fast_pairs: int = 0
    k_gradient: Tensor | None = None
    v_gradient: Tensor | None = None
    recent_k: Tensor | None = None
    recent_v: Tensor | None = None
    recent_k_gradient: Tensor | None = None
    recent_v_gradient: Tensor | None = None
    out: Tensor | None = None
    out_gradient: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def differentiated(self) -> dict[str, Tensor]:
        """By what gradients are taken, with the name that each gets."""
        parts = {"k": self.k, "v": self.v, "recent_k": self.recent_k, "recent_v": self.recent_v, "out": self.out}
        return {f"{name}_gradient": part for name, part in parts.items() if part is not None}

    @property
    def of_recent(self) -> Seen:
        """With the gradients of queries that stand close by, or of all where they are not told apart."""
        if self.recent_k_gradient is None:
            return self
        return self._replace(k_gradient=self.recent_k_gradient, v_gradient=self.recent_v_gradient)

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin."""
        return self.cos, self.sin

    @property
    def slow_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Those that leave the fast pairs as they are."""
        if self.cos is None or self.sin is None:
            return self.cos, self.sin
        return slow_tables(self.cos, self.sin, self.fast_pairs)

    def detached(self) -> Seen:
        """Without the graph that gradients need."""
        left: dict[str, Any] = dict.fromkeys(("recent_k", "recent_v", "out"))
        hidden = None if self.hidden is None else self.hidden.detach()
        return self._replace(q=self.q.detach(), k=self.k.detach(), v=self.v.detach(), hidden=hidden, **left)


def _flat(x_BKTH: Tensor) -> Tensor:
    return x_BKTH.transpose(1, 2).flatten(2).flatten(0, 1)


def _side_by_side(k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    return torch.cat([_flat(k_BKTH), _flat(v_BKTH)], dim=1)


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
    "keys_before_rotation": lambda seen: _flat(_unrotated(seen.k, *seen.tables)),
    "banded_keys": lambda seen: _flat(_unrotated(seen.k, *seen.slow_tables)),
    "values": lambda seen: _flat(seen.v),
    "keys_and_values": lambda seen: _side_by_side(_unrotated(seen.k, *seen.tables), seen.v),
    "banded_keys_and_values": lambda seen: _side_by_side(_unrotated(seen.k, *seen.slow_tables), seen.v),
    "queries": lambda seen: _per_kv_head(seen.q, seen.k.shape[1]),
    "queries_before_rotation": lambda seen: _per_kv_head(_unrotated(seen.q, *seen.tables), seen.k.shape[1]),
}
"""Statistic -> the vectors [tokens, K*H] whose moment it is; `keys_and_values` [tokens, 2*K*H]: those before rotation, then
these; `banded...`: after rotation in the fast pairs, before it in the others; `queries...` are [vectors, K, H], a moment per
head."""


def _before_rotation(gradient_BKTH: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Gradients by keys before rotation: rotation is linear, and its transpose turns back."""
    return gradient_BKTH if cos is None or sin is None else apply_rotary(gradient_BKTH, cos, -sin)


GRADIENTS: dict[str, Callable[[Seen], Tensor]] = {
    "keys": lambda seen: _flat(_known(seen.k_gradient)),
    "keys_before_rotation": lambda seen: _flat(_before_rotation(_known(seen.k_gradient), *seen.tables)),
    "banded_keys": lambda seen: _flat(_before_rotation(_known(seen.k_gradient), *seen.slow_tables)),
    "values": lambda seen: _flat(_known(seen.v_gradient)),
    "keys_and_values": lambda seen: _side_by_side(
        _before_rotation(_known(seen.k_gradient), *seen.tables), _known(seen.v_gradient)
    ),
    "banded_keys_and_values": lambda seen: _side_by_side(
        _before_rotation(_known(seen.k_gradient), *seen.slow_tables), _known(seen.v_gradient)
    ),
}
"""Of VECTORS -> their gradients, as wide."""


def _known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "gradients are seen on the way down only"
    return gradient
