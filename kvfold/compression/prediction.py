"""What is left to store of a layer once the numbers are known that layers below it store.

Keys and values of neighbouring layers are maps of hidden states that differ by what one layer adds, so that the stored
numbers of the layers below say much of them: for keys and values x (without their mean) and those numbers s, as they come out
of the cache, the best P in E_w |x - P s|^2, w being the weights of `sensitivity.py`. What is stored is x - P s, by the method
that would store x; and x is read as B z + P s. This is predictive coding across depth: layer by layer from the first up,
since what a layer stores depends on what those below it really give back, quantized.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.compression.fold import folded_weights
from kvfold.compression.request import Groups
from kvfold.linalg.eigen import Moment
from kvfold.linalg.reduced_rank import Latents
from kvfold.linalg.regression import regression
from kvfold.linalg.sensitivity import RECENT, WEIGHTED, weighted_outer_sum
from kvfold.methods.width.base import LayerGroup, PredictedWidth, Tokens, WidthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.folded_weights import FoldedWeights, beside
from kvfold.plan.plan import CachePlan
from kvfold.plan.tensors import tensor_shapes
from kvfold.runtimes.kernels.dispatch import roundtrip


@dataclass
class Form:
    """One form of a layer's tokens (there is a second one of recent tokens): its layer group, whose moments are those of what
    is left to store, what a cache of nothing but this form would be, P [F, S] (None where no layer below is read), and what
    is left of the calibration tokens [T, F]."""

    width: PredictedWidth
    group: LayerGroup
    spec: CacheSpec
    back_FS: Tensor | None
    left_TF: Tensor

    @functools.cached_property
    def latents(self) -> Latents:
        return self.width.latents(self.group, self.spec)

    def through_the_cache(self) -> Tensor:
        """[T, R]: the calibration tokens as the layer's cache gives them back."""
        numbers_TR = self.left_TF @ self.latents.a_CRF[0].T.to(self.left_TF)
        return roundtrip(numbers_TR[None, None], self.spec.k_bits)[0, 0]

    def folded(self) -> FoldedWeights:
        """The weights, with what the numbers of layers below add to what is read and take from what is stored."""
        folded = self.width.from_latents(self.group, self.spec, self.latents)
        if self.back_FS is None:
            return folded
        assert folded.k_b_proj is not None and folded.v_b_proj is not None, "one latent"
        keys_HS, values_HS = self.back_FS.chunk(2)
        return dataclasses.replace(
            folded,
            k_b_proj=torch.cat([folded.k_b_proj, keys_HS[None]], dim=2),
            v_b_proj=torch.cat([folded.v_b_proj, values_HS[None]], dim=2),
            k_p_proj=self.latents.a_CRF[0] @ self.back_FS,
        )


class Prediction:
    """The layers of one plan, each given what the layers below it store. `groups`: the same without."""

    def __init__(self, groups: Groups, plan: CachePlan, width: WidthMethod) -> None:
        self.groups, self.plan, self.width = groups, plan, width
        self.stored: dict[int, list[Tensor]] = {}
        self.forms = functools.lru_cache(maxsize=1)(self._forms)

    def group(self, owner: int) -> LayerGroup:
        """The layer, of whose tokens only that counts which is left to store."""
        return self.forms(owner)[0].group if self.plan.cache_of(owner).predicted_from else self.groups(owner)

    def folded(self, owner: int) -> Iterator[FoldedWeights]:
        """The weights of the layers that use a cache."""
        spec = self.plan.cache_of(owner)
        if not spec.predicted_from and owner not in self.plan.last_predicted:
            yield from folded_weights(self.width, self.groups(owner), spec)
            return
        far, *near = (form.folded() for form in self.forms(owner))
        yield beside(tensor_shapes(self.groups(owner).owner, spec), far, *near) if near else far

    def _forms(self, owner: int) -> list[Form]:
        """Of all tokens, then of recent ones where those have their own."""
        group, spec = self.groups(owner), self.plan.cache_of(owner)
        tokens, specs = group.tokens(), [spec.of_all, *([spec.of_recent] if spec.recent_head_dim else [])]
        left: list[tuple[Tensor | None, Tensor]] = [(None, tokens.x_TF) for _ in specs]
        if spec.predicted_from:
            left = [self._what_is_left(at, spec, tokens) for at in range(len(specs))]
            group = self._of_what_is_left(group, tokens, [x_TF for _, x_TF in left])
        assert isinstance(self.width, PredictedWidth), "only such methods leave out what layers below say"
        forms = zip((group, group.of_recent), specs, left, strict=False)
        return [Form(self.width, of_age, form, *parts) for of_age, form, parts in forms]

    def _what_is_left(self, at: int, spec: CacheSpec, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """P, and the tokens without what it says."""
        form = (spec, spec.of_recent)[at]
        below_TS = [self._stored_by(below)[at] for below in spec.predicted_from]
        known_TS = torch.cat([x_TS[:, : form.predicting(x_TS.shape[1])] for x_TS in below_TS], dim=1)
        back_FS = regression(known_TS, tokens.x_TF, tokens.weights[at])
        return back_FS, tokens.x_TF - known_TS @ back_FS.T.to(known_TS)

    def _of_what_is_left(self, group: LayerGroup, tokens: Tokens, left: list[Tensor]) -> LayerGroup:
        (part,) = self.width.parts
        known = group.moments(0)
        found = {
            age + WEIGHTED + part: _about(known[WEIGHTED + part], x_TF, weight_T)
            for age, x_TF, weight_T in zip(("", RECENT), left, tokens.weights, strict=False)
        }

        def moments(position: int) -> Mapping[str, Moment]:
            return {**known, **found}

        return dataclasses.replace(group, moments=moments)

    def _stored_by(self, layer: int) -> list[Tensor]:
        """Per form, what the layer's cache gives back; what no layer above it reads is forgotten."""
        if layer not in self.stored:
            self.stored = {i: kept for i, kept in self.stored.items() if self.plan.last_predicted[i] > layer}
            self.stored[layer] = [form.through_the_cache() for form in self.forms(layer)]
        return self.stored[layer]


def _about(moment: Moment, x_TF: Tensor, weight_T: Tensor) -> Moment:
    """The moment of mean + x, of weighted tokens."""
    mean_F = moment.mean_F
    covariance_FF = weighted_outer_sum(x_TF, weight_T) / weight_T.double().sum()
    return Moment(mean_F, covariance_FF + mean_F[:, None] * mean_F, moment.count)
