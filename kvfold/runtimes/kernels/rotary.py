"""Rotary embedding of heads by given tables."""

from __future__ import annotations

import torch
from torch import Tensor


def by_speed(cos: Tensor, sin: Tensor, fast_pairs: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Tables that turn the first `fast_pairs` pairs of a head and leave the others as they are, and tables that turn the
    others."""
    pair = torch.arange(cos.shape[-1], device=cos.device) % (cos.shape[-1] // 2)
    fast = pair < fast_pairs
    still, none = torch.ones_like(cos), torch.zeros_like(sin)
    turned = torch.where(fast, cos, still), torch.where(fast, sin, none)
    return turned, (torch.where(fast, still, cos), torch.where(fast, none, sin))


def apply_rotary(x_BNTH: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> Tensor:
    """Rotate the first r numbers of each head, half-split pairs; cos and sin come from the model's own rotary module."""
    cos, sin = cos_BTr.unsqueeze(1), sin_BTr.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    turning, rest = x_BNTH[..., :rotary_dim], x_BNTH[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BNTH.dtype)  # some tables are float32
    return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)
