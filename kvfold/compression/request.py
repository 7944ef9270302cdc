"""What is asked of one fold: methods and limits, and what each cache may store at what price."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kvfold.compression.hulls import Choice, Key
from kvfold.errors import RecipeError
from kvfold.linalg.sensitivity import RECENT
from kvfold.methods.bits.base import BitsMethod
from kvfold.methods.bits.identity import Identity
from kvfold.methods.depth.base import DepthMethod, Targets
from kvfold.methods.length.base import LengthMethod
from kvfold.methods.width.base import LayerGroup, WidthMethod
from kvfold.plan.cache_spec import ITEMSIZE, POSITION_BYTES, CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape
from kvfold.plan.plan import BUDGET_CONTEXT, CachePlan, source_layer
from kvfold.plan.rounding import SLACK
from kvfold.runtimes.base import runtime

SIDES = ("keys", "values")

TOKENS_EACH = 8
"""Calibration tokens that a number which predicts others wants at least: fewer are fitted, not predicted."""
READ, FEWEST = 2 / 3, 8
"""Such a share of the numbers that the source stores a step reads per token where the recipe leaves open how many numbers
predict a layer, and in multiples of so many."""

Groups = Callable[[int], LayerGroup]
"""Owner's index -> the layers that use its cache, with what distortion is computed from."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """One method per axis."""

    depth: DepthMethod
    width: WidthMethod
    bits: BitsMethod
    length: LengthMethod

    @property
    def told_apart(self) -> int:
        """Of how many recent tokens there is a form of its own, made for queries that stand close by."""
        return self.length.recent if self.width.two_forms and self.bits.by_spectrum else 0

    @property
    def latents_of_heads(self) -> set[str]:
        """What keys and values share a latent by (`layer`, `group`) where heads drop tokens of their own; empty elsewhere."""
        alone = self.length.drops and not self.bits.by_spectrum
        return {getattr(self.width, side, "layer") for side in ("latent", "v_latent")} if alone else set()

    @property
    def below(self) -> int:
        """Numbers of how many layers below say a part of what a layer would store. None where recent tokens are the same
        numbers before quantization: what is left to store depends on which of both is read."""
        return self.width.below if self.told_apart == self.length.recent and not self.length.drops else 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`keep_layers`: layers that store every number as it is. `min_width`: the least share of a layer's numbers to store.
    `one_shape`: a layer's values are stored in the shape of its keys. `widths`: those of a stored head (empty: any).
    `tokens`: of calibration, which say how many numbers can predict others."""

    keep_layers: tuple[int, ...] = ()
    min_width: float = 0.0
    one_shape: bool = False
    widths: tuple[int, ...] = ()
    tokens: int | None = None


def limits_of(recipe: Any, tokens: int | None = None) -> Limits:
    """What a recipe says of them, and its runtime of whole heads of plain numbers."""
    where, axes = runtime(recipe.runtime), recipe.axes
    latents = len(axes.width.parts) == 1 or getattr(axes.width, "rebuilds_on_read", False)
    heads = isinstance(axes.bits, Identity) and not latents
    return Limits(
        keep_layers=recipe.keep_layers,
        min_width=recipe.min_width,
        one_shape=axes.latents_of_heads == {"group"} or (where.one_shape and heads),
        widths=where.widths if heads else (),
        tokens=tokens,
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: who owns a cache, by which methods, in which dtype, within which limits. kept: so many of the tokens
    stay, which is what storing one of them counts."""

    layers: Sequence[AttentionLayer]
    targets: Targets
    axes: Axes
    dtype: str
    limits: Limits = Limits()
    context_len: int = BUDGET_CONTEXT
    kept: float = 1.0

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
        return self.axes.length.recent_of(layer) if self.axes.told_apart and not kept else 0

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
        """Bytes per token, of those that stay; those of recent tokens are shared out among `context_len`."""
        whole = shape.bytes_per_token(self.itemsize)
        share = self.axes.length.recent / self.context_len if key[1].startswith(RECENT) else self.kept_of(key[0])
        return whole * share

    def kept_of(self, layer: int) -> float:
        """The share of its tokens that stay in a layer; all where it is kept, or forgets by itself."""
        drops = layer not in self.limits.keep_layers and self.layers[layer].window is None
        return self.kept if drops else 1.0

    def total(self, chosen: Mapping[Key, StoredShape]) -> float:
        """Bytes per token of all that was chosen."""
        return sum(self.cost(key, shape) for key, shape in chosen.items())

    def bytes_beside(self, chosen: Mapping[Key, StoredShape]) -> float:
        """What is stored per token beside all that."""
        specs = [self.spec(layer, chosen) for layer in self.owners]
        counted = sum(self.total({key: shape}) for key, shape in chosen.items() if key[1].startswith(RECENT))
        recent = sum(spec.recent_bytes(self.context_len, self.itemsize) for spec in specs) / self.context_len
        beside = self.kept * sum(spec.bytes_beside(self.itemsize) for spec in specs)
        positions = POSITION_BYTES * self.layers[0].position_axes
        return recent - counted + beside + positions * any(spec.rope == "on_read" for spec in specs)

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

    def below(self, layer: AttentionLayer) -> tuple[int, ...]:
        """The layers whose numbers say a part of what this one would store: those below it in its run, of its kind."""
        kept = self.limits.keep_layers
        alike = [x.index for x in self.owners if x.index not in kept and x.window == layer.window]
        if not self.axes.below or layer.index in kept:
            return ()
        at = alike.index(layer.index)
        return tuple(alike[at - at % (self.axes.below + 1) : at])

    def leading(self, specs: Mapping[int, CacheSpec]) -> int | None:
        """How many numbers of each layer below a layer is predicted by, 0 for all; None for no prediction. Where the width
        method leaves it open, as many as let a step read READ times the source's numbers."""
        known, below = self.axes.width.leading, sum(len(self.below(layer)) for layer in self.owners)
        if known is not None or not below:
            return known
        source = sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.owners)
        left = READ * source - sum(spec.head_dim for spec in specs.values())
        return int(left / below) // FEWEST * FEWEST or None if left > 0 else None

    def _most(self, below: int) -> int | None:
        """How many numbers of each of so many layers there are calibration tokens for; None for any."""
        if self.limits.tokens is None or not below:
            return None
        return self.limits.tokens // (TOKENS_EACH * below) // FEWEST * FEWEST

    def _predicted(self, layer: AttentionLayer, specs: Mapping[int, CacheSpec]) -> CacheSpec:
        spec, below = specs[layer.index], self.below(layer)
        if any(specs[i].k_bits and specs[i].k_bits.block > 1 for i in (layer.index, *below)):  # type: ignore[union-attr]
            return spec
        leading = self.leading(specs)
        most = self._most(len(below))
        if leading is None or not below or most == 0:
            return spec
        recent = self.axes.width.leading_of_recent if spec.recent else None
        first = [0 if x is None else x if most is None else min(x or most, most) for x in (leading, recent)]
        spec = replace(spec, leading=first[0], recent_leading=first[1])
        return replace(
            spec,
            predicted_from=below,
            predictors=sum(spec.predicting(specs[i].head_dim) for i in below),
            recent_predictors=sum(spec.of_recent.predicting(specs[i].recent_head_dim) for i in below),
        )

    def plan(self, chosen: Mapping[Key, StoredShape]) -> CachePlan:
        """The plan of what was chosen for every side."""
        specs = {layer.index: self.spec(layer, chosen) for layer in self.owners}
        caches: list[CacheSpec | None] = [None] * len(self.layers)
        for layer in self.owners:
            caches[layer.index] = self._predicted(layer, specs)
        return CachePlan(
            dtype=self.dtype,
            source=tuple(source_layer(layer) for layer in self.layers),
            caches=tuple(caches),
            kv_sharing_target_layer=self.targets,
            context_len=self.context_len,
        )
