"""Attention over tokens of two forms by the kernels that read one: each form by itself, then one softmax over both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold.runtimes.kernels import cpu
from kvfold.runtimes.kernels.aged_attention import beside
from kvfold.runtimes.kernels.attention import additive
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, part


def serves(q: tuple[Tensor, Tensor], z: AgedTokens, y: AgedTokens) -> bool:
    """Whether the CPU's kernel takes both forms, for few queries that meet stored keys."""
    return cpu.serves(q[0], z.far, y.far) and cpu.serves(q[1], z.near, y.near)


def attend(
    q: tuple[Tensor, Tensor], z: AgedTokens, y: AgedTokens, mask: Tensor | None, width: int, *, scale: float
) -> Tensor:
    """[B, T, N, V] of absorbed queries as they meet far and near keys. With averages o and log-sums l of the parts, the whole
    is sum_i e^(l_i) o_i / sum_i e^(l_i). width: V, of which far values are the first numbers and near ones the last."""
    T, S, recent = q[0].shape[2], z.shape[2], z.recent
    near, near_sums = _part(q[1], z.near, y.near, mask, max(S - T - recent + 1, 0), S, S, recent, True, scale)
    if recent >= S:
        return beside(near, near, width)[1].to(q[0].dtype).transpose(1, 2)
    far, far_sums = _part(q[0], z.far, y.far, mask, 0, S - recent, S, recent, False, scale)
    largest = torch.maximum(far_sums, near_sums)
    counts = [(sums - largest).exp()[..., None] for sums in (far_sums, near_sums)]
    far, near = beside(far, near, width)
    return ((far * counts[0] + near * counts[1]) / (counts[0] + counts[1])).to(q[0].dtype).transpose(1, 2)


def _part(
    q_BNTR: Tensor,
    keys: Any,
    values: Any,
    mask: Tensor | None,
    start: int,
    end: int,
    tokens: int,
    recent: int,
    is_near: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Over the tokens start:end of all, of which each query sees those whose age asks for this form."""
    T = q_BNTR.shape[2]
    bias = additive(mask, T, tokens, start, end, q_BNTR)
    if T > 1:
        queries = torch.arange(tokens - T, tokens, device=q_BNTR.device)[:, None]
        fine_Ts = queries - torch.arange(start, end, device=q_BNTR.device) < recent
        bias = (q_BNTR.new_zeros(T, end - start) if bias is None else bias).masked_fill(
            fine_Ts != is_near, torch.finfo(q_BNTR.dtype).min
        )
    shift = keys.shape[2] - tokens if is_near else 0  # where the newest tokens' own storage begins
    stored = part(keys, start + shift, end + shift), part(values, start + shift, end + shift)
    return cpu.decode_part(q_BNTR, *stored, None if bias is None else bias.float(), scale=scale)
