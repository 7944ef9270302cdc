"""Rotary embedding of heads by given tables."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x_BNTH: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> Tensor:
    """Rotate the first r numbers of each head, half-split pairs; cos and sin come from the model's own rotary module."""
    cos, sin = cos_BTr.unsqueeze(1), sin_BTr.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    turning, rest = x_BNTH[..., :rotary_dim], x_BNTH[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BNTH.dtype)  # some tables are float32
    return turned if not rest.shape[-1] else torch.cat((turned, rest), dim=-1)
