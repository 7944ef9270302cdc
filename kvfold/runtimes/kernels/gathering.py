"""Whole tokens, of each stored head its own, copied out of what is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored, read_all


def taken(stored: Stored, index_BCn: Tensor) -> Stored:
    """Of each stored head tokens of its own, as they are stored; of formats whose tokens stand alone."""
    if isinstance(stored, PackedTokens):
        rows = gather_tokens(stored.rows, index_BCn)
        return PackedTokens(rows, stored.format, stored.dtype, width=stored.width)
    return gather_tokens(read_all(stored), index_BCn)


def gather_tokens(x_BCSX: Tensor, index_BCn: Tensor) -> Tensor:
    """Of each head tokens of its own [B, C, n, X]. Those that lie in one piece of memory are copied as such, of which
    gathering number by number knows nothing."""
    (B, C, S, X), (batch, head, row, one) = x_BCSX.shape, x_BCSX.stride()
    apart = one != 1 or not row or batch % row or head % row
    if apart or (torch.is_grad_enabled() and x_BCSX.requires_grad):
        return x_BCSX.gather(2, index_BCn[..., None].expand(-1, -1, -1, X))
    count = (B - 1) * (batch // row) + (C - 1) * (head // row) + S
    rows = x_BCSX.as_strided((count, X), (row, 1))
    first_BC1 = torch.arange(B, device=index_BCn.device)[:, None, None] * (batch // row)
    first_BC1 = first_BC1 + torch.arange(C, device=index_BCn.device)[None, :, None] * (head // row)
    return rows.index_select(0, (first_BC1 + index_BCn).flatten()).view(B, C, -1, X)
