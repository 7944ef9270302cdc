"""Rows of bytes out of pages, and into them: by torch, and by the CPU's kernel where it serves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.runtimes.kernels import cpu


def gather(rows_PCtX: Tensor, tables_Bp: Tensor, spans: Sequence[tuple[int, int]], width: int) -> Tensor:
    """[B, C, width, X]: the tokens start:end of sequences whose pages the tables name, at the end of rows of zeros.

    rows_PCtX: a region [pages, heads, tokens, bytes] that inside a page is one piece of memory.
    """
    if cpu.pages(rows_PCtX):
        return cpu.gather(rows_PCtX, tables_Bp, spans, width)
    return gather_by_torch(rows_PCtX, tables_Bp, spans, width)


def gather_by_torch(rows_PCtX: Tensor, tables_Bp: Tensor, spans: Sequence[tuple[int, int]], width: int) -> Tensor:
    """The obvious version."""
    _, heads, tokens, row_bytes = rows_PCtX.shape
    out = rows_PCtX.new_zeros(len(spans), heads, width, row_bytes)
    for row, table_p, (start, end) in zip(out, tables_Bp, spans, strict=True):
        first = start // tokens
        found = rows_PCtX[table_p[first : -(-end // tokens)].long()].transpose(0, 1).flatten(1, 2)
        row[:, width - (end - start) :] = found[:, start - first * tokens : end - first * tokens]
    return out


def scatter(rows_PCtX: Tensor, slots_T: Tensor, new_CTX: Tensor) -> None:
    """Write rows where their slots are: page * tokens + place; -1 is nowhere."""
    if cpu.pages(rows_PCtX) and new_CTX.stride(-1) == 1:
        cpu.scatter(rows_PCtX, slots_T, new_CTX)
    elif rows_PCtX.is_cuda:
        scatter_at_once(rows_PCtX, slots_T, new_CTX)
    else:
        scatter_by_torch(rows_PCtX, slots_T, new_CTX)


def scatter_by_torch(rows_PCtX: Tensor, slots_T: Tensor, new_CTX: Tensor) -> None:
    """The obvious version, which waits for the device to say how many are somewhere."""
    live = slots_T >= 0
    slots, tokens = slots_T[live].long(), rows_PCtX.shape[2]
    rows_PCtX[torch.div(slots, tokens, rounding_mode="floor"), :, slots % tokens] = new_CTX.transpose(0, 1)[live]


def scatter_at_once(rows_PCtX: Tensor, slots_T: Tensor, new_CTX: Tensor) -> None:
    """The same without waiting: what is nowhere becomes zeros in the first page, which only stands where a sequence has none
    (vLLM's null block)."""
    slots, tokens, nowhere_T11 = slots_T.long().clamp_min(0), rows_PCtX.shape[2], (slots_T < 0)[:, None, None]
    new_TCX = new_CTX.transpose(0, 1).masked_fill(nowhere_T11, 0)
    rows_PCtX[torch.div(slots, tokens, rounding_mode="floor"), :, slots % tokens] = new_TCX
