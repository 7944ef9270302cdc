"""autoencoder: latents by small networks beside the linear ways in and back, trained on calibration vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.eigen import Moment
from kvfold.linalg.reduced_rank import Latents, Term, solve
from kvfold.linalg.sensitivity import METRIC
from kvfold.methods.low_rank import LowRankWidth, fisher_metric, restore_mean
from kvfold.methods.width.base import LayerGroup
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape

BATCH = 512
RATE = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder(LowRankWidth):
    """x' = B z + d(z) with z = A x + e(x), where d and e are networks of one hidden layer (GELU), per group of heads.

    It starts as the best linear latents in the metric of `fisher` and minimises the same errors by Adam. Keys and
    values are rebuilt on read, since nothing non-linear can be absorbed.

    hidden: width of the networks' hidden layer. steps: of training, of BATCH vectors each.
    """

    needs: ClassVar[frozenset[str]] = frozenset(
        {"keys_before_rotation", "values", METRIC + "keys_before_rotation", METRIC + "values"}
    )
    needs_vectors: ClassVar[frozenset[str]] = frozenset({"keys_before_rotation", "values"})
    centres_values: ClassVar[bool] = True
    centres_keys: ClassVar[bool] = True
    rebuilds_on_read: ClassVar[bool] = True
    spans_layers: ClassVar[bool] = False

    ordered: ClassVar[bool] = False

    v_latent: str = "layer"
    hidden: int = 64
    steps: int = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1 or self.steps < 0:
            raise RecipeError("width.hidden must be at least 1, width.steps at least 0.")
        if self.grouping != "neighbours":
            raise RecipeError("width method 'autoencoder' groups neighbours only.")

    def key_term(self, group: LayerGroup, position: int) -> Term:
        keys = group.moments(0)["keys_before_rotation"].covariance_FF
        return Term(keys, keys, fisher_metric(group, "keys_before_rotation", self.latent))

    def value_term(self, group: LayerGroup, position: int) -> Term:
        values = group.moments(0)["values"].covariance_FF
        return Term(values, values, fisher_metric(group, "values", self.v_latent))

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        spec = super().spec(layer, keys, values)
        # the networks know the latents as they are
        return dataclasses.replace(spec, k_projection=True, v_projection=True, hidden=self.hidden, stored_bias=False)

    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        weights, moments = group.weights(0), group.moments(0)
        keys = self._train(group, self.key_term(group, 0), "keys_before_rotation", spec.num_kv_heads, spec.head_dim)
        values = self._train(group, self.value_term(group, 0), "values", spec.num_v_heads, spec.v_head_dim)
        offset_CF = keys.missing(_mean(moments["keys_before_rotation"], spec.num_kv_heads))
        missing_F = values.missing(_mean(moments["values"], spec.num_v_heads)).flatten()
        folded = FoldedWeights.of(
            weights,
            **{f"k_{name}": tensor for name, tensor in keys.tensors().items()},
            **{f"v_{name}": tensor for name, tensor in values.tensors().items()},
            k_b_bias=offset_CF if spec.k_offset else None,
        )
        yield restore_mean(folded, missing_F.unflatten(0, (group.owner.num_kv_heads, -1)))

    def _train(self, group: LayerGroup, term: Term, name: str, heads: int, width: int) -> _Networks:
        latents = solve(lambda position: term, 1, heads, width)
        networks = _Networks(latents, self.hidden)
        if heads * width < len(term.second_FF):  # else nothing is lost, and nothing is to be learnt
            x_TCF = group.vectors(0)[name].double() - group.moments(0)[name].mean_F
            assert term.metric is not None, "both sides have a metric"
            (root,) = term.metric.powers(0.5)
            networks.train(x_TCF.unflatten(1, (heads, -1)), root, self.steps)
        return networks


def _mean(moment: Moment, heads: int) -> Tensor:
    return moment.mean_F.unflatten(0, (heads, -1))


class _Networks:
    """The ways in and back of one side. Vectors are taken without their mean; what that shifts is put right by `missing`."""

    def __init__(self, latents: Latents, hidden: int) -> None:
        a_CRF, b_CFR = latents.a_CRF, latents.back(0)
        self.a_CRF, self.b_CFR = a_CRF, b_CFR
        C, R, F = a_CRF.shape
        generator = torch.Generator().manual_seed(0)
        self.parts = {
            "a_up_proj": self._random(generator, C, hidden, F) * a_CRF.norm(dim=(1, 2))[:, None, None] / R**0.5,
            "a_up_bias": torch.zeros(C, hidden, dtype=torch.float64),
            "a_down_proj": torch.zeros(C, R, hidden, dtype=torch.float64),
            "b_up_proj": self._random(generator, C, hidden, R),
            "b_up_bias": torch.zeros(C, hidden, dtype=torch.float64),
            "b_down_proj": torch.zeros(C, F, hidden, dtype=torch.float64),
        }

    @staticmethod
    def _random(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    def tensors(self) -> dict[str, Tensor]:
        """By the names that follow `k_` or `v_` in FoldedWeights."""
        return {"a_proj": self.a_CRF, "b_proj": self.b_CFR} | self.parts

    def missing(self, mean_CF: Tensor) -> Tensor:
        """[C, F]: what must be added so that the mean comes back as itself, since the networks were trained around it.

        Biases of the hidden layers take the mean out, so that the runtime may hand over vectors as they are.
        """
        self.parts["a_up_bias"] = self.parts["a_up_bias"] - torch.einsum("chf,cf->ch", self.parts["a_up_proj"], mean_CF)
        shift_CR = torch.einsum("crf,cf->cr", self.a_CRF, mean_CF)  # z carries A mean along
        self.parts["b_up_bias"] = self.parts["b_up_bias"] - torch.einsum(
            "chr,cr->ch", self.parts["b_up_proj"], shift_CR
        )
        return mean_CF - torch.einsum("cfr,cr->cf", self.b_CFR, shift_CR)

    def train(self, x_TCF: Tensor, root: BlockDiagonal, steps: int) -> None:
        """Minimise E |S (x - x')|^2, by Adam with a cosine schedule, in float32."""
        generator = torch.Generator().manual_seed(1)
        with torch.enable_grad():
            parts = {name: part.float().requires_grad_() for name, part in self.parts.items()}
            linear = [tensor.float().clone().requires_grad_() for tensor in (self.a_CRF, self.b_CFR)]
            groups: list[dict[str, Any]] = [{"params": [*parts.values()]}, {"params": linear, "lr": RATE / 10}]
            optimizer = torch.optim.Adam(groups, lr=RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
            x, single = x_TCF.float(), BlockDiagonal(root.blocks_nbb.float())
            scale = _weighed(single, x).square().mean()
            for _ in range(steps):
                rows = torch.randint(len(x), (BATCH,), generator=generator)
                error = _weighed(single, x[rows] - _there_and_back(x[rows], parts, *linear))
                optimizer.zero_grad()
                (error.square().mean() / scale).backward()
                optimizer.step()
                schedule.step()
        trained = {name: part.detach().double() for name, part in parts.items()}
        a_CRF, b_CFR = (tensor.detach().double() for tensor in linear)
        before = _lost(x_TCF, root, self.parts, self.a_CRF, self.b_CFR)
        if _lost(x_TCF, root, trained, a_CRF, b_CFR) < before:  # where the start loses nothing, Adam only walks about
            self.parts, self.a_CRF, self.b_CFR = trained, a_CRF, b_CFR


def _lost(x_TCF: Tensor, root: BlockDiagonal, parts: dict[str, Tensor], a_CRF: Tensor, b_CFR: Tensor) -> float:
    return float(_weighed(root, x_TCF - _there_and_back(x_TCF, parts, a_CRF, b_CFR)).square().mean())


def _weighed(root: BlockDiagonal, x_TCF: Tensor) -> Tensor:
    return root @ x_TCF.flatten(1).T


def _there_and_back(x_TCF: Tensor, parts: dict[str, Tensor], a_CRF: Tensor, b_CFR: Tensor) -> Tensor:
    x = x_TCF.transpose(0, 1)  # one group after the other
    z = x @ a_CRF.transpose(1, 2) + _network(x, parts, "a")
    return (z @ b_CFR.transpose(1, 2) + _network(z, parts, "b")).transpose(0, 1)


def _network(x_CTF: Tensor, parts: dict[str, Tensor], way: str) -> Tensor:
    inner = x_CTF @ parts[f"{way}_up_proj"].transpose(1, 2) + parts[f"{way}_up_bias"].unsqueeze(1)
    return torch.nn.functional.gelu(inner) @ parts[f"{way}_down_proj"].transpose(1, 2)
