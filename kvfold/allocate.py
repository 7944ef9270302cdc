"""One byte budget -> CachePlan: which shape each layer's keys and values get."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.attention import AttentionLayer, AttentionWeights
from kvfold.bits.base import BitsMethod
from kvfold.depth.base import DepthMethod
from kvfold.errors import BudgetError, RecipeError
from kvfold.length.base import LengthMethod
from kvfold.linalg import Moment
from kvfold.plan import CachePlan, CacheSpec, SourceLayer
from kvfold.width.base import StoredShape, WidthMethod

SIDES = ("keys", "values")

LayerInputs = Callable[[int], tuple[AttentionWeights, Mapping[str, Moment]]]
"""Layer index -> the weights and moments that damage is computed from."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """One method per axis."""

    depth: DepthMethod
    width: WidthMethod
    bits: BitsMethod
    length: LengthMethod


def allocate(
    layers: Sequence[AttentionLayer],
    axes: Axes,
    *,
    kv_budget: float | None,
    dtype: str,
    strategy: str,
    inputs: LayerInputs,
) -> CachePlan:
    """The plan whose bytes are at most `kv_budget` of the source's. Raises BudgetError if no width is that small."""
    targets = axes.depth.targets(layers)
    owners = [layer for layer, target in zip(layers, targets, strict=True) if target is None]
    shapes = {(layer.index, side): _shapes(axes.width, layer, side) for layer in owners for side in SIDES}
    total = sum(source_layer(layer).numbers_per_token for layer in layers)
    numbers = None if kv_budget is None else kv_budget * total
    if numbers is None:
        chosen = _only_choice(shapes)
    elif strategy == "uniform":
        chosen = _uniform(shapes, numbers / total * len(layers) / len(owners))
    else:
        chosen = _greedy(shapes, numbers, axes.width, owners, inputs)
    _check_budget(shapes, chosen, numbers, total)
    caches: list[CacheSpec | None] = [None] * len(layers)
    for layer in owners:
        spec = axes.width.spec(layer, chosen[layer.index, "keys"], chosen[layer.index, "values"])
        caches[layer.index] = axes.length.apply(layer, axes.bits.apply(layer, spec))
    return CachePlan(
        dtype=dtype,
        source=tuple(source_layer(layer) for layer in layers),
        caches=tuple(caches),
        kv_sharing_target_layer=targets,
    )


def source_layer(layer: AttentionLayer) -> SourceLayer:
    """What byte accounting needs to know of an original layer."""
    return SourceLayer(
        num_attention_heads=layer.num_attention_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        window=layer.window,
    )


Shapes = dict[tuple[int, str], list[StoredShape]]
Choice = dict[tuple[int, str], StoredShape]


def _shapes(width: WidthMethod, layer: AttentionLayer, side: str) -> list[StoredShape]:
    found = width.key_shapes(layer) if side == "keys" else width.value_shapes(layer)
    return sorted(found, key=lambda shape: shape.numbers)


def _only_choice(shapes: Shapes) -> Choice:
    if any(len(options) > 1 for options in shapes.values()):
        raise RecipeError("this method can store several sizes; say how much to keep: --kv-budget 0.5, for example.")
    return {key: options[0] for key, options in shapes.items()}


def _uniform(shapes: Shapes, share: float) -> Choice:
    """Every layer and side gets the same share of its largest shape, which is its original size."""
    chosen = {}
    for key, options in shapes.items():
        limit = share * _full(options) * (1 + 1e-9)
        chosen[key] = max((s for s in options if s.numbers <= limit), key=lambda s: s.numbers, default=options[0])
    return chosen


def _full(options: Sequence[StoredShape]) -> int:
    return options[-1].numbers


def _greedy(
    shapes: Shapes, numbers: float, width: WidthMethod, owners: Sequence[AttentionLayer], inputs: LayerInputs
) -> Choice:
    """Start from the smallest shapes and buy, step by step, where a stored number saves the most expected damage.

    Steps lie on the lower convex hull of each (numbers, damage) curve, so that gains fall and greedy is optimal but for
    the last step.
    """
    hulls: dict[tuple[int, str], list[tuple[StoredShape, float]]] = {}
    for layer in owners:
        weights, moments = inputs(layer.index)
        for side, damage in zip(SIDES, (width.key_damage, width.value_damage), strict=True):
            options = shapes[layer.index, side]
            hulls[layer.index, side] = lower_hull(options, damage(layer, weights, moments, options))
    position = dict.fromkeys(hulls, 0)
    left = numbers * (1 + 1e-9) - sum(hull[0][0].numbers for hull in hulls.values())
    steps = [(-_gain(hull, 0), key) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, key = heapq.heappop(steps)
        hull, at = hulls[key], position[key]
        price = hull[at + 1][0].numbers - hull[at][0].numbers
        if price > left:
            continue
        left -= price
        position[key] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull, at + 1), key))
    return {key: hull[position[key]][0] for key, hull in hulls.items()}


def _gain(hull: Sequence[tuple[StoredShape, float]], at: int) -> float:
    (shape, damage), (larger, less) = hull[at], hull[at + 1]
    return (damage - less) / (larger.numbers - shape.numbers)


def lower_hull(shapes: Sequence[StoredShape], damages: Sequence[float]) -> list[tuple[StoredShape, float]]:
    """The points of a falling curve that no line between two others undercuts, from few numbers to many."""
    hull: list[tuple[StoredShape, float]] = []
    for point in zip(shapes, damages, strict=True):
        while len(hull) > 1 and _gain([hull[-2], hull[-1]], 0) <= _gain([hull[-1], point], 0):
            hull.pop()
        hull.append(point)
    return hull


def _check_budget(shapes: Shapes, chosen: Choice, numbers: float | None, total: int) -> None:
    if numbers is None:
        return
    reached = sum(shape.numbers for shape in chosen.values())
    if reached > numbers * (1 + 1e-9):
        smallest = sum(options[0].numbers for options in shapes.values())
        raise BudgetError(
            f"kv_budget {numbers / total:.4g} is out of reach: the smallest cache of this method keeps"
            f" {smallest / total:.4g} of the bytes. Ask for at least that, or choose another preset."
        )
