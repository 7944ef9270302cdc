"""procrustes: heads are aligned before they are merged, in ways that leave an ordinary grouped-query checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.reduced_rank import Term, solve
from kvfold.methods.low_rank import fuse_keys, lead_values_back, store_values, value_metric
from kvfold.methods.width._head_grouping import GROUPINGS, best_order, head_columns, reordered_weights
from kvfold.methods.width.base import LayerGroup, WidthMethod, plain_spec
from kvfold.plan.cache_spec import CacheSpec, divisors
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape

SWEEPS = 20
"""Of alternating alignment; it settles long before."""

Pair = tuple[Tensor, Tensor]
"""A [R, F] and B [F, R] of one group of heads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Procrustes(WidthMethod):
    """RoPE commutes with a rotation of each frequency pair, so that keys and queries may be turned there for free; values and
    outputs by any map (arXiv 2412.20677).

    merge: `align` is the paper's: orthogonal maps, then the mean. `svd` keeps, per frequency pair, the leading complex
        direction of the group's heads weighed by the energy of their queries, and of values the leading directions weighed
        by W_O: the best that ordinary weights can hold.
    grouping: `neighbours`, or `similar`, which puts heads together that merge with least loss (heads are reordered, but
        not with ALiBi, which goes by head).
    kv_heads: stored heads per layer; 0 leaves the choice to the budget.

    Families with a norm on keys keep the plain mean of their heads' keys, since nothing passes a norm.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries", "values"})

    merge: str = "svd"
    grouping: str = "neighbours"
    kv_heads: int = 0

    def __post_init__(self) -> None:
        for name, known in (("merge", ("svd", "align")), ("grouping", GROUPINGS)):
            if getattr(self, name) not in known:
                raise RecipeError(f"width.{name} = {getattr(self, name)!r}; choose one of {', '.join(known)}.")

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        if layers > 1:
            raise RecipeError(
                "width method 'procrustes' does not span layers; use mean_pool or logit with a depth method."
            )
        if layer.norms_tell_heads_apart:
            norm = (
                "a norm over all heads of a token leaves"
                if layer.flat_norm
                else "norms that heads have of their own leave"
            )
            raise RecipeError(f"{norm} no ordinary grouped-query form; use svd_a or logit.")
        heads = divisors(layer.num_kv_heads)
        if self.kv_heads and self.kv_heads not in heads:
            raise RecipeError(
                f"width.kv_heads = {self.kv_heads} does not divide {layer.num_kv_heads}; choose one of {heads}."
            )
        return [StoredShape(count, layer.head_dim) for count in ([self.kv_heads] if self.kv_heads else heads)]

    value_shapes = key_shapes

    def key_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return [self._distortion(group, shape.num_heads, "keys") for shape in shapes]

    def value_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return [self._distortion(group, shape.num_heads, "values") for shape in shapes]

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        heads = min(keys.num_heads, values.num_heads)  # one number of heads, as ordinary checkpoints have
        keys, values = keys._replace(num_heads=heads), values._replace(num_heads=heads)
        return plain_spec(layer, keys, values)

    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        layer, order = group.owner, self._order(group, spec.num_kv_heads)
        weights = reordered_weights(layer, group.weights(0), order)
        keys, values = (self._pairs(group, order, spec.num_kv_heads, side) for side in ("keys", "values"))
        folded = FoldedWeights.of(
            weights, k_a_proj=torch.stack([a for a, _ in keys]), k_b_proj=torch.stack([b for _, b in keys])
        )
        folded = fuse_keys(layer, folded, spec)
        folded = store_values(folded, torch.stack([a for a, _ in values]))
        yield lead_values_back(layer, folded, torch.stack([b for _, b in values]), apart=spec.v_projection)

    def _order(self, group: LayerGroup, heads: int) -> list[int]:
        """Key/value heads, group after group."""
        K = group.owner.num_kv_heads
        if self.grouping == "neighbours" or group.owner.alibi or heads in (1, K):
            return list(range(K))
        return best_order(K, heads, lambda members: self._loss_of(group, list(members)))

    def _loss_of(self, group: LayerGroup, members: list[int]) -> float:
        """Share of keys and values that merging these heads loses."""
        lost = 0.0
        for side in ("keys", "values"):
            second, metric = _objective(group, members, side)
            lost += _lost(second, metric, self._merged(group.owner, second, metric, side))
        return lost

    def _pairs(self, group: LayerGroup, order: list[int], heads: int, side: str) -> list[Pair]:
        size = len(order) // heads
        members = [order[i : i + size] for i in range(0, len(order), size)]
        return [self._merged(group.owner, *_objective(group, heads_of, side), side) for heads_of in members]

    def _merged(self, layer: AttentionLayer, second: Tensor, metric: Tensor, side: str) -> Pair:
        H = layer.head_dim
        if side == "keys" and layer.qk_norm:
            each = torch.eye(H, dtype=torch.float64).repeat(len(second) // H, 1)
            return each.T * H / len(second), each
        if side == "keys":
            return self._merged_keys(layer, second, metric)
        return self._merged_freely(second, metric, H)

    def _merged_freely(self, second: Tensor, metric: Tensor, width: int) -> Pair:
        """Where any map is allowed."""
        if self.merge == "align":
            return _align(second, width)
        latents = solve(lambda i: Term(second, second, BlockDiagonal(metric[None])), 1, 1, width)
        return latents.a_CRF[0], latents.back(0)[0]

    def _merged_keys(self, layer: AttentionLayer, second: Tensor, metric: Tensor) -> Pair:
        """Frequency pair by frequency pair; what is not rotated may be mapped freely."""
        H, r = layer.head_dim, layer.rotary_dim
        starts = torch.arange(0, len(second), H)
        a, b = torch.zeros(H, len(second)).double(), torch.zeros(len(second), H).double()
        for f in range(r // 2):
            real, imaginary = starts + f, starts + f + r // 2
            energy = (metric.diagonal()[real] + metric.diagonal()[imaginary]) / 2
            into, back = self._merged_pair(_complex_moment(second, real, imaginary), energy)
            for (row, column), part in _parts(f, f + r // 2, into):
                a[row, real if column == 0 else imaginary] = part
            for (row, column), part in _parts(f, f + r // 2, back.conj().resolve_conj()):
                b[real if column == 0 else imaginary, row] = part
        if r < H:
            free = torch.cat([torch.arange(start + r, start + H) for start in starts.tolist()])
            into, back = self._merged_freely(second[free][:, free], metric[free][:, free], H - r)
            a[r:, free], b[free, r:] = into, back
        return a, b

    def _merged_pair(self, moment_tt: Tensor, energy_t: Tensor) -> Pair:
        """Complex numbers `into` and `back` per head: z = into . x and x = back z."""
        if self.merge == "align":
            turn = torch.ones(len(moment_tt), dtype=torch.complex128)
            for _ in range(SWEEPS):
                toward = moment_tt @ turn.conj()
                turn = (toward / toward.abs().clamp_min(1e-30)).conj()
            return turn / len(turn), turn.conj()
        root = energy_t.clamp_min(1e-9 * energy_t.max().clamp_min(1e-30)).sqrt().to(torch.complex128)
        lead = torch.linalg.eigh(root[:, None] * moment_tt * root[None]).eigenvectors[:, -1]
        lead = lead * lead[lead.abs().argmax()].conj() / lead.abs().max()  # a fixed phase: same input, same bytes
        return lead.conj() * root, lead / root

    def _distortion(self, group: LayerGroup, heads: int, side: str) -> float:
        order = self._order(group, heads)
        size = len(order) // heads
        lost = total = 0.0
        for i in range(0, len(order), size):
            second, metric = _objective(group, order[i : i + size], side)
            energy = (metric * second).sum().item()
            lost += energy * _lost(second, metric, self._merged(group.owner, second, metric, side))
            total += energy
        return lost / max(total, 1e-300)


def _objective(group: LayerGroup, members: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Second moment and metric of these heads' keys or values, both [t*H, t*H]."""
    index = head_columns(members, group.owner.head_dim)
    second = group.moments(0)[side].second_FF[index][:, index]
    if side == "keys":
        return second, torch.block_diag(*(group.moments(0)["queries"].second_FF[head] for head in members))
    return second, value_metric(group.owner, group.weights(0)).dense()[index][:, index]


def _lost(second: Tensor, metric: Tensor, pair: Pair) -> float:
    """Share of the weighed energy in x - B A x."""
    error = torch.eye(len(second)).to(second) - pair[1] @ pair[0]
    return ((metric * (error @ second @ error.T)).sum() / (metric * second).sum().clamp_min(1e-300)).item()


def _complex_moment(second: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """E[x_j conj(x_l)] of the heads' numbers x = a + ib at one frequency."""
    aa, bb = second[real][:, real], second[imaginary][:, imaginary]
    ab = second[real][:, imaginary]
    return torch.complex(aa + bb, ab.T - ab)


def _parts(first: int, second: int, elements: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    """Multiplication by complex numbers as real entries: ((row, 0 for the real column or 1), value)."""
    return [
        ((first, 0), elements.real),
        ((first, 1), -elements.imag),
        ((second, 0), elements.imag),
        ((second, 1), elements.real),
    ]


def _align(second: Tensor, width: int) -> Pair:
    """Orthogonal maps Q_j that bring the heads together, then their mean: generalised Procrustes."""
    count = len(second) // width
    turns = [torch.eye(width, dtype=torch.float64) for _ in range(count)]
    blocks = second.unflatten(0, (count, width)).unflatten(2, (count, width))
    for _ in range(SWEEPS):
        for j in range(count):
            toward = sum(
                (turns[i] @ blocks[i, :, j] for i in range(count) if i != j), torch.zeros(width, width).double()
            )
            u, _, v = torch.linalg.svd(toward)
            turns[j] = u @ v if count > 1 else turns[j]
    return torch.cat(turns, dim=1) / count, torch.cat([turn.T for turn in turns])
