"""The tensors of one folded attention layer: their names and their named axes, for everyone who makes, cuts or reads them.

Runtimes build their modules from `tensor_shapes`, truncation cuts the axes that end in E and G, tensor parallelism shares out
those that begin with heads, and the table in docs/format.md is `TENSORS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer

TENSORS = (
    ("q_proj.weight", "N*H, D", "!absorbed"),
    ("q_proj.weight", "N*E, D", "absorbed"),
    ("q_proj.bias", "", "qkv_bias"),
    ("k_proj.weight", "C*E, D", "makes !mapped"),
    ("k_proj.weight", "K*H, D", "makes mapped !k_partial"),
    ("k_proj.weight", "K*r, D", "makes mapped k_partial"),
    ("k_proj.bias", "", "makes qkv_bias"),
    ("k_proj.bias", "", "makes stored_bias !mapped"),
    ("k_a_proj.weight", "C, E, K/C*H", "makes mapped !k_partial"),
    ("k_a_proj.weight", "C, E, K/C*r", "makes mapped k_partial"),
    ("k_a_proj.bias", "", "makes mapped stored_bias !joint"),
    ("k_u_proj.weight", "C*E, D", "makes k_partial"),
    ("k_u_proj.bias", "", "makes k_partial qkv_bias"),
    ("k_b_proj.weight", "C, K/C*H, E", "k_projection !predicted"),
    ("k_b_proj.weight", "C, K/C*H, E+P", "k_projection predicted"),
    ("k_b_proj.bias", "", "k_projection k_offset"),
    ("v_proj.weight", "U*G, D", "makes !v_mapped !shared_latent"),
    ("v_proj.weight", "U*G, D", "makes mapped shared_latent"),
    ("v_proj.weight", "K*H, D", "makes v_mapped"),
    ("v_proj.bias", "", "makes qkv_bias !shared_latent"),
    ("v_proj.bias", "", "makes qkv_bias mapped shared_latent"),
    ("v_proj.bias", "", "makes stored_bias !v_mapped !shared_latent"),
    ("v_a_proj.weight", "U, G, K/U*H", "makes v_mapped"),
    ("v_b_proj.weight", "U, K/U*H, G", "v_projection !predicted"),
    ("v_b_proj.weight", "U, K/U*H, G+P", "v_projection predicted"),
    ("k_p_proj.weight", "E, P", "makes predicted"),
    ("o_proj.weight", "D, N*G", "!v_projection"),
    ("o_proj.weight", "D, N*H", "v_projection"),
    ("o_proj.bias", "", "o_bias"),
    ("s_proj.weight", "C, D", "makes foreseen"),
    ("sinks", "N", "sinks"),
    ("q_norm.weight", "H", "head_norm"),
    ("q_norm.weight", "N*H", "flat_norm"),
    ("q_norm.weight", "N*H", "own_norms"),
    ("q_norm.bias", "H", "head_norm norm_bias"),
    ("k_norm.weight", "H", "makes head_norm"),
    ("k_norm.weight", "K*H", "makes flat_norm"),
    ("k_norm.weight", "K*H", "makes own_norms"),
    ("k_norm.bias", "H", "makes head_norm norm_bias"),
    ("k_a_up_proj.weight", "C, h, K/C*H", "hidden"),
    ("k_a_up_proj.bias", "", "hidden"),
    ("k_a_down_proj.weight", "C, E, h", "hidden"),
    ("k_b_up_proj.weight", "C, h, E", "hidden"),
    ("k_b_up_proj.bias", "", "hidden"),
    ("k_b_down_proj.weight", "C, K/C*H, h", "hidden"),
    ("v_a_up_proj.weight", "U, h, K/U*H", "hidden"),
    ("v_a_up_proj.bias", "", "hidden"),
    ("v_a_down_proj.weight", "U, G, h", "hidden"),
    ("v_b_up_proj.weight", "U, h, G", "hidden"),
    ("v_b_up_proj.bias", "", "hidden"),
    ("v_b_down_proj.weight", "U, K/U*H, h", "hidden"),
)
"""(name, axes, conditions that must all hold; `!` negates). A bias without axes here has those of its weight, without the
last one."""

HEADS = ("N", "K", "C", "U")

PROJECTIONS = tuple(dict.fromkeys(name.split(".")[0] for name, *_ in TENSORS if "_proj." in name))


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: `heads` times `width` numbers, head after head. `name` says of what: `C*R`, `D`, `K/C*H`."""

    name: str
    heads: int
    width: int

    @property
    def size(self) -> int:
        return self.heads * self.width

    @property
    def head_letter(self) -> str:
        """N, K, C or U where the axis counts heads of the whole layer, else nothing."""
        first = self.name.split("*")[0]
        return first if first in HEADS else ""

    @property
    def width_letter(self) -> str:
        """What one head has of it: H, r, E and G (stored keys and values, as made), P (of layers below), D or h; nothing for
        heads alone."""
        return "" if self.name in HEADS else self.name.rpartition("*")[2][0]


Shape = tuple[Axis, ...]


def tensor_shapes(layer: AttentionLayer, spec: CacheSpec, *, owns: bool = True) -> dict[str, Shape]:
    """Name inside the attention module -> axes, of a layer that makes its own cache or (`owns` false) reads another's."""
    sizes, holds = _sizes(layer, spec), conditions(layer, spec, owns=owns)
    found: dict[str, Shape] = {}
    for name, axes, needed in TENSORS:
        if all(holds[word.lstrip("!")] != word.startswith("!") for word in needed.split()):
            weight = found.get(name.replace(".bias", ".weight"), ())
            found[name] = tuple(_axis(text, sizes) for text in axes.split(", ")) if axes else weight[:-1]
    return found


def conditions(layer: AttentionLayer, spec: CacheSpec, *, owns: bool) -> dict[str, bool]:
    """The words of TENSORS, for one layer.

    makes: the layer has a share in what is stored (its own cache, or a joint one). absorbed: `q_proj` has taken in the way
    back from stored keys. mapped: rotation, a norm, a network or other layers stand between `k_proj` and what is stored, so
    that `k_a_proj` is a map of its own; v_mapped: the same of values.
    """
    return {
        "makes": owns or spec.joint,
        "absorbed": spec.rope == "none" and not spec.k_projection,
        "mapped": spec.k_projection and (meets_keys(layer, spec) or spec.hidden > 0 or spec.joint),
        "v_mapped": spec.hidden > 0 or spec.joint,
        "k_projection": spec.k_projection,
        "k_partial": spec.k_partial,
        "k_offset": spec.k_offset,
        "v_projection": spec.v_projection,
        "shared_latent": spec.shared_latent,
        "hidden": spec.hidden > 0,
        "predicted": bool(spec.predicted_from),
        "joint": spec.joint,
        "stored_bias": spec.stored_bias,
        "foreseen": spec.tokens is not None and spec.tokens.foreseen,
        "qkv_bias": layer.qkv_bias,
        "o_bias": layer.o_bias or spec.output_bias,
        "sinks": layer.sinks,
        "head_norm": layer.qk_norm and not layer.norms_tell_heads_apart,
        "flat_norm": layer.qk_norm and layer.flat_norm,
        "own_norms": layer.qk_norm and layer.own_norms,
        "norm_bias": layer.norm_bias,
    }


def meets_keys(layer: AttentionLayer, spec: CacheSpec) -> bool:
    """Whether what makes latents meets keys as they are: after a norm, or after all or part of their rotation."""
    return spec.rope == "applied" or spec.fast_pairs > 0 or layer.qk_norm


def _sizes(layer: AttentionLayer, spec: CacheSpec) -> dict[str, int]:
    K, C, U = layer.num_kv_heads, spec.num_kv_heads, spec.num_v_heads
    E, G = spec.made_widths
    P = spec.predictors + spec.recent_predictors
    own = {
        "C": C,
        "E": E,
        "U": U,
        "G": G,
        "h": spec.hidden,
        "K/C": K // C,
        "K/U": K // U,
        "P": P,
        "E+P": E + P,
        "G+P": G + P,
    }
    return own | {
        "D": layer.hidden_size,
        "N": layer.num_attention_heads,
        "K": K,
        "H": layer.head_dim,
        "r": layer.rotary_dim,
    }


def _axis(name: str, sizes: dict[str, int]) -> Axis:
    heads, _, width = name.rpartition("*")
    if not heads and name in HEADS:
        return Axis(name, sizes[name], 1)
    return Axis(name, sizes[heads] if heads else 1, sizes[width])
