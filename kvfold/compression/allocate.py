"""One byte budget -> CachePlan: which shape and how many bits each layer's keys and values get."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kvfold.compression.hulls import SLACK, Choice, Curve, Curves, Key, best_within
from kvfold.errors import BudgetError, RecipeError
from kvfold.linalg.sensitivity import RECENT
from kvfold.methods.bits.base import BitsMethod, noise_share
from kvfold.methods.depth.base import DepthMethod, Sample, Targets
from kvfold.methods.length.base import LengthMethod
from kvfold.methods.width.base import LayerGroup, WidthMethod
from kvfold.plan.cache_spec import ITEMSIZE, POSITION_BYTES, CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape
from kvfold.plan.plan import BUDGET_CONTEXT, CachePlan, source_layer
from kvfold.runtimes.base import runtime

SIDES = ("keys", "values")
SMALLEST_BUDGET = 1 / 256
"""Where the search for the smallest cache begins."""
ROUNDS = 12
"""In which a choice is brought under the budget, where what is stored beside keys and values depends on it."""
BISECTIONS = 9
"""Of ln 256: the result is within 1.1 % of the bytes that would do."""

Groups = Callable[[int], LayerGroup]
"""Owner's index -> the layers that use its cache, with what distortion is computed from."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """One method per axis."""

    depth: DepthMethod
    width: WidthMethod
    bits: BitsMethod
    length: LengthMethod


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`keep_layers`: layers that store every number as it is. `min_width`: the least share of a layer's numbers to store.
    `one_shape`: a layer's values are stored in the shape of its keys. `widths`: those of a stored head (empty: any)."""

    keep_layers: tuple[int, ...] = ()
    min_width: float = 0.0
    one_shape: bool = False
    widths: tuple[int, ...] = ()


def limits_of(recipe: Any) -> Limits:
    """What a recipe says of them, its runtime's included."""
    where = runtime(recipe.runtime)
    return Limits(
        keep_layers=recipe.keep_layers, min_width=recipe.min_width, one_shape=where.one_shape, widths=where.widths
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: who owns a cache, by which methods, in which dtype, within which limits."""

    layers: Sequence[AttentionLayer]
    targets: Targets
    axes: Axes
    dtype: str
    limits: Limits = Limits()

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @cached_property
    def owners(self) -> list[AttentionLayer]:
        return [layer for layer, target in zip(self.layers, self.targets, strict=True) if target is None]

    @cached_property
    def source_bytes(self) -> int:
        """Per token, of the original cache."""
        return self.itemsize * sum(source_layer(layer).elements_per_token for layer in self.layers)

    @cached_property
    def options(self) -> dict[Key, list[StoredShape]]:
        """What each side can store, from few bytes to many; of methods that go by the spectrum with the fewest bits."""
        options = {
            (layer.index, side): self._options(layer, side) for layer in self.owners for side in self.parts_of(layer)
        }
        paired = self.limits.one_shape and len(self.parts) == 2
        return {(i, side): self._common(i, options) for i, side in options} if paired else options

    @property
    def parts(self) -> tuple[str, ...]:
        """What gets a share of the budget in every layer: keys and values, or both as one."""
        return self.axes.width.parts

    def recent_of(self, layer: AttentionLayer) -> int:
        """Of how many recent tokens a layer has a form of its own."""
        kept = layer.index in self.limits.keep_layers
        told_apart = self.axes.length.told_apart(self.axes.width, self.axes.bits)
        return self.axes.length.recent_of(layer) if told_apart and not kept else 0

    def parts_of(self, layer: AttentionLayer) -> tuple[str, ...]:
        """The same for one layer, the finer forms of recent tokens included."""
        finer = tuple(RECENT + part for part in self.parts) if self.recent_of(layer) else ()
        return self.parts + finer

    def _common(self, owner: int, options: Mapping[Key, list[StoredShape]]) -> list[StoredShape]:
        """What both sides can store."""
        keys, values = (options[owner, side] for side in SIDES)
        if both := [shape for shape in keys if shape in values]:
            return both
        raise RecipeError(
            f"this runtime stores keys and values in one shape, and layer {owner} has none that suits both (keys:"
            f" {keys[0].num_heads} heads and so on, values: {values[0].num_heads}); set width.latent and width.v_latent to"
            " the same, and leave bits out."
        )

    def _options(self, layer: AttentionLayer, side: str) -> list[StoredShape]:
        shapes = self.shapes(layer, side)
        if layer.index not in self.limits.keep_layers:
            shapes = self.axes.bits.stored(layer, side, self.allowed(layer, shapes))
        return sorted(shapes, key=lambda shape: self.cost((layer.index, side), shape))

    def widest(self, layer: AttentionLayer, side: str) -> StoredShape:
        """The shape that loses nothing."""
        return self._by_numbers(layer, side)[-1]

    def _by_numbers(self, layer: AttentionLayer, side: str) -> list[StoredShape]:
        found = self.axes.width.shapes(side.removeprefix(RECENT), layer, 1 + self.targets.count(layer.index))
        return sorted(found, key=lambda shape: shape.elements)

    def shapes(self, layer: AttentionLayer, side: str) -> list[StoredShape]:
        """Those of the width method that the limits allow; of a layer that is kept only the one that loses nothing."""
        shapes = self._by_numbers(layer, side)
        if layer.index in self.limits.keep_layers:
            return shapes[-1:]
        return [shape for shape in shapes if shape.width in self.limits.widths] or shapes

    def allowed(self, layer: AttentionLayer, shapes: Sequence[StoredShape]) -> list[StoredShape]:
        """Those that are wide enough; the widest if none is."""
        least = self.limits.min_width * 2 / len(self.parts) * layer.num_kv_heads * layer.head_dim
        return [shape for shape in shapes if shape.elements >= least / SLACK] or list(shapes[-1:])

    def cost(self, key: Key, shape: StoredShape) -> float:
        """Bytes per token; those of recent tokens are shared out among BUDGET_CONTEXT."""
        whole = shape.bytes_per_token(self.itemsize)
        return whole * self.axes.length.recent / BUDGET_CONTEXT if key[1].startswith(RECENT) else whole

    def total(self, chosen: Mapping[Key, StoredShape]) -> float:
        """Bytes per token of all that was chosen."""
        return sum(self.cost(key, shape) for key, shape in chosen.items())

    def bytes_beside(self, chosen: Mapping[Key, StoredShape]) -> float:
        """What is stored per token beside all that."""
        specs = [self.spec(layer, chosen) for layer in self.owners]
        counted = sum(self.total({key: shape}) for key, shape in chosen.items() if key[1].startswith(RECENT))
        recent = sum(spec.recent_bytes(BUDGET_CONTEXT, self.itemsize) for spec in specs) / BUDGET_CONTEXT
        return recent - counted + POSITION_BYTES * any(spec.rope == "on_read" for spec in specs)

    @cached_property
    def smallest(self) -> Choice:
        """Of every side the shape of the fewest bytes."""
        return {key: shapes[0] for key, shapes in self.options.items()}

    def spec(self, layer: AttentionLayer, chosen: Mapping[Key, StoredShape]) -> CacheSpec:
        """The cache that `layer` owns."""
        spec, *finer = (
            self.axes.width.spec(layer, *(chosen[layer.index, age + side] for side in self.parts))
            for age in (("", RECENT) if self.recent_of(layer) else ("",))
        )
        return spec if layer.index in self.limits.keep_layers else self.axes.length.apply(layer, spec, *finer)

    def plan(self, chosen: Mapping[Key, StoredShape]) -> CachePlan:
        """The plan of what was chosen for every side."""
        caches: list[CacheSpec | None] = [None] * len(self.layers)
        for layer in self.owners:
            caches[layer.index] = self.spec(layer, chosen)
        return CachePlan(
            dtype=self.dtype,
            source=tuple(source_layer(layer) for layer in self.layers),
            caches=tuple(caches),
            kv_sharing_target_layer=self.targets,
        )


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
