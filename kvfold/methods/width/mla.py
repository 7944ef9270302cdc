"""mla: one latent for keys and values of a layer, as in multi-head latent attention (arXiv 2405.04434), in closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.quantization_basis import arranged, centred
from kvfold.linalg.reduced_rank import Latents, Term, distortions, energy, solve, spectrum
from kvfold.linalg.sensitivity import METRIC, TOKENS, WEIGHTED, sensitivities
from kvfold.methods.low_rank import fuse_keys, latent_widths, restore_mean, store_values
from kvfold.methods.width.base import LayerGroup, PredictedWidth, plain_spec
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape
from kvfold.plan.tensors import meets_keys

BOTH, BANDED = "keys_and_values", "banded_keys_and_values"
ROPES = ("on_read", "banded")
LEAST_BANDED = 1 / 12
"""Share of the bytes below which keys are stored before rotation in all pairs where nothing says how: the time that storing
some after it saves costs too much there (docs/log.md)."""
RECENT_LEADING = {"banded": 16, "on_read": 256}
"""Of recent tokens, how many numbers of each layer below say something of a layer: where steps are to be fast few, since they
are read again; from an eighth of the bytes on more save nothing (docs/log.md)."""
GROUP = 4
"""Heads whose keys share a latent, and whose values do, where every query head has its own: in Llama-2-7B's shape a step is
faster than the original's so, and takes twice its time with one latent for all (docs/log.md)."""
WIDEST = 2048
"""Numbers of keys and values of a layer up to which they share a latent. Beyond, which is multi-head attention of large
models, solving for it would take hours: eight times what keys and values take apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mla(PredictedWidth):
    """Keys before rotation and values of a layer are linear maps of the same hidden state, so that one latent of both says
    more per number than two. Errors count in nats, as in `fisher`; keys are rebuilt on read.

    Layers of more than WIDEST numbers are left to `fisher`; so are, where nobody asked for `mla`, those whose query heads
    have a key head each: queries of all heads would meet the whole of one latent.

    rope: `on_read` stores what comes of keys before rotation; `banded` after it where angles change fast, as in `fisher`.
        Without it banded from LEAST_BANDED of the bytes on.
    below: layers stand in runs of so many and one more, and each stores only what the numbers of those below it in its run do
        not say (`compression/prediction.py`); 0 for none.
    leading, recent_leading: the first so many numbers of each of those layers say it, which hold most of what there is; of
        recent tokens so many. Every step reads them again, so that fewer are faster; 0 for all, which is smaller. Without
        `leading` as many as leave a step fewer numbers to read than the original has (`compression/request.py`); without
        `recent_leading` as many as RECENT_LEADING says.
    kv_heads: as many numbers as so many source heads of keys and of values; 0 leaves the choice to the budget.
    multiple: stored widths are multiples of this.
    """

    ordered: ClassVar[bool] = True
    two_forms: ClassVar[bool] = True
    in_nats: ClassVar[bool] = True

    rope: str | None = None
    below: int = 3
    leading: int | None = None  # type: ignore[assignment]
    recent_leading: int | None = None
    kv_heads: int = 0
    multiple: int = 8

    def __post_init__(self) -> None:
        if self.rope is not None and self.rope not in ROPES:
            raise RecipeError(f"width.rope = {self.rope!r}; choose 'on_read' or 'banded'.")
        if self.multiple < 1 or min(self.kv_heads, self.below, self.leading or 0, self.recent_leading or 0) < 0:
            raise RecipeError(
                "width.multiple must be at least 1, width.kv_heads, width.below, width.leading and width.recent_leading at"
                " least 0."
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return sensitivities(self.part) | ({TOKENS + self.part} if self.below else set())

    @property
    def leading_of_recent(self) -> int:
        return (
            RECENT_LEADING["banded" if self._banded else "on_read"]
            if self.recent_leading is None
            else self.recent_leading
        )

    @property
    def part(self) -> str:
        """The statistic of keys and values."""
        return BANDED if self._banded else BOTH

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.part,)

    @property
    def _banded(self) -> bool:
        return self.rope != "on_read"

    def instead(self, layers: Sequence[AttentionLayer], kv_budget: float, *, named: bool) -> dict[str, Any] | None:
        if not named and all(layer.num_attention_heads == layer.num_kv_heads > GROUP for layer in layers):
            groups = {"latent": "group", "v_latent": "group", "group_size": _group(layers)}
            return {"method": "fisher", "rope": "banded"} | groups
        if max(2 * layer.num_kv_heads * layer.head_dim for layer in layers) > WIDEST:
            return {"method": "fisher", "rope": "banded" if self._banded else "on_read"}
        if self.rope is None and kv_budget < LEAST_BANDED:
            own = {name: value for name, value in vars(self).items() if value != getattr(type(self), name)}
            return {"method": "mla", **own, "rope": "on_read"}
        return None

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        if layers > 1:
            raise RecipeError("width method 'mla' does not span layers; use logit or mean_pool with a depth method.")
        if layer.num_kv_heads < self.kv_heads:
            raise RecipeError(
                f"width.kv_heads = {self.kv_heads}, but layer {layer.index} has {layer.num_kv_heads} key/value heads."
            )
        if self.kv_heads:
            return [StoredShape(1, 2 * self.kv_heads * layer.head_dim)]
        limit = 2 * layer.num_kv_heads * layer.head_dim
        return [StoredShape(1, width) for width in latent_widths(limit, self.multiple)]

    def key_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return distortions(lambda position: self._term(group), 1, shapes)

    def key_spectrum(self, group: LayerGroup, heads: int) -> list[float]:
        return spectrum(lambda position: self._term(group), 1, heads)

    def value_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return self.key_shapes(layer, layers)

    value_distortion, value_spectrum = key_distortion, key_spectrum

    def scale(self, side: str, group: LayerGroup) -> float:
        return float(energy(self._term(group))) / 2

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape | None = None) -> CacheSpec:
        rotates = layer.rotary_dim > 0
        return dataclasses.replace(
            plain_spec(layer, keys, keys._replace(format=None)),
            rope="on_read" if rotates else "none",
            fast_pairs=layer.fast_pairs if self._banded else 0,
            shared_latent=True,
            k_projection=True,
            v_projection=True,
            k_offset=rotates,
            output_bias=True,
            stored_bias=True,
        )

    def from_latents(self, group: LayerGroup, spec: CacheSpec, latents: Latents) -> FoldedWeights:
        layer, weights, mean_F = group.owner, group.weights(0), group.moments(0)[WEIGHTED + self.part].mean_F
        back_1FR, half = latents.back(0), len(mean_F) // 2
        folded = FoldedWeights.of(
            weights,
            k_a_proj=latents.a_CRF[:, :, :half],
            k_b_proj=back_1FR[:, :half],
            v_b_proj=back_1FR[:, half:],
            k_b_bias=mean_F[None, :half] if spec.k_offset else None,
        )
        folded = store_values(folded, latents.a_CRF[:, :, half:])
        assert latents.centre_CR is not None, "latents are stored without their mean"
        folded = _joined(layer, folded, spec, latents.centre_CR)
        return restore_mean(folded, mean_F[half:].unflatten(0, (layer.num_kv_heads, -1)))

    def latents(self, group: LayerGroup, spec: CacheSpec) -> Latents:
        term = self._term(group)
        latents = solve(lambda position: term, 1, 1, spec.head_dim)
        if spec.k_bits is not None:
            latents = arranged(latents, lambda position: term, 1, term.second_FF, spec.k_bits)
        return centred(latents, group.moments(0)[WEIGHTED + self.part].mean_F)

    def _term(self, group: LayerGroup) -> Term:
        moments = group.moments(0)
        covariance_FF = moments[WEIGHTED + self.part].covariance_FF
        return Term(covariance_FF, covariance_FF, BlockDiagonal(moments[METRIC + self.part].second_FF))


def _group(layers: Sequence[AttentionLayer]) -> int:
    """The most heads, up to GROUP, by which those of all layers can be shared out."""
    heads = math.gcd(*(layer.num_kv_heads for layer in layers))
    return max(size for size in range(1, GROUP + 1) if heads % size == 0)


def _joined(layer: AttentionLayer, folded: FoldedWeights, spec: CacheSpec, centre_1R: Tensor) -> FoldedWeights:
    """What keys and what values add to the latent: one projection, unless keys are normalised or rotated before."""
    if meets_keys(layer, spec):
        return dataclasses.replace(folded, k_a_bias=-centre_1R)
    folded = fuse_keys(layer, folded, spec)
    biases = [bias for bias in (folded.k_bias, folded.v_bias) if bias is not None]
    assert folded.k_proj is not None and folded.v_proj is not None, "the layer owns its cache"
    return dataclasses.replace(
        folded,
        k_proj=folded.k_proj + folded.v_proj,
        k_bias=sum(biases, -centre_1R.flatten()),
        v_proj=None,
        v_bias=None,
    )
