"""One byte budget -> CachePlan: which shape and how many bits each layer's keys and values get."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kvfold.compression.hulls import Choice, Curve, Curves, Key, best_within
from kvfold.compression.request import SIDES, Groups, Request
from kvfold.errors import BudgetError, RecipeError
from kvfold.linalg.sensitivity import RECENT
from kvfold.methods.bits.base import noise_share
from kvfold.methods.depth.base import Sample, Targets
from kvfold.methods.width.base import LayerGroup
from kvfold.plan.number_format import StoredShape
from kvfold.plan.plan import CachePlan, source_layer
from kvfold.plan.rounding import SLACK

SMALLEST_BUDGET = 1 / 256
"""Where the search for the smallest cache begins."""
ROUNDS = 12
"""In which a choice is brought under the budget, where what is stored beside keys and values depends on it."""
BISECTIONS = 9
"""Of ln 256: the result is within 1.1 % of the bytes that would do."""


def choose_layout(request: Request, *, kv_budget: float | None, sample: Sample | None) -> Targets:
    """Who reads whose cache: of the depth method's layouts the first that uses most of the budget.

    Raises RecipeError where a choice is left and no budget says how to make it.
    """
    layouts = request.axes.depth.layouts(request.layers, sample)
    if not layouts:
        raise RecipeError(
            f"none of the {len(request.layers)} layers may share a cache evenly: layers share within their kind of"
            " sliding window. Name how many keep one: --owners."
        )
    if len(layouts) > 1 and kv_budget is None:
        raise RecipeError(
            "say how many layers keep a cache (--owners 6, for example) or how much to keep (--kv-budget)."
        )
    if len(layouts) == 1 or kv_budget is None:
        return layouts[0]
    budget = kv_budget * request.source_bytes * SLACK
    requests = [replace(request, targets=targets) for targets in layouts]
    reached = [asked.total(_uniform(asked, asked.options, kv_budget)) for asked in requests]
    fitting = [number if number <= budget else -number for number in reached]
    return layouts[fitting.index(max(fitting))]


def allocate(request: Request, *, kv_budget: float | None, strategy: str, curves: Callable[[], Curves]) -> CachePlan:
    """The plan whose bytes are at most `kv_budget` of the source's. Raises BudgetError if nothing is that small.

    `strategy`: uniform gives every side the same share, anything else shares by the distortion that `curves` says.
    """
    if kv_budget is None:
        return request.plan(_without_budget(request))
    asked = kv_budget * request.source_bytes
    budget = asked - request.bytes_beside(request.smallest)
    for attempt in range(ROUNDS):
        chosen = _chosen(request, kv_budget, budget, strategy, curves)
        excess = request.total(chosen) + request.bytes_beside(chosen) - asked * SLACK
        if excess <= 0:
            break
        budget -= excess * 2**attempt  # a smaller choice may store more beside, so that equal steps can take for ever
    _check_budget(request, chosen, kv_budget)
    return request.plan(chosen)


def _chosen(request: Request, kv_budget: float, budget: float, strategy: str, curves: Callable[[], Curves]) -> Choice:
    """For so many bytes per token."""
    if request.limits.one_shape:
        return _in_pairs(request, kv_budget, budget, curves if strategy != "uniform" else None)
    if strategy != "uniform":
        return best_within(budget, curves(), request.cost)
    options = request.options
    if request.axes.bits.by_spectrum:
        options = {key: [shape for shape, _ in points] for key, points in curves().items()}
    return _trimmed(request, _uniform(request, options, kv_budget), options, budget)


def _in_pairs(request: Request, kv_budget: float, budget: float, curves: Callable[[], Curves] | None) -> Choice:
    """Keys and values of a layer in one shape: what is chosen for keys, for half the bytes, holds for both."""
    keys, values = SIDES
    options = {key: shapes for key, shapes in request.options.items() if key[1] == keys}
    if curves is None:
        chosen = _trimmed(request, _uniform(request, options, kv_budget), options, budget / 2)
    else:
        found = curves()
        both = {(i, side): [(s, lost + dict(found[i, values])[s]) for s, lost in found[i, side]] for i, side in options}
        chosen = best_within(budget / 2, both, request.cost)
    return {(i, side): chosen[i, keys] for i, side in request.options}


def smallest_under(target_kl: float, plan: Callable[[float], CachePlan], kl: Callable[[CachePlan], float]) -> CachePlan:
    """The smallest of the plans by budget whose KL is at most `target_kl`, by bisection of the budget's logarithm.

    Raises BudgetError where even the whole budget does not reach that.
    """
    best = plan(1.0)
    if (reached := kl(best)) > target_kl:
        raise BudgetError(
            f"target_kl {target_kl:.3g} is out of reach: the most that this method stores ({best.kv_budget:.3g} of the bytes)"
            f" still leaves a KL of {reached:.3g}. Ask for that much, or choose another preset."
        )
    low, high = math.log(SMALLEST_BUDGET), math.log(best.kv_budget)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        try:
            tried = plan(math.exp(middle))
        except BudgetError:
            low = middle
            continue
        if kl(tried) <= target_kl:
            best, high = tried, min(middle, math.log(tried.kv_budget))
        else:
            low = middle
    return best


def check_request(request: Request, kv_budget: float | None) -> None:
    """Raise, before anything is calibrated, what `allocate` would raise: no budget where one is needed, one out of reach,
    layers that are not there."""
    if unknown := sorted(set(request.limits.keep_layers) - {layer.index for layer in request.owners}):
        raise RecipeError(
            f"keep_layers names {unknown}; layers that own a cache are 0 to {len(request.layers) - 1}"
            + (", without those that read another one's." if len(request.owners) < len(request.layers) else ".")
        )
    if kv_budget is None:
        _without_budget(request)
    else:
        _check_budget(request, request.smallest, kv_budget)


def _without_budget(request: Request) -> Choice:
    """The only choice; or, since sharing already makes the cache smaller, what is shared stays as wide as it was."""
    options, shares = request.options, any(target is not None for target in request.targets)
    if request.axes.bits.by_spectrum or (
        any(len(shapes) > 1 for shapes in options.values()) and (not shares or request.axes.width.joint)
    ):
        raise RecipeError("this method can store several sizes; say how much to keep: --kv-budget 0.5, for example.")
    return {key: shapes[-1] for key, shapes in options.items()}


def _uniform(request: Request, options: Mapping[Key, Sequence[StoredShape]], kv_budget: float) -> Choice:
    """Every cache and side gets the same share of its owner's original size, or (joint) of that of all that fill it."""
    joint, targets = request.axes.width.joint, request.targets
    filled = {layer.index: 1 + joint * targets.count(layer.index) for layer in request.owners}
    count = len(request.parts)
    sides = {i: request.itemsize * source_layer(request.layers[i]).elements_per_token / count for i in filled}
    share = kv_budget * request.source_bytes / sum(count * filled[i] * sides[i] for i in filled)
    chosen = {}
    for key, shapes in options.items():
        limit = share * filled[key[0]] * sides[key[0]] * SLACK
        fitting = (shape for shape in shapes if request.cost(key, shape) <= limit)
        chosen[key] = max(fitting, key=functools.partial(request.cost, key), default=shapes[0])
    return chosen


def _trimmed(request: Request, chosen: Choice, options: Mapping[Key, Sequence[StoredShape]], budget: float) -> Choice:
    """The largest sides of the last caches one size smaller, as often as the budget needs: what is stored beside keys and
    values can make an equal share of all a little too much."""
    chosen, cost = dict(chosen), request.cost
    while request.total(chosen) > budget * SLACK:
        smaller = {key: [s for s in options[key] if cost(key, s) < cost(key, shape)] for key, shape in chosen.items()}
        reducible = [key for key in chosen if smaller[key]]
        if not reducible:
            break
        key = max(reducible, key=lambda key: (cost(key, chosen[key]), key))
        chosen[key] = smaller[key][-1]
    return chosen


def expected_curves(request: Request, groups: Groups) -> Curves:
    """Of every side."""
    return {(owner, side): expected_curve(request, groups, owner, side) for owner, side in request.options}


def expected_curve(request: Request, groups: Groups, owner: int, side: str, noise: float = 1.0) -> Curve:
    """What one side can store, from few bytes to many, with the distortion that its method expects, in nats where the method
    knows them. noise: what errors of quantization cost, where those of leaving numbers out cost 1."""
    group = groups(owner).of_recent if side.startswith(RECENT) else groups(owner)
    scale = request.axes.width.scale(side.removeprefix(RECENT), group)
    return [(shape, scale * lost) for shape, lost in _relative_curve(request, group, side, noise)]


def _relative_curve(request: Request, group: LayerGroup, side: str, noise: float) -> Curve:
    """The same as shares of what losing everything would cost."""
    width, bits, layer, what = request.axes.width, request.axes.bits, group.owner, side.removeprefix(RECENT)
    if not bits.by_spectrum or layer.index in request.limits.keep_layers:
        options = request.options[layer.index, side]
        left_out = zip(options, width.distortion(what, group, options), strict=True)
        return [(shape, lost + max(1 - lost, 0) * noise_share(shape.format)) for shape, lost in left_out]
    shapes = request.allowed(layer, request.shapes(layer, side))
    return bits.curve(shapes, width.spectrum(what, group, shapes[-1].num_heads), noise)


def _check_budget(request: Request, chosen: Choice, kv_budget: float) -> None:
    total = request.source_bytes
    if request.total(chosen) + request.bytes_beside(chosen) > kv_budget * total * SLACK:
        smallest = request.total(request.smallest) + request.bytes_beside(request.smallest)
        raise BudgetError(
            f"kv_budget {kv_budget:.4g} is out of reach: the smallest cache of this method keeps"
            f" {smallest / total:.4g} of the bytes. Ask for at least that, or choose another preset."
        )
