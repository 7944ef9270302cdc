"""The contract of a width method: which shapes it can store, what they cost in quality, and the folded weights."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.linalg.eigen import Moment
from kvfold.linalg.reduced_rank import Latents
from kvfold.linalg.sensitivity import RECENT
from kvfold.plan.cache_spec import CacheSpec, divisors
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.number_format import StoredShape

GROUP = 4
"""About so many heads share a latent where steps are to be no slower than the original's, as which they are in the shapes of
Llama-2-7B and Llama-3-8B; with one latent for all of a layer they take up to twice as long (docs/log.md)."""


class Tokens(NamedTuple):
    """Calibration tokens of one layer without their mean [T, F], what each counts [T], and what it counts for queries that
    stand close by, where those are told apart."""

    x_TF: Tensor
    weight_T: Tensor
    recent_weight_T: Tensor | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Of both ages, as far as they are told apart."""
        return [weight_T for weight_T in (self.weight_T, self.recent_weight_T) if weight_T is not None]


def no_tokens() -> Tokens:
    """Of a group whose method does not ask for them."""
    raise AssertionError("calibration kept no tokens")


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """The layers that use one cache: its owner first, then its readers. Most groups are one layer.

    Everything large is read when it is asked for, by position in the group. weights(i): float64. moments(i): statistic ->
    moment of layer i. cross(i, j=0): statistic -> E[x_i x_j^T] [F, F] for j <= i, of which j = 0 is the owner.
    vectors(i): statistic -> some of the calibration vectors themselves [T, F]. tokens(): those of the owner, weighted.
    """

    layers: tuple[AttentionLayer, ...]
    weights: Callable[[int], AttentionWeights]
    moments: Callable[[int], Mapping[str, Moment]]
    cross: Callable[..., Mapping[str, Tensor]]
    vectors: Callable[[int], Mapping[str, Tensor]] = lambda position: {}
    tokens: Callable[[], Tokens] = no_tokens

    @property
    def owner(self) -> AttentionLayer:
        return self.layers[0]

    @property
    def of_recent(self) -> LayerGroup:
        """The same layers as queries see tokens that stand close by."""

        def moments(position: int) -> Mapping[str, Moment]:
            known = self.moments(position)
            return {name: known.get(RECENT + name, moment) for name, moment in known.items()}

        def tokens() -> Tokens:
            known = self.tokens()
            return Tokens(known.x_TF, known.weights[-1])

        return dataclasses.replace(self, moments=moments, tokens=tokens)

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, kw_only=True)
class WidthMethod(ABC):
    """A way to store fewer numbers per token. Its dataclass fields are its hyper-parameters, by name in recipes.

    `needs`: the statistics it reads (`calibrate.STATISTICS`); empty where weights are enough. `needs_cross`: those of
    which it also reads the moment between a reader and the owner, or, if `joint`, between all layers of a group.
    `needs_vectors`: those of which it wants to see vectors. `ordered`: stored numbers come in the order of what they save, so
    that leading ones can get more bits (`key_spectrum`). `in_nats`: its expected distortions, times `scale`, are nats.
    `parts`: what gets a share of the budget of its own. `two_forms`: all its caches leave the same out of every token, so
    that recent tokens can have a form of their own. `below`: what is stored can leave out what the numbers of up to so many
    layers below say (PredictedWidth), `leading` of each and `leading_of_recent` of recent tokens, 0 for all.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_cross: ClassVar[frozenset[str]] = frozenset()
    needs_vectors: ClassVar[frozenset[str]] = frozenset()
    joint: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("keys", "values")
    ordered: ClassVar[bool] = False
    in_nats: ClassVar[bool] = False
    two_forms: ClassVar[bool] = False
    below = 0
    leading = 0

    @property
    def leading_of_recent(self) -> int:
        return 0

    @abstractmethod
    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> Sequence[StoredShape]:
        """The shapes in which this method can store the keys of `layer` for the `layers` layers that use its cache, from few
        to many numbers; the last loses nothing of the owner's."""

    @abstractmethod
    def value_shapes(self, layer: AttentionLayer, layers: int = 1) -> Sequence[StoredShape]:
        """The same for values."""

    @abstractmethod
    def key_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        """Expected distortion of storing the keys in each of `shapes`, summed over the group's layers: per layer 0 for none,
        1 for losing everything. Readers may be damaged by any shape."""

    @abstractmethod
    def value_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        """The same for values."""

    def key_spectrum(self, group: LayerGroup, heads: int) -> Sequence[float]:
        """Of ordered methods: expected distortion that each number of `heads` latents saves, what `key_distortion`
        falls by."""
        raise AssertionError("stored numbers have no order")

    def value_spectrum(self, group: LayerGroup, heads: int) -> Sequence[float]:
        """The same for values."""
        raise AssertionError("stored numbers have no order")

    def shapes(self, side: str, layer: AttentionLayer, layers: int = 1) -> Sequence[StoredShape]:
        """Of `side`, keys or values; so too `distortion` and `spectrum`."""
        return (self.key_shapes if side == "keys" else self.value_shapes)(layer, layers)

    def distortion(self, side: str, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return (self.key_distortion if side == "keys" else self.value_distortion)(group, shapes)

    def spectrum(self, side: str, group: LayerGroup, heads: int) -> Sequence[float]:
        return (self.key_spectrum if side == "keys" else self.value_spectrum)(group, heads)

    def scale(self, side: str, group: LayerGroup) -> float:
        """What expected distortions of a side are to be multiplied by to compare layers and sides; 1 where nothing says
        how."""
        return 1.0

    def instead(
        self, layers: Sequence[AttentionLayer], kv_budget: float, *, named: bool, predicts: bool = True
    ) -> dict[str, Any] | None:
        """The method, with its fields as in recipes, that takes the place of this one for such layers and so many of the
        bytes; None where it suits them. named: somebody asked for this one, or for some of its fields. predicts: as
        `Runtime` has it."""
        return None

    @abstractmethod
    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        """The cache that `layer` owns, with the chosen shapes."""

    @abstractmethod
    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        """The weights that obey `spec`, layer by layer in the group's order, in float64."""


class PredictedWidth(WidthMethod):
    """A method with one latent of keys and values, A x, which also serves where a part of x is known."""

    @abstractmethod
    def latents(self, group: LayerGroup, spec: CacheSpec) -> Latents:
        """A and the ways back, for a cache of `spec`."""

    @abstractmethod
    def from_latents(self, group: LayerGroup, spec: CacheSpec, latents: Latents) -> FoldedWeights:
        """The weights of the layer with these latents."""

    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        yield self.from_latents(group, spec, self.latents(group, spec))


CONTRACT = WidthMethod


def method_name(method: WidthMethod) -> str:
    """Its name in recipes: that of its file."""
    return type(method).__module__.rpartition(".")[2]


def groups_of(layers: Sequence[AttentionLayer]) -> dict[str, Any]:
    """Fields of a low-rank method by which heads share latents in groups where layers have more than GROUP of them: by as
    many as those of all layers can be shared out, nearest to GROUP. Nothing where that would be all of a layer (5 or 7)."""
    most = max(layer.num_kv_heads for layer in layers)
    sizes = divisors(math.gcd(*(layer.num_kv_heads for layer in layers)))
    size = min(sizes, key=lambda n: abs(math.log(n / GROUP)))
    return {} if most <= max(GROUP, size) else {"latent": "group", "v_latent": "group", "group_size": size}


def groups_in(layer: AttentionLayer, group_size: int) -> int:
    """Of so many source heads each. Raises RecipeError where that does not divide them."""
    K = layer.num_kv_heads
    if K % group_size:
        raise RecipeError(
            f"width.group_size = {group_size} does not divide the {K} key/value heads of layer {layer.index}; choose one"
            f" of {divisors(K)}."
        )
    return K // group_size


def rope_of(layer: AttentionLayer) -> str:
    """How keys are stored in the layer's cache, as far as rotation goes."""
    return "applied" if layer.rotary_dim else "none"


def plain_spec(layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
    """A cache of these shapes with nothing beside it; methods replace the fields in which theirs differ."""
    return CacheSpec(
        num_kv_heads=keys.num_heads,
        head_dim=keys.width,
        num_v_heads=values.num_heads,
        v_head_dim=values.width,
        k_bits=keys.format,
        v_bits=values.format,
        rope=rope_of(layer),
        window=layer.window,
    )


def as_reader(folded: FoldedWeights) -> FoldedWeights:
    """Without what only the owner of a cache has: the way from hidden states to what is stored."""
    made = ("k_proj", "v_proj", "k_bias", "v_bias", "k_norm", "k_norm_bias", "k_a_proj", "k_a_bias")
    owners = (*made, "k_u_proj", "k_u_bias")
    return dataclasses.replace(folded, **dict.fromkeys(owners))  # type: ignore[arg-type]
