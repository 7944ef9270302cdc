"""The source's keys out of what a cache holds, where they are rebuilt and rotated as they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.dispatch import rotated_heads
from kvfold.runtimes.kernels.packed_tokens import Stored, read
from kvfold.runtimes.kernels.rotary import apply_rotary
from kvfold.runtimes.transformers.projections import GroupedLinear

Heads = Callable[[int, int], Tensor]
"""(start, end) -> the source's heads of these tokens [B, K, end - start, H]."""


class KeysOnRead:
    """Of one attention module and the tokens of one forward. tables: cos and sin [B or 1, S, r] of all tokens that are seen,
    None for keys that stay unrotated."""

    def __init__(self, attention: Any, tables: tuple[Tensor, Tensor] | None) -> None:
        self.attention, self.tables = attention, tables

    def __call__(self, z: Stored, near: bool = False) -> Heads:
        """All at once for a prompt, piece by piece for few tokens, so that the keys of a long cache never exist at once.
        `near`: z is in the finer form of recent tokens."""
        tables = self._newest(z.shape[2])

        def keys(start: int, end: int) -> Tensor:
            if tables is None:
                return self.attention._rebuild(read(z, start, end), "k_b", near)
            return self._rotated(read(z, start, end), [table[:, start:end] for table in tables], near)

        return keys

    def _rotated(self, z_BCSR: Tensor, tables: list[Tensor], near: bool) -> Tensor:
        attention = self.attention
        if attention.spec.hidden or attention.k_b_proj is None:
            return apply_rotary(attention._rebuild(z_BCSR, "k_b", near), *tables)
        return rotated_heads(attention.k_b_proj(z_BCSR, last=near), attention.layer.head_dim, *tables)

    def by_kernel(self, z: Stored, near: bool = False) -> cpu_decode.Rebuild | None:
        """How the CPU's kernel rebuilds them; None where it does not."""
        maps, tables = key_maps(self.attention), self._newest(z.shape[2])
        if maps is None or tables is None:
            return None
        return maps(z.shape[3], near).rebuild(*tables)

    def _newest(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        return None if self.tables is None else (self.tables[0][:, -tokens:], self.tables[1][:, -tokens:])


def key_maps(attention: Any) -> Callable[[int, bool], cpu_decode.KeyMap] | None:
    """(width, near) -> the way back of an attention module as the CPU's kernel takes it, packed once; None where somebody has
    to see that it is used, or a network is added to it."""
    projection = attention.k_b_proj
    plain = type(projection) is GroupedLinear and not hasattr(projection, "_hf_hook") and not projection._forward_hooks
    if not plain or attention.spec.hidden or projection.weight.device.type != "cpu":
        return None
    return lambda width, near: _key_map(projection, attention.layer.head_dim, width, near)


def _key_map(projection: nn.Module, head_dim: int, width: int, near: bool) -> cpu_decode.KeyMap:
    """Kept beside the weight that it was made of."""
    weight, made = projection.weight, projection.__dict__.setdefault("key_maps", {})
    state = (weight.data_ptr(), weight._version)
    if made.get((width, near), (None,))[0] != state:
        of_form = projection.of_width(width, last=near)
        made[width, near] = state, cpu_decode.KeyMap.of(of_form, projection.bias, head_dim)
    return made[width, near][1]
