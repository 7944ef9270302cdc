"""How a basis per group of heads becomes cache shapes and folded weights: what all low-rank width methods share.

The notation is the design's: kappa are the concatenated keys of a group after rotation, z = A kappa is stored, B leads back.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvfold.attention import AttentionLayer, AttentionWeights, FoldedWeights
from kvfold.errors import RecipeError
from kvfold.linalg import Moment, discarded_energy, top_eigenvectors
from kvfold.plan import CacheSpec, divisors
from kvfold.width.base import StoredShape, WidthMethod

LATENTS = ("layer", "group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankWidth(WidthMethod):
    """Keys and values in the leading eigenvectors of a moment matrix that the method names.

    latent: `layer` stores one key latent for all heads of a layer (the strategy of arXiv 2406.07056 for RoPE keys, section
        3.4), `group` one per group of neighbouring heads, at most as wide as a head (its section 3.3).
    v_latent: the same choice for values. Latents wider than a head keep a small `v_b_proj` instead of a huge `o_proj`.
    group_size: source heads per group, on the sides whose latent is per group; 0 takes the largest groups that reach a
        size, since bigger groups lose less.
    multiple: stored widths are multiples of this, as attention kernels want them.
    """

    latent: str = "layer"
    v_latent: str = "group"
    group_size: int = 0
    multiple: int = 8

    def __post_init__(self) -> None:
        for name in ("latent", "v_latent"):
            if getattr(self, name) not in LATENTS:
                raise RecipeError(f"width.{name} = {getattr(self, name)!r}; choose 'layer' or 'group'.")
        if self.multiple < 1 or self.group_size < 0:
            raise RecipeError("width.multiple must be at least 1 and width.group_size at least 0.")

    @abstractmethod
    def key_moment(self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment]) -> Tensor:
        """[K*H, K*H]: whose leading eigenvectors keep the keys."""

    @abstractmethod
    def value_moment(self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment]) -> Tensor:
        """[K*H, K*H]: whose leading eigenvectors keep the values."""

    def key_shapes(self, layer: AttentionLayer) -> list[StoredShape]:
        return self._shapes(layer, self.latent)

    def value_shapes(self, layer: AttentionLayer) -> list[StoredShape]:
        return self._shapes(layer, self.v_latent)

    def _shapes(self, layer: AttentionLayer, latent: str) -> list[StoredShape]:
        K, H = layer.num_kv_heads, layer.head_dim
        if latent == "layer":
            return [StoredShape(1, width) for width in self._widths(K * H)]
        sizes = [self.group_size] if self.group_size else divisors(K)
        if K % sizes[0]:
            raise RecipeError(
                f"width.group_size = {self.group_size} does not divide the {K} key/value heads of layer {layer.index};"
                f" choose one of {divisors(K)}."
            )
        # Of the shapes with equally many numbers the one with the largest groups wins: later sizes overwrite.
        best = {}
        for t in sizes:
            limit = t * H if self.group_size else H
            best.update({K // t * width: StoredShape(K // t, width) for width in self._widths(limit)})
        return [best[numbers] for numbers in sorted(best)]

    def _widths(self, limit: int) -> list[int]:
        return sorted({*range(self.multiple, limit, self.multiple), limit})

    def key_damage(
        self,
        layer: AttentionLayer,
        weights: AttentionWeights,
        moments: Mapping[str, Moment],
        shapes: Sequence[StoredShape],
    ) -> list[float]:
        return _energy_lost(self.key_moment(layer, weights, moments), shapes)

    def value_damage(
        self,
        layer: AttentionLayer,
        weights: AttentionWeights,
        moments: Mapping[str, Moment],
        shapes: Sequence[StoredShape],
    ) -> list[float]:
        return _energy_lost(self.value_moment(layer, weights, moments), shapes)

    def spec(self, layer: AttentionLayer, keys: StoredShape, values: StoredShape) -> CacheSpec:
        return CacheSpec(
            num_kv_heads=keys.num_heads,
            head_dim=keys.width,
            num_v_heads=values.num_heads,
            v_head_dim=values.width,
            k_projection=True,
            v_projection=values.width > layer.head_dim,
            window=layer.window,
        )

    def fold(
        self, layer: AttentionLayer, weights: AttentionWeights, moments: Mapping[str, Moment], spec: CacheSpec
    ) -> FoldedWeights:
        key_basis = group_bases(self.key_moment(layer, weights, moments), spec.num_kv_heads, spec.head_dim)
        value_basis = group_bases(self.value_moment(layer, weights, moments), spec.num_v_heads, spec.v_head_dim)
        originals = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
        keys = {"k_a_proj": key_basis.transpose(1, 2), "k_b_proj": key_basis}
        return FoldedWeights(**originals | keys | fold_values(layer, weights, value_basis))


def blocks(moment_FF: Tensor, groups: int) -> Tensor:
    """The diagonal blocks [groups, F/groups, F/groups] that belong to neighbouring heads."""
    size = moment_FF.shape[0] // groups
    return torch.stack([moment_FF[i : i + size, i : i + size] for i in range(0, size * groups, size)])


def group_bases(moment_FF: Tensor, groups: int, width: int) -> Tensor:
    """Leading eigenvectors of each group's block as columns: [groups, F/groups, width]."""
    return torch.stack([top_eigenvectors(block, width) for block in blocks(moment_FF, groups)])


def fold_values(layer: AttentionLayer, weights: AttentionWeights, basis_UFV: Tensor) -> dict[str, Tensor | None]:
    """v_proj takes the basis; o_proj takes it back, or v_b_proj does where that is smaller (arXiv 2406.07056, eqs 7-14)."""
    U, _, V = basis_UFV.shape
    v_proj_UFD = weights.v_proj.unflatten(0, (U, -1))
    folded: dict[str, Tensor | None] = {
        "v_proj": torch.einsum("ufv,ufd->uvd", basis_UFV, v_proj_UFD).flatten(0, 1),
        "v_bias": None,
    }
    if weights.v_bias is not None:
        folded["v_bias"] = torch.einsum("ufv,uf->uv", basis_UFV, weights.v_bias.unflatten(0, (U, -1))).flatten()
    if layer.head_dim < V:
        return folded | {"v_b_proj": basis_UFV}
    K, H = layer.num_kv_heads, layer.head_dim
    o_proj_DKGH = weights.o_proj.unflatten(1, (K, -1, H))
    back_KHV = basis_UFV.reshape(K, H, V)
    return folded | {"o_proj": torch.einsum("dkgh,khv->dkgv", o_proj_DKGH, back_KHV).flatten(1)}


def _energy_lost(moment_FF: Tensor, shapes: Sequence[StoredShape]) -> list[float]:
    """Share of the moment's trace that each shape discards. One eigendecomposition per number of groups."""
    total = moment_FF.trace().clamp_min(torch.finfo(torch.float64).tiny)
    lost = {}
    for groups in {shape.num_heads for shape in shapes}:
        parts = blocks(moment_FF, groups)
        lost[groups] = sum(discarded_energy(part) * part.trace() for part in parts) / total
    return [float(lost[shape.num_heads][shape.width]) for shape in shapes]
