"""One byte budget -> CachePlan: which shape each layer's keys and values get."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvfold.attention import AttentionLayer
from kvfold.bits.base import BitsMethod
from kvfold.depth.base import DepthMethod, Sample, Targets
from kvfold.errors import BudgetError, RecipeError
from kvfold.length.base import LengthMethod
from kvfold.plan import ITEMSIZE, POSITION_BYTES, CachePlan, CacheSpec, SourceLayer
from kvfold.width.base import LayerGroup, StoredShape, WidthMethod

SIDES = ("keys", "values")

Groups = Callable[[int], LayerGroup]
"""Owner's index -> the layers that use its cache, with what damage is computed from."""

Curves = dict[tuple[int, str], list[tuple[StoredShape, float]]]
"""(owner, side) -> its shapes with the damage of each, from few numbers to many."""

Measure = Callable[[Curves], Curves]
"""Expected damages -> measured ones, which can be compared between layers and sides."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """One method per axis."""

    depth: DepthMethod
    width: WidthMethod
    bits: BitsMethod
    length: LengthMethod


def choose_layout(
    layers: Sequence[AttentionLayer], axes: Axes, *, kv_budget: float | None, sample: Sample | None
) -> Targets:
    """Who reads whose cache: of the depth method's layouts the first that uses most of the budget.

    Raises RecipeError where a choice is left and no budget says how to make it.
    """
    layouts = axes.depth.layouts(layers, sample)
    if len(layouts) > 1 and kv_budget is None:
        raise RecipeError(
            "say how many layers keep a cache (--owners 6, for example) or how much to keep (--kv-budget)."
        )
    if len(layouts) == 1 or kv_budget is None:
        return layouts[0]
    numbers = kv_budget * _source_numbers(layers)
    reached = [
        _numbers(_uniform(_all_shapes(axes, layers, targets), layers, targets, kv_budget, axes.width.joint))
        for targets in layouts
    ]
    fitting = [number if number <= numbers * (1 + 1e-9) else -number for number in reached]
    return layouts[fitting.index(max(fitting))]


def allocate(
    layers: Sequence[AttentionLayer],
    targets: Targets,
    axes: Axes,
    *,
    kv_budget: float | None,
    dtype: str,
    strategy: str,
    groups: Groups,
    measure: Measure | None = None,
) -> CachePlan:
    """The plan whose bytes are at most `kv_budget` of the source's. Raises BudgetError if no width is that small.

    `strategy`: uniform, greedy (by expected damage) or measured (by what `measure` makes of it).
    """
    shapes = _all_shapes(axes, layers, targets)
    total = _source_numbers(layers)
    beside = _numbers_beside(axes, layers, shapes, dtype)
    numbers = None if kv_budget is None else kv_budget * total - beside
    if numbers is None or kv_budget is None:
        chosen = _without_budget(shapes, targets, axes)
    elif strategy == "uniform":
        chosen = _trimmed(_uniform(shapes, layers, targets, kv_budget, axes.width.joint), shapes, numbers)
    else:
        curves = _curves(shapes, axes.width, groups)
        assert strategy == "greedy" or measure is not None, "measured damage needs someone to measure it"
        chosen = _greedy(curves if strategy == "greedy" or measure is None else measure(curves), numbers)
    _check_budget(shapes, chosen, None if kv_budget is None else kv_budget * total, total, beside)
    caches: list[CacheSpec | None] = [None] * len(layers)
    for layer in _owners(layers, targets):
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


def _owners(layers: Sequence[AttentionLayer], targets: Targets) -> list[AttentionLayer]:
    return [layer for layer, target in zip(layers, targets, strict=True) if target is None]


def _source_numbers(layers: Sequence[AttentionLayer]) -> int:
    return sum(source_layer(layer).numbers_per_token for layer in layers)


def _numbers(chosen: Choice) -> int:
    return sum(shape.numbers for shape in chosen.values())


def _all_shapes(axes: Axes, layers: Sequence[AttentionLayer], targets: Targets) -> Shapes:
    owners = _owners(layers, targets)
    return {
        (layer.index, side): _shapes(axes.width, layer, 1 + targets.count(layer.index), side)
        for layer in owners
        for side in SIDES
    }


def _shapes(width: WidthMethod, layer: AttentionLayer, layers: int, side: str) -> list[StoredShape]:
    found = (width.key_shapes if side == "keys" else width.value_shapes)(layer, layers)
    return sorted(found, key=lambda shape: shape.numbers)


def check_request(
    layers: Sequence[AttentionLayer], targets: Targets, axes: Axes, kv_budget: float | None, dtype: str
) -> None:
    """Raise, before anything is calibrated, what `allocate` would raise: no budget where one is needed, one out of reach."""
    shapes = _all_shapes(axes, layers, targets)
    if kv_budget is None:
        _without_budget(shapes, targets, axes)
        return
    smallest = {key: options[0] for key, options in shapes.items()}
    total = _source_numbers(layers)
    _check_budget(shapes, smallest, kv_budget * total, total, _numbers_beside(axes, layers, shapes, dtype))


def _without_budget(shapes: Shapes, targets: Targets, axes: Axes) -> Choice:
    """The only choice; or, since sharing already makes the cache smaller, what is shared stays as wide as it was."""
    if any(target is not None for target in targets) and not axes.width.joint:
        return {key: options[-1] for key, options in shapes.items()}
    return _only_choice(shapes)


def _only_choice(shapes: Shapes) -> Choice:
    if any(len(options) > 1 for options in shapes.values()):
        raise RecipeError("this method can store several sizes; say how much to keep: --kv-budget 0.5, for example.")
    return {key: options[0] for key, options in shapes.items()}


def _uniform(
    shapes: Shapes, layers: Sequence[AttentionLayer], targets: Targets, kv_budget: float, joint: bool
) -> Choice:
    """Every cache and side gets the same share of its owner's original size, or (joint) of that of all that fill it."""
    filled = {layer.index: 1 + joint * targets.count(layer.index) for layer in _owners(layers, targets)}
    owned = sum(filled[i] * source_layer(layers[i]).numbers_per_token for i in filled)
    share = kv_budget * _source_numbers(layers) / owned
    chosen = {}
    for key, options in shapes.items():
        owner = layers[key[0]]
        limit = share * filled[owner.index] * owner.num_kv_heads * owner.head_dim * (1 + 1e-9)
        chosen[key] = max((s for s in options if s.numbers <= limit), key=lambda s: s.numbers, default=options[0])
    return chosen


def _trimmed(chosen: Choice, shapes: Shapes, numbers: float) -> Choice:
    """The largest sides of the last caches one size smaller, as often as the budget needs: what is stored beside keys and
    values can make an equal share of all a little too much."""
    chosen = dict(chosen)
    while _numbers(chosen) > numbers * (1 + 1e-9):
        smaller = {key: [s for s in shapes[key] if s.numbers < shape.numbers] for key, shape in chosen.items()}
        reducible = [key for key in chosen if smaller[key]]
        if not reducible:
            break
        key = max(reducible, key=lambda key: (chosen[key].numbers, key))
        chosen[key] = smaller[key][-1]
    return chosen


def _numbers_beside(axes: Axes, layers: Sequence[AttentionLayer], shapes: Shapes, dtype: str) -> float:
    """What is stored per token beside keys and values, as so many numbers."""
    owners = {owner for owner, _ in shapes}
    specs = [axes.width.spec(layers[i], shapes[i, "keys"][0], shapes[i, "values"][0]) for i in owners]
    return POSITION_BYTES / ITEMSIZE[dtype] if any(spec.rope == "on_read" for spec in specs) else 0


def _curves(shapes: Shapes, width: WidthMethod, groups: Groups) -> Curves:
    curves = {}
    for (owner, side), options in shapes.items():
        damage = width.key_damage if side == "keys" else width.value_damage
        curves[owner, side] = list(zip(options, damage(groups(owner), options), strict=True))
    return curves


def _greedy(curves: Curves, numbers: float) -> Choice:
    """Start from the smallest shapes and buy, step by step, where a stored number saves the most expected damage.

    Steps lie on the lower convex hull of each (numbers, damage) curve, so that gains fall and greedy is optimal but for
    the last step.
    """
    hulls = {key: lower_hull(points) for key, points in curves.items()}
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


def lower_hull(points: Sequence[tuple[StoredShape, float]]) -> list[tuple[StoredShape, float]]:
    """The points of a falling curve that no line between two others undercuts, from few numbers to many."""
    hull: list[tuple[StoredShape, float]] = []
    for point in points:
        while len(hull) > 1 and _gain([hull[-2], hull[-1]], 0) <= _gain([hull[-1], point], 0):
            hull.pop()
        hull.append(point)
    return hull


def _check_budget(shapes: Shapes, chosen: Choice, numbers: float | None, total: int, beside: float) -> None:
    if numbers is None:
        return
    reached = _numbers(chosen) + beside
    if reached > numbers * (1 + 1e-9):
        smallest = sum(options[0].numbers for options in shapes.values()) + beside
        raise BudgetError(
            f"kv_budget {numbers / total:.4g} is out of reach: the smallest cache of this method keeps"
            f" {smallest / total:.4g} of the bytes. Ask for at least that, or choose another preset."
        )
