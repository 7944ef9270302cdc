"""cos and sin of every position that a served sequence can have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvfold.architectures._rotary import CHANGING, rope_types
from kvfold.architectures.base import Architecture
from kvfold.errors import PlanError
from kvfold.runtimes.kernels.rotary import own_tables, slow_tables


class RotaryTables(nn.Module):
    """Of one kind of rotation of a family, by the family's own module: [positions, r] each. Kernels are told once where they
    lie; as buffers of attention they are what an engine saves before it sleeps without weights, and puts back there."""

    cos_Sr: Tensor
    sin_Sr: Tensor

    def __init__(self, cos_Sr: Tensor, sin_Sr: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos_Sr", cos_Sr.contiguous(), persistent=False)
        self.register_buffer("sin_Sr", sin_Sr.contiguous(), persistent=False)
        self.slow: dict[int, RotaryTables] = {}

    def of_slow(self, fast_pairs: int) -> RotaryTables:
        """Those that leave the first pairs of a head as they are."""
        if fast_pairs not in self.slow:
            slow = slow_tables(self.cos_Sr, self.sin_Sr, fast_pairs)
            self.slow[fast_pairs] = RotaryTables(*slow) if fast_pairs else self
        return self.slow[fast_pairs]

    @property
    def of_all(self) -> tuple[Tensor, Tensor]:
        """cos and sin [1, S, r] of all positions."""
        return self.cos_Sr[None], self.sin_Sr[None]

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, r] of positions [B, T] or [T]."""
        at = positions if positions.dim() == 2 else positions[None]
        return self.cos_Sr[at], self.sin_Sr[at]


def rotary_tables(
    arch: Architecture, model: Any, *, positions: int, dtype: torch.dtype, device: Any
) -> dict[str | None, RotaryTables]:
    """For each kind of rotation that the layers have; `model` is one on the meta device. Raises PlanError where they change
    with the length of a sequence."""
    if arch.rotary is None:
        return {}
    layers = {layer.rotary_kind: layer for layer in arch.describe(model) if layer.rotary_dim}
    old = model.get_submodule(arch.rotary)
    if changing := sorted({*rope_types(old).values()} & CHANGING):
        raise PlanError(
            f"rope_type {changing[0]}: cos and sin change with the length of a sequence; packed pages are read with those of"
            " one length; serve it in transformers."
        )
    with torch.device(device):
        rotary = type(old)(config=old.config)
    like, at = torch.empty(0, dtype=dtype, device=device), torch.arange(positions, device=device)[None]
    made = {}
    for kind, layer in layers.items():
        tables = own_tables(layer, rotary(like, at, *([] if kind is None else [kind])))
        assert tables is not None, "these layers rotate"
        made[kind] = RotaryTables(*(table[0] for table in tables))
    return made
