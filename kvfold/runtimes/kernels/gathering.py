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
    (B, C, _, X), row = x_BCSX.shape, x_BCSX.stride(2)
    if not in_rows(x_BCSX) or (torch.is_grad_enabled() and x_BCSX.requires_grad):
        return x_BCSX.gather(2, index_BCn[..., None].expand(-1, -1, -1, X))
    numbers_BCn, count = row_numbers(x_BCSX, index_BCn)
    return x_BCSX.as_strided((count, X), (row, 1)).index_select(0, numbers_BCn.flatten()).view(B, C, -1, X)


def in_rows(x_BCSX: Tensor) -> bool:
    """Whether every token of every head lies a whole number of rows behind the first, its numbers side by side."""
    batch, head, row, one = x_BCSX.stride()
    return one == 1 and row > 0 and batch % row == 0 and head % row == 0


def row_numbers(x_BCSX: Tensor, index_BGn: Tensor) -> tuple[Tensor, int]:
    """[B, G, n]: which rows the tokens of the first head of each group are; and how many rows there are up to the last
    group's last token."""
    (B, G, _), (_, C, S, _), (batch, head, row, _) = index_BGn.shape, x_BCSX.shape, x_BCSX.stride()
    group = C // G * head // row
    first_BG = torch.arange(B)[:, None] * (batch // row) + torch.arange(G) * group
    count = (B - 1) * (batch // row) + (G - 1) * group + S
    return index_BGn + first_BG[..., None].to(index_BGn.device), count
