"""Storage of the newest tokens in their finer form."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.dispatch import pack, store_in_place, stores_in_place
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored


class RecentBuffer:
    """The newest tokens in their finer form, no more than `tokens`: few enough to be written anew at every step."""

    def __init__(self, format: NumberFormat | None, width: int, tokens: int) -> None:
        self.format, self.width, self.tokens = format, width, tokens
        self.rows: Tensor | None = None
        self.dtype = torch.float32

    def append(self, new_BCTE: Tensor, keep_all: bool = False) -> Stored:
        """Show what is kept and the new tokens; keep the newest of them, or, until `forget`, all."""
        self.dtype = new_BCTE.dtype
        full = self.count == self.tokens and new_BCTE.shape[2] == 1 and not keep_all
        if full and self.format is not None and stores_in_place(new_BCTE, self.format):
            return self._replace_oldest(new_BCTE)
        new = new_BCTE if self.format is None else pack(new_BCTE, self.format)
        shown = new if self.rows is None else torch.cat([self.rows, new], dim=2)
        self.rows = (shown if keep_all else shown[:, :, -self.tokens :]).clone(memory_format=torch.contiguous_format)
        return shown if self.format is None else PackedTokens(shown, self.format, self.dtype)

    def _replace_oldest(self, new_BC1E: Tensor) -> Stored:
        """A step of a full buffer, whose memory stays where it is: what no query sees any more makes room."""
        assert self.rows is not None and self.format is not None, "it is full of packed tokens"
        self.rows[:, :, :-1] = self.rows[:, :, 1:].clone()
        fresh = store_in_place(self.rows, self.tokens - 1, new_BC1E, self.format)
        return PackedTokens(self.rows, self.format, self.dtype, fresh=fresh)

    def forget(self, tokens: int) -> None:
        """Drop the last tokens."""
        if self.rows is not None:
            self.rows = self.rows[:, :, : max(self.rows.shape[2] - tokens, 0)][:, :, -self.tokens :].clone()

    @property
    def count(self) -> int:
        """Tokens that are kept."""
        return 0 if self.rows is None else self.rows.shape[2]

    def select(self, rows: Tensor) -> None:
        self.rows = None if self.rows is None else self.rows.index_select(0, rows.to(self.rows.device))

    def repeat(self, repeats: int) -> None:
        self.rows = None if self.rows is None else self.rows.repeat_interleave(repeats, dim=0)

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.numel() * self.rows.element_size()
