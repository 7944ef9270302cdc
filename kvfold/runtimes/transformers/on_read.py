"""The source's heads out of what a cache holds, rebuilt as they are read: by torch, and for the CPU's kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.runtimes.kernels import cpu_decode, native
from kvfold.runtimes.kernels.attention import kernels_for
from kvfold.runtimes.kernels.dispatch import rotated_heads
from kvfold.runtimes.kernels.packed_tokens import Stored, read, read_all
from kvfold.runtimes.kernels.rotary import Tables, apply_rotary, own_tables, slow_tables
from kvfold.runtimes.transformers.forward_state import ForwardState
from kvfold.runtimes.transformers.projections import GroupedLinear

Heads = Callable[[int, int], Tensor]
"""(start, end) -> the source's heads of these tokens [B, K, end - start, H]."""


class KeysOnRead:
    """Of one attention module and the tokens of one forward. tables: cos and sin [B or 1, S, r] of all tokens that are seen,
    None for keys that stay unrotated. evenly: their positions follow each other."""

    def __init__(self, attention: Any, tables: tuple[Tensor, Tensor] | None, *, evenly: bool = False) -> None:
        self.attention, self.tables, self.evenly = attention, tables, evenly

    def __call__(self, z: Stored, near: bool = False) -> Heads:
        """All at once for a prompt, piece by piece for few tokens, so that the keys of a long cache never exist at once.
        `near`: z is in the finer form of recent tokens."""
        tables = self._newest(z.shape[2])

        def keys(start: int, end: int) -> Tensor:
            if tables is None:
                return self.attention._rebuild(read(z, start, end), "k_b", near)
            some = tables[0][:, start:end], tables[1][:, start:end]
            return self._rotated(read(z, start, end), some, near)

        return keys

    def _rotated(self, z_BCSR: Tensor, tables: tuple[Tensor, Tensor], near: bool) -> Tensor:
        attention = self.attention
        if attention.spec.hidden or attention.k_b_proj is None:
            return apply_rotary(attention._rebuild(z_BCSR, "k_b", near), *tables)
        return rotated_heads(attention.k_b_proj(z_BCSR, last=near), attention.layer.head_dim, *tables)

    def by_kernel(self, z: Stored, dtype: torch.dtype, near: bool = False) -> Any:
        """How the device's kernel rebuilds them, or turns queries instead; None where it does neither."""
        maps, tables = head_maps(self.attention, "k_b", dtype), self._newest(z.shape[2])
        if maps is None or tables is None:
            return None
        return maps(z.shape[3], near).rebuild(*tables, evenly=self.evenly)

    def _newest(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        return None if self.tables is None else (self.tables[0][:, -tokens:], self.tables[1][:, -tokens:])


def tables_on_read(
    attention: Any,
    tables: Tables | None,
    state: ForwardState | None,
    cache: Any,
    hidden_BTD: Tensor,
    positions_BT: Tensor | None,
) -> Tables | None:
    """What is left to turn of keys that are read, where fast pairs are stored after rotation: cos and sin of all tokens that
    are seen, which are the new ones (tables) without a cache."""
    layer, fast_pairs = attention.layer, attention.spec.fast_pairs
    if not layer.rotary_dim or (cache is None and not fast_pairs):
        return tables if layer.rotary_dim else None
    state = state or ForwardState()

    def slow(made: Tables | None) -> Any:
        assert made is not None, "this layer rotates"
        return slow_tables(*made, fast_pairs) if fast_pairs else made

    if cache is None:
        where = None if tables is None else tables[0].device
        return state.once(("slow", layer.rotary_kind, fast_pairs, where), lambda: slow(tables))
    way = fast_pairs, lambda of_all: slow(own_tables(layer, of_all))
    return state.tables_of_all(hidden_BTD, positions_BT, cache, layer.rotary_kind, way)


def head_maps(attention: Any, way: str, dtype: torch.dtype) -> Callable[[int, bool], Any] | None:
    """(width, near) -> the way back ("k_b" or "v_b") to the source's heads as the device's kernel takes it; None where it
    does not."""
    projection = getattr(attention, f"{way}_proj")
    if attention.spec.hidden or not _is_plain(projection, dtype):
        return None

    def of(width: int, near: bool) -> Any:
        def make() -> Any:
            weight = projection.of_width(width, last=near)
            fast_pairs = attention.spec.fast_pairs if way == "k_b" else 0
            speeds = attention.layer.speeds_without(fast_pairs) if fast_pairs else ()
            format = (attention.spec.of_recent if near else attention.spec).k_bits
            kernels, head_dim = kernels_for(weight), attention.layer.head_dim
            tokens = attention.spec.recent if near else None
            return kernels.HeadMap.of(weight, projection.bias, head_dim, speeds, format=format, tokens=tokens)

        return projection.made((width, near), make)

    return of


def value_map(attention: Any, dtype: torch.dtype) -> cpu_decode.ValueMap | None:
    """The way back to values as the CPU's kernel takes it; None where there is none or it does not."""
    projection = attention.v_b_proj
    if attention.spec.hidden or not _is_plain(projection, dtype) or projection.weight.is_cuda:
        return None
    make = functools.partial(cpu_decode.ValueMap.of, projection.weight, attention.layer.head_dim)
    made: cpu_decode.ValueMap | None = projection.made("values", make)
    return made


def all_keys(attention: Any, z: Stored, on_read: KeysOnRead | None, *, near: bool = False) -> Tensor:
    """The source's keys [B, K, S, H] of all tokens."""
    tables = on_read.tables if on_read else None
    made = heads_by_kernel(attention, "k_b", z, tables, near=near)
    if made is not None:
        return made
    return on_read(z, near)(0, z.shape[2]) if on_read else attention._rebuild(read_all(z), "k_b", near)


def all_values(attention: Any, y: Stored, *, near: bool = False) -> Tensor:
    """The source's values of all tokens."""
    made = heads_by_kernel(attention, "v_b", y, None, near=near)
    return attention._rebuild(read_all(y), "v_b", near) if made is None else made


def heads_by_kernel(
    attention: Any, way: str, stored: Stored, tables: tuple[Tensor, Tensor] | None, *, near: bool
) -> Tensor | None:
    """The same by the CPU's kernel; None where it does not serve."""
    dtype = attention.q_proj.weight.dtype
    maps = head_maps(attention, way, dtype)
    if maps is None or not cpu_decode.reads(stored, dtype):
        return None
    newest = () if tables is None else (table[:, -stored.shape[2] :] for table in tables)
    return cpu_decode.rebuilt(stored, maps(stored.shape[3], near).rebuild(*newest), dtype)


def _is_plain(projection: Any, dtype: torch.dtype) -> bool:
    """Whether there is a kernel that knows its numbers, and nobody has to see that it is used."""
    if type(projection) is not GroupedLinear or dtype not in kernels_for(projection.weight).DTYPES:
        return False
    if torch.is_grad_enabled() and projection.weight.requires_grad:
        return False
    if projection.weight.device.type == "cpu" and native.library() is None:
        return False
    hooked = hasattr(projection, "_hf_hook") or getattr(projection, "_forward_hooks", None)
    return not hooked and projection.weight.dtype == dtype and projection.weight.device.type in ("cpu", "cuda")
