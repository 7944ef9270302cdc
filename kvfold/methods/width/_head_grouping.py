"""Which heads share a latent: neighbours, or those that lose least together."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvfold.linalg.eigen import Moment
from kvfold.methods.width.base import LayerGroup
from kvfold.plan.layer import AttentionLayer, AttentionWeights

GROUPINGS = ("neighbours", "similar")
EXACT_UP_TO = 12
"""Heads for which every grouping is tried; for more, groups are filled greedily."""

Loss = Callable[[tuple[int, ...]], float]
"""What heads (in rising order) lose when they share a latent."""


def best_order(heads: int, groups: int, loss: Loss) -> list[int]:
    """Heads in an order in which each run of heads/groups forms one group, with the least total loss."""
    loss = functools.cache(loss)
    if groups in (1, heads):
        return list(range(heads))
    return (_exact if heads <= EXACT_UP_TO else _greedy)(heads, heads // groups, loss)


def _exact(heads: int, size: int, loss: Loss) -> list[int]:
    """Dynamic programming over sets of heads that are still to be grouped; each group begins with the first of them."""

    @functools.cache
    def best(left: frozenset[int]) -> tuple[float, tuple[int, ...]]:
        if not left:
            return 0.0, ()
        first, *rest = sorted(left)
        options = []
        for others in itertools.combinations(rest, size - 1):
            members = (first, *others)
            after, order = best(left - set(members))
            options.append((loss(members) + after, members + order))
        return min(options)

    return list(best(frozenset(range(heads)))[1])


def _greedy(heads: int, size: int, loss: Loss) -> list[int]:
    left, order = set(range(heads)), []
    while left:
        members = [min(left)]
        while len(members) < size:
            rest = sorted(left - set(members))
            members.append(min(rest, key=lambda head: loss(tuple(sorted([*members, head])))))
        left -= set(members)
        order += sorted(members)
    return order


def head_columns(members: tuple[int, ...] | list[int], head_dim: int) -> Tensor:
    """Positions of these heads' numbers among those of all heads."""
    return torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in members])


def reordered(group: LayerGroup, order: list[int]) -> LayerGroup:
    """The same layers with their key/value heads in another order, each with its query heads."""
    if order == list(range(len(order))):
        return group
    columns = head_columns(order, group.owner.head_dim)

    def moments(position: int) -> Mapping[str, Moment]:
        return {name: _moment(moment, order, columns) for name, moment in group.moments(position).items()}

    def cross(position: int, other: int = 0) -> Mapping[str, Tensor]:
        return {name: matrix[columns][:, columns] for name, matrix in group.cross(position, other).items()}

    return dataclasses.replace(
        group,
        weights=lambda position: reordered_weights(group.layers[position], group.weights(position), order),
        moments=moments,
        cross=cross,
    )


def _moment(moment: Moment, order: list[int], columns: Tensor) -> Moment:
    mean, second = moment.mean_F, moment.second_FF
    if mean.ndim == 2 and len(mean) == len(order):  # one moment per head
        mean, second = mean[order], second[order]
    if mean.shape[-1] == len(columns):
        mean, second = mean[..., columns], second[..., columns, :][..., columns]
    return Moment(mean, second, moment.count)


def reordered_weights(layer: AttentionLayer, weights: AttentionWeights, order: list[int]) -> AttentionWeights:
    """Projections, biases and norms over all heads with their rows (of o_proj the columns) in the new order."""
    K, kv = layer.num_kv_heads, torch.tensor(order)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (K, -1))[kv].flatten(0, 1)

    norms = ("q_norm", "k_norm") if layer.norms_tell_heads_apart else ()
    names = ("q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "sinks", *norms)
    o_proj = weights.o_proj.unflatten(1, (K, -1))[:, kv].flatten(1)
    return dataclasses.replace(weights, o_proj=o_proj, **{name: rows(getattr(weights, name)) for name in names})  # type: ignore[arg-type]
