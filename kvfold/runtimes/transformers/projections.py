"""The projections of a folded layer as modules, made from its tensor shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.plan.tensors import PROJECTIONS, Shape

MAKING = ("k_a_proj", "v_a_proj", "k_p_proj")
"""Projections that make what is stored."""


class Made:
    """What was made of weights as they are now."""

    def __init__(self) -> None:
        self._of: dict[Any, tuple[Any, Any]] = {}

    def of(self, name: Any, weights: Iterable[Tensor | None], make: Callable[[], Any], *, some: int = 0) -> Any:
        """What `make` makes of them, kept under this name until they change. some: look at one of so many of their numbers as
        well: who merges adapters writes through `.data`."""
        present = [x for x in weights if x is not None]
        state: Any = tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in present)
        state = state, tuple(float(x.detach().flatten()[::some].double().sum()) for x in present) if some else None
        if name not in self._of or self._of[name][0] != state:
            self._of[name] = state, make()
        return self._of[name][1]

    def __reduce__(self) -> tuple[type[Made], tuple[()]]:
        return Made, ()  # whoever copies a model or sends it elsewhere makes it anew

    def forget(self) -> None:
        """Some optimizers write through `.data`, which counts no version: whoever trains says so."""
        self._of.clear()


class GroupedLinear(nn.Module):
    """One small matrix per group: [B, groups, T, in] -> [B, groups, T, out]. weight [groups, out, in], bias [groups, out].

    `heads`: cut each matrix by its rows into those of its group's heads, for x [B, heads, T, ...].
    `transposed`: go from out to in. Of x with fewer numbers than `in` the weight's first serve, or (`last`) its last.
    All use of the weight passes through here, so that hooks (device_map, offloading, adapters) see it.
    """

    def __init__(self, groups: int, in_features: int, out_features: int, *, bias: bool = False, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features, **options))
        self.bias = nn.Parameter(torch.empty(groups, out_features, **options)) if bias else None
        self._made = Made()

    def extra_repr(self) -> str:
        groups, out_features, in_features = self.weight.shape
        return f"{groups=}, {in_features=}, {out_features=}"

    def forward(self, x: Tensor, *, heads: int | None = None, transposed: bool = False, last: bool = False) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:  # it is trained
            self._made.forget()
        weight = self.weight if heads is None else self.weight.view(heads, -1, self.weight.shape[2])
        weight = weight if transposed else self.of_width(x.shape[-1], last=last, weight=weight)
        # One product per group over all rows of the batch: a product that broadcasts the weight would copy it for each row.
        B, G, T, _ = x.shape
        rows = x.transpose(0, 1).reshape(G, B * T, -1)
        weight = weight if transposed else weight.transpose(1, 2)
        if self.bias is None or transposed:
            out = torch.bmm(rows, weight)
        else:
            out = torch.baddbmm(self.bias.view(G, 1, -1), rows, weight)
        return out.view(G, B, T, -1).transpose(0, 1)

    def made(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes of the weight as it is now, kept beside it."""
        return self._made.of(name, (self.weight, self.bias), make)

    def train(self, mode: bool = True) -> GroupedLinear:
        """Forget what was made of the weight."""
        self._made.forget()
        super().train(mode)
        return self

    def of_width(self, width: int, *, last: bool = False, weight: Tensor | None = None) -> Tensor:
        """The part of the weight that takes so many numbers."""
        whole = self.weight if weight is None else weight
        return whole[..., -width:] if last else whole[..., :width]


def projections(
    shapes: Mapping[str, Shape],
    linear: type[nn.Linear] = nn.Linear,
    to_stored: type[GroupedLinear] = GroupedLinear,
    **options: Any,
) -> dict[str, nn.Module | None]:
    """A module for every projection of a layer, None for those that it does not have. linear: of those without groups;
    to_stored: of those with groups that make what is stored."""
    return {name: _projection(name, shapes, linear, to_stored, **options) for name in PROJECTIONS}


def _projection(
    name: str, shapes: Mapping[str, Shape], linear: type[nn.Linear], to_stored: type[GroupedLinear], **options: Any
) -> nn.Module | None:
    if f"{name}.weight" not in shapes:
        return None
    *groups, out_features, in_features = (axis.size for axis in shapes[f"{name}.weight"])
    bias = f"{name}.bias" in shapes
    if groups:
        grouped = to_stored if name in MAKING else GroupedLinear
        return grouped(groups[0], in_features, out_features, bias=bias, **options)
    return linear(in_features, out_features, bias=bias, **options)
