"""mla: one latent for keys and values of a layer, as in multi-head latent attention (arXiv 2405.04434), in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.quantization_basis import arranged, centred
from kvfold.linalg.reduced_rank import Latents, Term, distortions, energy, solve, spectrum
from kvfold.linalg.sensitivity import METRIC, TOKENS, WEIGHTED, sensitivities
from kvfold.methods.low_rank import fuse_keys, latent_widths, restore_mean, store_values
from kvfold.methods.width.base import LayerGroup, PredictedWidth, groups_in, groups_of, plain_spec
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
LEAST_APART = 1 / 4
"""Share of the bytes from which on keys and values have latents of their own where nothing says how: they lose less there,
and queries meet half as many numbers (docs/log.md)."""
BELOW = 3
"""Layers below whose numbers say something of a layer, where nothing says how many."""
WIDEST = 2048
"""Numbers of keys and values of a layer up to which they share a latent. Beyond, which is multi-head attention of large
models, solving for it would take hours: eight times what keys and values take apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mla(PredictedWidth):
    """Keys before rotation and values of a layer are linear maps of the same hidden state, so that one latent of both says
    more per number than two. Errors count in nats, as in `fisher`; keys are rebuilt on read.

    Layers of more than WIDEST numbers are left to `fisher`; so are, where nobody asked for `mla`, from LEAST_APART of the
    bytes on all layers, and at all budgets those whose query heads have one of many key heads each (`groups_of`): queries
    of all heads would meet the whole of one latent. Of other layers with many key heads groups have latents, down to
    LEAST_BANDED.

    rope: `on_read` stores what comes of keys before rotation; `banded` after it where angles change fast, as in `fisher`.
        Without it banded from LEAST_BANDED of the bytes on, and wherever this is left to `fisher`.
    below: layers stand in runs of so many and one more, and each stores only what the numbers of those below it in its run do
        not say (`compression/prediction.py`); 0 for none. Without it BELOW, or none with a group_size.
    leading, recent_leading: the first so many numbers of each of those layers say it, which hold most of what there is; of
        recent tokens so many. Every step reads them again, so that fewer are faster; 0 for all, which is smaller. Without
        `leading` as many as leave a step fewer numbers to read than the original has (`compression/request.py`); without
        `recent_leading` as many as RECENT_LEADING says.
    kv_heads: as many numbers as so many source heads of keys and of values; 0 leaves the choice to the budget.
    group_size: neighbouring source heads whose keys and values share a latent; 0 for all. What layers below say goes with
        one latent only.
    multiple: stored widths are multiples of this.
    """

    ordered: ClassVar[bool] = True
    two_forms: ClassVar[bool] = True
    in_nats: ClassVar[bool] = True

    rope: str | None = None
    below: int | None = None  # type: ignore[assignment]
    leading: int | None = None  # type: ignore[assignment]
    recent_leading: int | None = None
    kv_heads: int = 0
    group_size: int = 0
    multiple: int = 8

    def __post_init__(self) -> None:
        if self.below is None:
            object.__setattr__(self, "below", 0 if self.group_size else BELOW)
        if self.rope is not None and self.rope not in ROPES:
            raise RecipeError(f"width.rope = {self.rope!r}; choose 'on_read' or 'banded'.")
        if (
            self.multiple < 1
            or min(self.kv_heads, self.group_size, self.below or 0, self.leading or 0, self.recent_leading or 0) < 0
        ):
            raise RecipeError(
                "width.multiple must be at least 1, width.kv_heads, width.group_size, width.below, width.leading and"
                " width.recent_leading at least 0."
            )
        if self.group_size and self.below:
            raise RecipeError(
                f"width.group_size = {self.group_size}: latents of groups are not predicted by layers below; leave"
                " width.below out."
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

    def instead(
        self, layers: Sequence[AttentionLayer], kv_budget: float, *, named: bool, predicts: bool = True
    ) -> dict[str, Any] | None:
        banded = {"method": "fisher", "rope": "banded"}
        groups = groups_of(layers)
        multi_head = bool(groups) and all(layer.num_attention_heads == layer.num_kv_heads for layer in layers)
        if not named and (multi_head or kv_budget >= LEAST_APART):
            return banded | groups
        if max(2 * layer.num_kv_heads * layer.head_dim for layer in layers) > WIDEST:
            return banded | ({} if named else groups) | {"rope": "banded" if self._banded else "on_read"}
        if self.rope is None and kv_budget < LEAST_BANDED:
            own = {name: value for name, value in vars(self).items() if value != getattr(Mla(), name)}
            return {"method": "mla", **own, "rope": "on_read"}
        if groups and not named:
            return {"method": "mla", "group_size": groups["group_size"], "below": 0}
        return None if named or predicts else {"method": "mla", "below": 0}

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        if layers > 1:
            raise RecipeError("width method 'mla' does not span layers; use logit or mean_pool with a depth method.")
        if layer.num_kv_heads < self.kv_heads:
            raise RecipeError(
                f"width.kv_heads = {self.kv_heads}, but layer {layer.index} has {layer.num_kv_heads} key/value heads."
            )
        heads = self._heads(layer)
        if self.kv_heads:
            if 2 * self.kv_heads * layer.head_dim % heads:
                raise RecipeError(
                    f"width.kv_heads = {self.kv_heads}: its {2 * self.kv_heads * layer.head_dim} numbers of layer"
                    f" {layer.index} are not to be shared out among {heads} latents (width.group_size = {self.group_size})."
                )
            return [StoredShape(heads, 2 * self.kv_heads * layer.head_dim // heads)]
        limit = 2 * layer.num_kv_heads * layer.head_dim // heads
        return [StoredShape(heads, width) for width in latent_widths(limit, self.multiple)]

    def _heads(self, layer: AttentionLayer) -> int:
        """Latents of a layer."""
        return groups_in(layer, self.group_size) if self.group_size else 1

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
        layer, weights, mean_CF = group.owner, group.weights(0), self._mean(group)
        back_CFR, half = latents.back(0), mean_CF.shape[1] // 2
        folded = FoldedWeights.of(
            weights,
            k_a_proj=latents.a_CRF[:, :, :half],
            k_b_proj=back_CFR[:, :half],
            v_b_proj=back_CFR[:, half:],
            k_b_bias=mean_CF[:, :half] if spec.k_offset else None,
        )
        folded = store_values(folded, latents.a_CRF[:, :, half:])
        assert latents.centre_CR is not None, "latents are stored without their mean"
        folded = _joined(layer, folded, spec, latents.centre_CR)
        return restore_mean(folded, mean_CF[:, half:].reshape(layer.num_kv_heads, -1))

    def latents(self, group: LayerGroup, spec: CacheSpec) -> Latents:
        term = self._term(group)
        latents = solve(lambda position: term, 1, spec.num_kv_heads, spec.head_dim)
        if spec.k_bits is not None:
            latents = arranged(latents, lambda position: term, 1, term.second_FF, spec.k_bits)
        return centred(latents, self._mean(group).flatten())

    def _term(self, group: LayerGroup) -> Term:
        moments, order_F = group.moments(0), self._order(group.owner)
        covariance_FF, metric = moments[WEIGHTED + self.part].covariance_FF, moments[METRIC + self.part].second_FF
        if order_F is None:
            return Term(covariance_FF, covariance_FF, BlockDiagonal(metric))
        covariance_FF = covariance_FF[order_F][:, order_F]
        return Term(covariance_FF, covariance_FF, BlockDiagonal(torch.block_diag(*metric)[order_F][:, order_F][None]))

    def _mean(self, group: LayerGroup) -> Tensor:
        """[C, F/C]: of the keys and then the values of each group of heads."""
        mean_F, order_F = group.moments(0)[WEIGHTED + self.part].mean_F, self._order(group.owner)
        return (mean_F if order_F is None else mean_F[order_F]).unflatten(0, (self._heads(group.owner), -1))

    def _order(self, layer: AttentionLayer) -> Tensor | None:
        """Keys of all heads, then values -> group by group, keys first; None where there is one group."""
        if (heads := self._heads(layer)) == 1:
            return None
        return torch.arange(2 * layer.num_kv_heads * layer.head_dim).view(2, heads, -1).transpose(0, 1).flatten()


def _joined(layer: AttentionLayer, folded: FoldedWeights, spec: CacheSpec, centre_CR: Tensor) -> FoldedWeights:
    """What keys and what values add to the latent: one projection, unless keys are normalised or rotated before."""
    if meets_keys(layer, spec):
        return dataclasses.replace(folded, k_a_bias=-centre_CR)
    folded = fuse_keys(layer, folded, spec)
    biases = [bias for bias in (folded.k_bias, folded.v_bias) if bias is not None]
    assert folded.k_proj is not None and folded.v_proj is not None, "the layer owns its cache"
    return dataclasses.replace(
        folded,
        k_proj=folded.k_proj + folded.v_proj,
        k_bias=sum(biases, -centre_CR.flatten()),
        v_proj=None,
        v_bias=None,
    )
