"""What all low-rank width methods share: the shapes of latents, and how latents become folded weights.

A method says what it wants to keep (a `Term` per layer); `latents.solve` finds A and B; this file puts them into weights.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.errors import RecipeError
from kvfold.linalg.block_diagonal import BlockDiagonal
from kvfold.linalg.quantization_basis import arranged, centred
from kvfold.linalg.reduced_rank import Latents, Term, distortions, lost_energy, part_of, solve, spectrum
from kvfold.linalg.sensitivity import METRIC
from kvfold.methods.width._head_grouping import GROUPINGS, best_order, head_columns, reordered
from kvfold.methods.width.base import LayerGroup, WidthMethod, as_reader, groups_in, method_name, plain_spec, rope_of
from kvfold.plan.cache_spec import CacheSpec, divisors
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.number_format import StoredShape
from kvfold.plan.tensors import meets_keys

LATENTS = ("layer", "group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankWidth(WidthMethod):
    """Keys and values in the latents that keep best what the method names.

    latent: `layer` stores one key latent for all heads of a layer (the strategy of arXiv 2406.07056 for RoPE keys, section
        3.4), `group` one per group of neighbouring heads, at most as wide as a head (its section 3.3).
    v_latent: the same choice for values. Latents wider than a head keep a small `v_b_proj` instead of a huge `o_proj`.
    group_size: source heads per group, on the sides whose latent is per group; 0 takes the largest groups that reach a
        size, since bigger groups lose less.
    kv_heads: keys and values take as many numbers as so many source heads; 0 leaves the choice to the budget.
    multiple: stored widths are multiples of this, as attention kernels want them.
    grouping: `neighbours`, or `similar`, which lets those heads share a latent that lose least together (heads are reordered,
        but not with ALiBi, which goes by head; where keys and values are grouped differently, keys decide).
    `centres_values`: the terms are about values without their mean, which becomes one output bias.
    `centres_keys`: the terms are about keys without their mean, which is given back where keys are rebuilt on read. Keys that
    are stored after rotation do without it: softmax ignores what is added to all scores of a query.
    `rebuilds_on_read`: keys are stored before rotation; every step rebuilds and rotates what it reads. `banded`: of those the
        pairs that turn fast are stored after it.
    `spans_layers`: the terms know layers that read another one's cache.
    """

    latent: str = "layer"
    v_latent: str = "group"
    group_size: int = 0
    kv_heads: int = 0
    multiple: int = 8
    grouping: str = "neighbours"

    ordered: ClassVar[bool] = True
    centres_values: ClassVar[bool] = False
    centres_keys: ClassVar[bool] = False
    rebuilds_on_read: ClassVar[bool] = False
    banded: ClassVar[bool] = False
    spans_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("latent", "v_latent"):
            if getattr(self, name) not in LATENTS:
                raise RecipeError(f"width.{name} = {getattr(self, name)!r}; choose 'layer' or 'group'.")
        if self.grouping not in GROUPINGS:
            raise RecipeError(f"width.grouping = {self.grouping!r}; choose 'neighbours' or 'similar'.")
        if self.multiple < 1 or self.group_size < 0 or self.kv_heads < 0:
            raise RecipeError("width.multiple must be at least 1, width.group_size and width.kv_heads at least 0.")

    @abstractmethod
    def key_term(self, group: LayerGroup, position: int) -> Term:
        """What the layer at `position` wants to know of the owner's keys; matrices [K*H, K*H]."""

    @abstractmethod
    def value_term(self, group: LayerGroup, position: int) -> Term:
        """The same for values."""

    def key_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return self._shapes_of(layer, layers, self.latent)

    def value_shapes(self, layer: AttentionLayer, layers: int = 1) -> list[StoredShape]:
        return self._shapes_of(layer, layers, self.v_latent)

    def _shapes_of(self, layer: AttentionLayer, layers: int, latent: str) -> list[StoredShape]:
        if layers > 1 and not self.spans_layers:
            raise RecipeError(
                f"width method {method_name(self)!r} does not span layers; use logit or mean_pool with a depth method."
            )
        if not self.kv_heads:
            return self._shapes(layer, latent)
        if layer.num_kv_heads < self.kv_heads or (latent == "group" and layer.num_kv_heads % self.kv_heads):
            raise RecipeError(
                f"width.kv_heads = {self.kv_heads} does not divide the {layer.num_kv_heads} key/value heads of layer"
                f" {layer.index}; choose one of {divisors(layer.num_kv_heads)}."
            )
        heads = 1 if latent == "layer" else self.kv_heads
        return [StoredShape(heads, self.kv_heads * layer.head_dim // heads)]

    def _shapes(self, layer: AttentionLayer, latent: str) -> list[StoredShape]:
        K, H = layer.num_kv_heads, layer.head_dim
        if latent == "layer":
            return [StoredShape(1, width) for width in latent_widths(K * H, self.multiple)]
        sizes = [K // groups_in(layer, self.group_size)] if self.group_size else divisors(K)
        # Of the shapes with equally many numbers the one with the largest groups wins: later sizes overwrite.
        best = {}
        for t in sizes:
            limit = t * H if self.group_size else H
            best.update({K // t * width: StoredShape(K // t, width) for width in latent_widths(limit, self.multiple)})
        return [best[elements] for elements in sorted(best)]

    def key_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return distortions(lambda i: self.key_term(group, i), len(group), shapes)

    def value_distortion(self, group: LayerGroup, shapes: Sequence[StoredShape]) -> list[float]:
        return distortions(lambda i: self.value_term(group, i), len(group), shapes)

    def key_spectrum(self, group: LayerGroup, heads: int) -> list[float]:
        return spectrum(lambda i: self.key_term(group, i), len(group), heads)

    def value_spectrum(self, group: LayerGroup, heads: int) -> list[float]:
        return spectrum(lambda i: self.value_term(group, i), len(group), heads)

    @property
    def stored_statistics(self) -> tuple[str, str]:
        """The statistics that keys and values are latents of."""
        return ("keys_before_rotation" if self.rebuilds_on_read else "keys", "values")

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        rope = "on_read" if self.rebuilds_on_read and layer.rotary_dim else rope_of(layer)
        centred = (keys.format or values.format) is not None and {*self.stored_statistics} <= self.needs
        return dataclasses.replace(
            plain_spec(layer, keys, values),
            rope=rope,
            fast_pairs=layer.fast_pairs if self.banded else 0,
            k_projection=layer.rotary_dim > 0 or layer.qk_norm or keys.width > layer.head_dim,
            k_partial=rope == "applied" and 0 < layer.rotary_dim < layer.head_dim and not layer.qk_norm,
            k_offset=rope == "on_read" and (self.centres_keys or centred),
            v_projection=values.width > layer.head_dim,
            output_bias=self.centres_values or centred,
            stored_bias=centred,
        )

    def fold(self, group: LayerGroup, spec: CacheSpec) -> Iterator[FoldedWeights]:
        if self.grouping == "similar" and not group.owner.alibi:
            group = reordered(group, self._order(group, spec))
        keys, values = self._stored_latents(group, spec)
        for position, layer in enumerate(group.layers):
            weights = group.weights(position)
            back_UFV = values.back(position)
            folded = FoldedWeights.of(weights, k_a_proj=keys.a_CRF, k_b_proj=keys.back(position))
            if not position:
                folded = store_values(folded, values.a_CRF)
            if spec.k_offset:
                folded = dataclasses.replace(folded, k_b_bias=self._offset(group, position, keys))
            if not meets_keys(layer, spec):
                folded = fuse_keys(layer, folded, spec)
            if spec.k_partial and not position:
                folded = fuse_unrotated(layer, folded)
            if spec.stored_bias and not position:
                folded = subtract_centres(folded, keys, values)
            if spec.output_bias:
                folded = restore_mean(folded, self._missing(group, position, values))
            folded = lead_values_back(layer, folded, back_UFV, apart=spec.v_projection)
            yield as_reader(folded) if position else folded

    def _stored_latents(self, group: LayerGroup, spec: CacheSpec) -> tuple[Latents, Latents]:
        """Of keys and values, arranged and centred where they are quantized."""
        keys = solve(lambda i: self.key_term(group, i), len(group), spec.num_kv_heads, spec.head_dim)
        values = self.value_latents(group, spec)
        if spec.k_bits is not None:
            covariance_FF = self._covariance(group, 0, self.key_term)
            keys = arranged(keys, lambda i: self.key_term(group, i), len(group), covariance_FF, spec.k_bits)
        if spec.v_bits is not None:
            covariance_FF = self._covariance(group, 1, self.value_term)
            values = arranged(values, lambda i: self.value_term(group, i), len(group), covariance_FF, spec.v_bits)
        if not spec.stored_bias:
            return keys, values
        k_mean_F, v_mean_F = (group.moments(0)[name].mean_F for name in self.stored_statistics)
        if group.owner.softcap is not None and spec.rope != "on_read":  # capped scores notice a constant
            k_mean_F = torch.zeros_like(k_mean_F)
        return centred(keys, k_mean_F), centred(values, v_mean_F)

    def _covariance(self, group: LayerGroup, side: int, term: Callable[[LayerGroup, int], Term]) -> Tensor:
        """What quantization sees vary; of a method without statistics what it takes for that."""
        moment = group.moments(0).get(self.stored_statistics[side])
        return term(group, 0).second_FF if moment is None else moment.covariance_FF

    def _offset(self, group: LayerGroup, position: int, keys: Latents) -> Tensor:
        """[C, F/C]: what is added to rebuilt keys: what was subtracted from the latents, and the layer's mean key without
        what the latents say of it."""
        back_CFR = keys.back(position)
        offset_CF = back_CFR.new_zeros(back_CFR.shape[:2])
        if keys.centre_CR is not None:
            offset_CF = torch.einsum("cfr,cr->cf", back_CFR, keys.centre_CR)
        if not self.centres_keys:
            return offset_CF
        own_CF, owner_CF = (
            group.moments(i)[self.stored_statistics[0]].mean_F.unflatten(0, (len(back_CFR), -1)) for i in (position, 0)
        )
        return offset_CF + own_CF - torch.einsum("cfr,crg,cg->cf", back_CFR, keys.a_CRF, owner_CF)

    def _missing(self, group: LayerGroup, position: int, values: Latents) -> Tensor:
        """[K, H]: what averaged values lack."""
        missing_KH = torch.zeros(group.owner.num_kv_heads, group.owner.head_dim, dtype=torch.float64)
        if self.centres_values:
            missing_KH = self.missing_values(group, position, values)
        if values.centre_CR is None:
            return missing_KH
        subtracted_UF = torch.einsum("ufv,uv->uf", values.back(position), values.centre_CR)
        return missing_KH + subtracted_UF.reshape(missing_KH.shape)

    def _order(self, group: LayerGroup, spec: CacheSpec) -> list[int]:
        """Key/value heads of the owner, group after group."""
        K, C, U = group.owner.num_kv_heads, spec.num_kv_heads, spec.num_v_heads
        grouped = C if 1 < C < K else U
        sides = [(self.key_term(group, 0), spec.head_dim)] if grouped == C else []
        sides += [(self.value_term(group, 0), spec.v_head_dim)] if grouped == U else []

        def loss(members: tuple[int, ...]) -> float:
            columns = head_columns(members, group.owner.head_dim)
            return sum(lost_energy(part_of(term, columns), width) / lost_energy(term, 0) for term, width in sides)

        return best_order(K, grouped, loss)

    def value_latents(self, group: LayerGroup, spec: CacheSpec) -> Latents:
        """A and B_i of values."""
        return solve(lambda i: self.value_term(group, i), len(group), spec.num_v_heads, spec.v_head_dim)

    def missing_values(self, group: LayerGroup, position: int, values: Latents) -> Tensor:
        """[K, H]: the layer's own mean values, without what the latents say of the owner's."""
        back_UFV = values.back(position)
        stored = self.stored_statistics[1]
        owner_UF = group.moments(0)[stored].mean_F.unflatten(0, (back_UFV.shape[0], -1))
        seen_F = torch.einsum("ufv,uvg,ug->uf", back_UFV, values.a_CRF, owner_UF).flatten()
        return (group.moments(position)[stored].mean_F - seen_F).unflatten(0, (group.owner.num_kv_heads, -1))


def latent_widths(limit: int, multiple: int) -> list[int]:
    """Multiples up to `limit`, and `limit` itself, which loses nothing."""
    return sorted({*range(multiple, limit, multiple), limit})


def restore_mean(folded: FoldedWeights, missing_KH: Tensor) -> FoldedWeights:
    """Attention weights sum to one, so values that are always missing are one bias of the output."""
    weights_DKGH = folded.o_proj.unflatten(1, (len(missing_KH), -1, missing_KH.shape[1]))
    bias_D = torch.einsum("dkgh,kh->d", weights_DKGH, missing_KH)
    return dataclasses.replace(folded, o_bias=bias_D if folded.o_bias is None else folded.o_bias + bias_D)


def subtract_centres(folded: FoldedWeights, keys: Latents, values: Latents) -> FoldedWeights:
    """Stored numbers are quantized around their mean; biases take it out where they are made."""
    assert keys.centre_CR is not None and values.centre_CR is not None, "both sides are centred"
    changes: dict[str, Tensor] = {"v_bias": _less(folded.v_bias, values.centre_CR.flatten())}
    if folded.k_a_proj is not None:
        changes["k_a_bias"] = -keys.centre_CR
    else:
        changes["k_bias"] = _less(folded.k_bias, keys.centre_CR.flatten())
    return dataclasses.replace(folded, **changes)


def _less(bias: Tensor | None, centre: Tensor) -> Tensor:
    return -centre if bias is None else bias - centre


def fuse_keys(layer: AttentionLayer, folded: FoldedWeights, spec: CacheSpec) -> FoldedWeights:
    """Nothing rotates, so k_proj gives the latents at once, and q_proj takes the way back where that makes it no larger
    (arXiv 2406.07056, eqs 7-14)."""
    a_CRF, back_CFR = folded.k_a_proj, folded.k_b_proj
    assert a_CRF is not None and back_CFR is not None, "there is a way to the latents and back"
    C, K = len(a_CRF), layer.num_kv_heads
    changes: dict[str, Tensor | None] = {"k_a_proj": None}
    if folded.k_proj is not None:
        changes["k_proj"] = torch.einsum("crf,cfd->crd", a_CRF, folded.k_proj.unflatten(0, (C, -1))).flatten(0, 1)
    if folded.k_bias is not None:
        changes["k_bias"] = torch.einsum("crf,cf->cr", a_CRF, folded.k_bias.unflatten(0, (C, -1))).flatten()
    if not spec.k_projection:
        back_KHR = back_CFR.reshape(K, layer.head_dim, -1)
        q_KGHD = folded.q_proj.unflatten(0, (K, -1, layer.head_dim))
        changes |= {"k_b_proj": None, "q_proj": torch.einsum("khr,kghd->kgrd", back_KHR, q_KGHD).flatten(0, 2)}
        if folded.q_bias is not None:
            q_KGH = folded.q_bias.unflatten(0, (K, -1, layer.head_dim))
            changes["q_bias"] = torch.einsum("khr,kgh->kgr", back_KHR, q_KGH).flatten()
    return dataclasses.replace(folded, **changes)  # type: ignore[arg-type]


def fuse_unrotated(layer: AttentionLayer, folded: FoldedWeights) -> FoldedWeights:
    """z = A kappa is a sum over the rotated and the other numbers of each head; nothing stands between the others and x."""
    assert folded.k_a_proj is not None and folded.k_proj is not None, "the owner has a way to the latents"
    C, r, H = len(folded.k_a_proj), layer.rotary_dim, layer.head_dim
    a_CRtH = folded.k_a_proj.unflatten(2, (-1, H))
    k_CtHD = folded.k_proj.unflatten(0, (C, -1, H))
    changes = {
        "k_a_proj": a_CRtH[..., :r].flatten(2),
        "k_proj": k_CtHD[:, :, :r].flatten(0, 2),
        "k_u_proj": torch.einsum("crth,cthd->crd", a_CRtH[..., r:], k_CtHD[:, :, r:]).flatten(0, 1),
    }
    if folded.k_bias is not None:
        k_CtH = folded.k_bias.unflatten(0, (C, -1, H))
        changes["k_bias"] = k_CtH[..., :r].flatten()
        changes["k_u_bias"] = torch.einsum("crth,cth->cr", a_CRtH[..., r:], k_CtH[..., r:]).flatten()
    return dataclasses.replace(folded, **changes)


def store_values(folded: FoldedWeights, a_UVF: Tensor) -> FoldedWeights:
    """v_proj gives the latents at once (arXiv 2406.07056, eq 7)."""
    U = a_UVF.shape[0]
    assert folded.v_proj is not None, "only the owner of a cache stores values"
    v_proj_UFD = folded.v_proj.unflatten(0, (U, -1))
    v_bias = None
    if folded.v_bias is not None:
        v_bias = torch.einsum("uvf,uf->uv", a_UVF, folded.v_bias.unflatten(0, (U, -1))).flatten()
    v_proj = torch.einsum("uvf,ufd->uvd", a_UVF, v_proj_UFD).flatten(0, 1)
    return dataclasses.replace(folded, v_proj=v_proj, v_bias=v_bias)


def lead_values_back(layer: AttentionLayer, folded: FoldedWeights, back_UFV: Tensor, *, apart: bool) -> FoldedWeights:
    """o_proj takes the latents, or (`apart`) v_b_proj does, where that is smaller (arXiv 2406.07056, eqs 7-14)."""
    K, H, V = layer.num_kv_heads, layer.head_dim, back_UFV.shape[2]
    if apart:
        return dataclasses.replace(folded, v_b_proj=back_UFV)
    o_proj_DKGH = folded.o_proj.unflatten(1, (K, -1, H))
    back_KHV = back_UFV.reshape(K, H, V)
    return dataclasses.replace(folded, o_proj=torch.einsum("dkgh,khv->dkgv", o_proj_DKGH, back_KHV).flatten(1))


def value_metric(layer: AttentionLayer, weights: AttentionWeights) -> BlockDiagonal:
    """Of K blocks [H, H]: how far an error of each value head moves the layer's output, sum_n W_O^n.T W_O^n."""
    heads_DKGH = weights.o_proj.unflatten(1, (layer.num_kv_heads, -1, layer.head_dim))
    return BlockDiagonal(torch.einsum("dkgh,dkgi->khi", heads_DKGH, heads_DKGH))


def fisher_metric(group: LayerGroup, name: str, latent: str) -> BlockDiagonal:
    """In which errors of the owner's keys or values (`name`, a statistic) cost nats. Where heads are stored in
    groups, whichever those are, every head counts for itself."""
    metric = BlockDiagonal(group.moments(0)[METRIC + name].second_FF)
    if latent != "group":
        return metric
    return BlockDiagonal(torch.cat([head.blocks_nbb for head in metric.groups(group.owner.num_kv_heads)]))
