"""Attention of few query tokens over packed numbers by the GPU's kernels (triton_kernels.py), as cpu_decode.py has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.plan.number_format import ELSEWHERE
from kvfold.runtimes.kernels.cpu_decode import ANY_AGE, Averages
from kvfold.runtimes.kernels.gpu import works_for
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, SideBySide, Stored, recorded


def serves(q_BNTR: Tensor, keys: Stored, values: Stored) -> bool:
    """Whether the kernels take these tensors, and nobody wants gradients or a graph of it."""
    parts = [part for x in (keys, values) for part in (x.parts if isinstance(x, SideBySide) else [x])]
    if not q_BNTR.is_cuda or q_BNTR[..., 0].numel() * keys.shape[2] > ELSEWHERE:  # scores exist
        return False
    if not all(_is_known(part, q_BNTR) for part in parts) or (torch.is_grad_enabled() and q_BNTR.requires_grad):
        return False
    return not recorded(q_BNTR, *(part.rows for part in parts)) and works_for(q_BNTR)  # type: ignore[union-attr]


def _is_known(x: Any, q: Tensor) -> bool:
    packed = isinstance(x, PackedTokens) and x.format.codec.fused and x.recent is None
    return packed and x.rows.stride(-1) == 1 and x.device == q.device and x.dtype == q.dtype


def decode(q_BNTR: Tensor, keys: Any, values: Any, bias: Tensor | None, *, map: None = None, **sizes: Any) -> Tensor:
    """[B, T, N, V] over all tokens, the queries being at their end."""
    assert map is None, "nobody asks a GPU's kernels for it"
    return decode_part(q_BNTR, keys, values, bias, **sizes).averages.to(q_BNTR.dtype).transpose(1, 2)


def decode_part(
    q_BNTR: Tensor,
    keys: Any,
    values: Any,
    bias: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    position: int | None = None,
    ages: tuple[int, int] = ANY_AGE,
    rebuild: None = None,
) -> Averages:
    """As `cpu_decode.decode_part`, which alone rebuilds keys."""
    from kvfold.runtimes.kernels import triton_kernels as kernels

    assert rebuild is None, "nobody asks a GPU's kernels for it"
    scores_BNTS = kernels.scores(q_BNTR, keys)
    at = keys.shape[2] - q_BNTR.shape[2] if position is None else position
    log_sums = kernels.softmax_(scores_BNTS, bias, scale=scale, softcap=softcap, position=at, ages=ages)
    return Averages(kernels.weighted(scores_BNTS, values, q_BNTR.dtype), log_sums)


def values_of(parts: Sequence[Averages], width: int, dtype: torch.dtype, map: None = None) -> Tensor:
    """As `cpu_decode.values_of`, which alone has maps: [B, T, N, width]."""
    assert map is None, "nobody asks a GPU's kernels for it"
    shares = torch.stack([part.log_sums for part in parts], dim=-1).softmax(-1).unbind(-1)
    total: Any = 0
    for (averages, _, last), share in zip(parts, shares, strict=True):
        beside = width - averages.shape[-1]
        total = total + F.pad(averages * share.unsqueeze(-1), (beside, 0) if last else (0, beside))
    return total.to(dtype).transpose(1, 2)
