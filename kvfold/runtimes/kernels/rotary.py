"""Rotary embedding of heads by given tables."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvfold.plan.layer import AttentionLayer

Tables = tuple[Tensor, Tensor]
"""cos and sin [B or 1, T, r]."""


def own_tables(layer: AttentionLayer, tables: Tables | Tensor | None) -> Tables | None:
    """A family's tables as they are used here: none of a layer that does not rotate, and numbers i and i + r/2 of a pair.
    Some families have one table of complex numbers."""
    if tables is None or not layer.rotary_dim:
        return None
    if isinstance(tables, Tensor):
        tables = tables.real, tables.imag
    once = tables[0].shape[-1] == layer.rotary_dim // 2  # a number for each pair
    if not layer.tables_interleaved and not once:
        return tables
    cos, sin = (torch.cat([table if once else table[..., ::2]] * 2, dim=-1) for table in tables)
    return cos, sin


def tables_of(
    layer: AttentionLayer, hidden_BTD: Tensor, tables: Tables | Tensor | None, positions_BT: Tensor | None
) -> Tables | None:
    """The same, whoever makes a family's tables."""
    if not layer.makes_tables:
        return own_tables(layer, tables)
    if positions_BT is None:
        raise ValueError(f"layer {layer.index} rotates by position_ids; call the whole ...ForCausalLM model.")
    return made_tables(layer.rotary_speeds, hidden_BTD, positions_BT)


def made_tables(speeds: tuple[float, ...], hidden_BTD: Tensor, positions_BT: Tensor) -> Tables:
    """cos and sin of pairs that turn by so many radians per token, in the dtype of hidden states."""
    angles = positions_BT[..., None].float() * _on_device(speeds, positions_BT.device)
    cos, sin = (torch.cat([table, table], dim=-1).to(hidden_BTD.dtype) for table in (angles.cos(), angles.sin()))
    return cos, sin


@functools.lru_cache(maxsize=64)
def _on_device(speeds: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(speeds, dtype=torch.float32, device=device)


def slow_tables(cos: Tensor, sin: Tensor, fast_pairs: int) -> tuple[Tensor, Tensor]:
    """Tables that leave the first `fast_pairs` pairs of a head as they are."""
    pair = torch.arange(cos.shape[-1], device=cos.device) % (cos.shape[-1] // 2)
    fast = pair < fast_pairs
    return torch.where(fast, torch.ones_like(cos), cos), torch.where(fast, torch.zeros_like(sin), sin)


def rotate_fast(x_BNTH: Tensor, cos_BTr: Tensor, sin_BTr: Tensor, fast_pairs: int) -> Tensor:
    """Rotate the first `fast_pairs` pairs of each head only."""
    cos, sin, half = cos_BTr.unsqueeze(1), sin_BTr.unsqueeze(1), cos_BTr.shape[-1] // 2
    first, second = slice(fast_pairs), slice(half, half + fast_pairs)
    a, b = x_BNTH[..., first], x_BNTH[..., second]
    turned_a = a * cos[..., first] - b * sin[..., first]
    turned_b = b * cos[..., second] + a * sin[..., second]
    parts = turned_a, x_BNTH[..., fast_pairs:half], turned_b, x_BNTH[..., half + fast_pairs :]
    return torch.cat([part.to(x_BNTH.dtype) for part in parts], dim=-1)  # some tables are float32


def apply_rotary(x_BNTH: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> Tensor:
    """Rotate the first r numbers of each head, half-split pairs; cos and sin come from the model's own rotary module."""
    cos, sin = cos_BTr.unsqueeze(1), sin_BTr.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    turning, rest = x_BNTH[..., :rotary_dim], x_BNTH[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BNTH.dtype)  # some tables are float32
    return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)
