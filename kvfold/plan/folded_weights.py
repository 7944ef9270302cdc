"""What one folded layer's attention consists of: weights, maps between stored dims and heads, biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvfold.plan.layer import AttentionWeights
from kvfold.plan.tensors import Shape


@dataclass(frozen=True, kw_only=True)
class FoldedWeights:
    """Tensors of one folded layer, named as the runtime names them. A layer that reads another's cache has no k_proj, v_proj,
    k_norm (nor its bias) and k_a_proj.

    k_proj gives the source's K heads where the plan has `k_projection`, else the C stored ones. k_a_proj [C, R, t*H] takes
    the rotated keys of a group to what is stored; k_b_proj [C, t*H, R] leads back, and k_b_bias [C, t*H] is added where the
    plan has `k_offset`. Where neither rotation nor a norm comes before what is stored, k_proj [C*R, D] gives it at once;
    without rotation (`rope: none`) and `k_projection` q_proj [N*R, D] has absorbed the way back.
    v_proj [U*V, D]; v_b_proj [U, t*H, V] leads back to the source's value heads, or is None where that is fused into o_proj.
    o_proj [D, N*V], or [D, N*H] beside a v_b_proj. v_a_proj [U, V, t*H] is only there in joint caches, where every layer of
    the group has all of these. With `k_partial` k_proj [K*r, D] and k_a_proj [C, R, t*r] are those of the r rotated numbers
    of each head, and k_u_proj [C*R, D] is what the others add. With `hidden` h the four ways (k_a, k_b, v_a, v_b) also have a
    network each: up_proj [C, h, in] with a bias [C, h], GELU, down_proj [C, out, h]; k_proj and v_proj then give the source's
    heads. With `predicted_from` k_b_proj and v_b_proj have a column for each of the P numbers of layers below, behind those
    of the form that they belong to, and k_p_proj [R, P] takes what these numbers say from what is stored. With `stored_bias`
    v_proj has a bias, and so has k_a_proj (k_a_bias [C, R]) or, where there is none, k_proj. Where tokens stay by the rule
    `foreseen`, s_proj [C, D] says of the layer's input what a token will be worth to each stored head. sinks [N] are
    the original's.
    """

    q_proj: Tensor
    o_proj: Tensor
    k_proj: Tensor | None = None
    v_proj: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_bias: Tensor | None = None
    k_a_proj: Tensor | None = None
    k_b_proj: Tensor | None = None
    v_b_proj: Tensor | None = None
    v_a_proj: Tensor | None = None
    k_u_proj: Tensor | None = None
    k_u_bias: Tensor | None = None
    k_b_bias: Tensor | None = None
    k_a_bias: Tensor | None = None
    k_a_up_proj: Tensor | None = None
    k_a_up_bias: Tensor | None = None
    k_a_down_proj: Tensor | None = None
    k_b_up_proj: Tensor | None = None
    k_b_up_bias: Tensor | None = None
    k_b_down_proj: Tensor | None = None
    v_a_up_proj: Tensor | None = None
    v_a_up_bias: Tensor | None = None
    v_a_down_proj: Tensor | None = None
    v_b_up_proj: Tensor | None = None
    v_b_up_bias: Tensor | None = None
    v_b_down_proj: Tensor | None = None
    k_p_proj: Tensor | None = None
    s_proj: Tensor | None = None
    sinks: Tensor | None = None

    @classmethod
    def of(cls, weights: AttentionWeights, **changes: Tensor | None) -> FoldedWeights:
        """The original's weights, with others in the place of some and beside them."""
        return cls(**{f.name: getattr(weights, f.name) for f in fields(weights)} | changes)

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors under the parameter names of the runtime's module, in the checkpoint's dtype."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            parameter_name(name): tensor.to(dtype).contiguous()
            for name, tensor in tensors.items()
            if tensor is not None
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> FoldedWeights:
        """The inverse of `state_dict`, for the oracle."""
        return cls(**{f.name: state.get(parameter_name(f.name)) for f in fields(cls)})  # type: ignore[arg-type]


def parameter_name(field: str) -> str:
    """`q_bias` -> `q_proj.bias`, `q_norm_bias` -> `q_norm.bias`, anything else but `sinks` -> `<field>.weight`."""
    if not field.endswith("_bias"):
        return field if field == "sinks" else f"{field}.weight"
    stem = field.removesuffix("_bias")
    return f"{stem}.bias" if stem.endswith("_norm") else f"{stem}_proj.bias"


def beside(shapes: Mapping[str, Shape], far: FoldedWeights, near: FoldedWeights) -> FoldedWeights:
    """One layer that makes both forms of a token, and leads both back: what is stored stands side by side, all else is the
    same in both. shapes: those of the result."""
    joined = {}
    for f in fields(FoldedWeights):
        parts = getattr(far, f.name), getattr(near, f.name)
        if parts[0] is not None:
            joined[f.name] = _side_by_side(f.name, shapes[parameter_name(f.name)], *parts)
    return FoldedWeights(**joined)


def _side_by_side(name: str, shape: Shape, far: Tensor, near: Tensor) -> Tensor:
    if shape[-1].name == "P":  # each form is predicted from the same form of layers below
        return torch.block_diag(far, near)
    stored = [at for at, axis in enumerate(shape) if axis.width_letter in ("E", "G")]
    if not stored:
        assert (far - near).norm() <= 1e-6 * far.norm(), f"both forms leave the same out, but {name} differs"
        return far
    (at,) = stored
    heads = shape[at].heads
    return torch.cat([part.unflatten(at, (heads, -1)) for part in (far, near)], dim=at + 1).flatten(at, at + 1)
