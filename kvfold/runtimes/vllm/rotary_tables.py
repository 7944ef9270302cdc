"""cos and sin of every position that a served sequence can have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvfold.architectures._rotary import CHANGING, rope_types
from kvfold.architectures.base import Architecture
from kvfold.errors import PlanError
from kvfold.runtimes.kernels.cpu import rotate_at, rotates
from kvfold.runtimes.kernels.rotary import own_tables, slow_tables


class Positions(NamedTuple):
    """Of tokens [T] whose heads the CPU's kernel rotates where they lie: in a step of few tokens, tables of their own and
    heads beside those that are there take longer than rotating."""

    tables: RotaryTables
    positions_T: Tensor

    def turn(self, x_NTH: Tensor, pairs: int | None) -> None:
        """The first pairs; all if None."""
        rotate_at(x_NTH, self.positions_T, self.tables.cos_Sr, self.tables.sin_Sr, pairs)


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
        self.known: Positions | None = None

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

    def at(self, positions: Tensor, like: Tensor) -> Positions | tuple[Tensor, Tensor]:
        """By which heads of tokens [T] at these positions are rotated that have the dtype and device of `like`: where they
        lie, or by cos and sin [1, T, r]."""
        known = None if torch.compiler.is_compiling() else self.known  # all layers ask for the same tensor
        if known is not None and known.positions_T is positions:
            return known
        if positions.dim() > 1 or not (positions.is_contiguous() and rotates(like, self.cos_Sr, self.sin_Sr)):
            return self.of(positions)
        self.known = Positions(self, positions)
        return self.known

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
