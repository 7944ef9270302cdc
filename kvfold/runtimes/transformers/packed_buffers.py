"""Storage of packed numbers that grows in place: token by token, and by blocks of tokens that share scales."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CACHE_BLOCK
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.dispatch import pack, store_in_place, stores_in_place
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored
from kvfold.runtimes.transformers.buffers import Buffer, GrowingBuffer


class PackedBuffer(Buffer):
    """Tokens that are packed when they come."""

    def __init__(self, format: NumberFormat, unit: int = CACHE_BLOCK) -> None:
        self.format, self.rows = format, GrowingBuffer(unit)
        self.dtype = torch.float32
        self.fresh: Tensor | None = None

    def append(self, new_BCTR: Tensor, capacity: int) -> None:
        self.fresh = None
        if not stores_in_place(new_BCTR, self.format):
            self.rows.append(self._pack(new_BCTR), capacity)
            return
        self.dtype, rows = new_BCTR.dtype, self.rows.room_for(new_BCTR, capacity, row_bytes=self.format.row_bytes)
        self.fresh = store_in_place(rows, self.rows.end, new_BCTR, self.format)
        self.rows.end += new_BCTR.shape[2]

    def view(self, last: int | None = None) -> Stored:
        fresh, self.fresh = self.fresh, None  # of the tokens that were just appended
        return PackedTokens(self.rows.tensor(last), self.format, self.dtype, fresh=fresh)

    def slide(self, new_BCTR: Tensor, capacity: int, window: int) -> Stored:
        return PackedTokens(self.rows.slide(self._pack(new_BCTR), capacity, window), self.format, self.dtype)

    def drop(self, tokens: int, early: Tensor | None, count: int) -> None:
        self.rows.drop(tokens, early, count)

    def pass_by(self, new_BCTR: Tensor, capacity: int, early: Tensor | None, count: int, last: int) -> Stored:
        shown = self.rows.pass_by(self._pack(new_BCTR), capacity, early, count, last)
        return PackedTokens(shown, self.format, self.dtype)

    def beside(self, new_BCTR: Tensor) -> Stored:
        return PackedTokens(self.rows.beside(self._pack(new_BCTR)), self.format, self.dtype)

    def behind(self, shown: PackedTokens, new_BCTR: Tensor) -> Stored:  # type: ignore[override]
        return PackedTokens(torch.cat([shown.rows, self._pack(new_BCTR)], dim=2), self.format, self.dtype)

    def keep(self, shown: PackedTokens, index_BCn: Tensor, capacity: int) -> None:  # type: ignore[override]
        self.rows.keep(shown.rows, index_BCn, capacity)

    def replace(self, x_BCTR: Tensor, rows: Tensor) -> None:
        self.rows.replace(self._pack(x_BCTR), rows)

    def forget(self, tokens: int, window: int | None) -> None:
        self.rows.forget(tokens, window)

    def select(self, rows: Tensor) -> None:
        self.rows.select(rows)

    def repeat(self, repeats: int) -> None:
        self.rows.repeat(repeats)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def nbytes_allocated(self) -> int:
        return self.rows.nbytes_allocated

    def _pack(self, new_BCTR: Tensor) -> Tensor:
        self.dtype = new_BCTR.dtype
        return pack(new_BCTR, self.format)


class BlockedBuffer(Buffer):
    """Tokens that are packed by whole blocks; those of a block that is not full are kept as they came."""

    def __init__(self, format: NumberFormat) -> None:
        self.format = format
        self.blocks = GrowingBuffer(unit=CACHE_BLOCK // format.block)
        self.recent: Tensor | None = None
        self.count = 0

    def append(self, new_BCTR: Tensor, capacity: int) -> None:
        if self.recent is None:
            B, C, _, R = new_BCTR.shape
            self.recent = new_BCTR.new_empty(B, C, self.format.block, R)
        exact = torch.cat([self.recent[:, :, : self.count], new_BCTR.detach()], dim=2)
        self.count = exact.shape[2] % self.format.block
        full = exact[:, :, : exact.shape[2] - self.count]
        rows = pack(full, self.format) if full.shape[2] else self._no_rows(full)
        self.blocks.append(rows, capacity // self.format.block)
        self.recent[:, :, : self.count] = exact[:, :, full.shape[2] :]

    def view(self, last: int | None = None) -> Stored:
        assert self.recent is not None, "nothing was stored yet"
        assert last is None, "a sliding window could cut a block"
        return PackedTokens(self.blocks.tensor(), self.format, self.recent.dtype, self.recent[:, :, : self.count])

    def slide(self, new_BCTR: Tensor, capacity: int, window: int) -> Stored:
        raise AssertionError("a sliding window could cut a block")

    def drop(self, tokens: int, early: Tensor | None, count: int) -> None:
        raise AssertionError("dropping tokens could cut a block")

    def pass_by(self, new_BCTR: Tensor, capacity: int, early: Tensor | None, count: int, last: int) -> Stored:
        raise AssertionError("dropping tokens could cut a block")

    def beside(self, new_BCTR: Tensor) -> Stored:
        raise AssertionError("dropping tokens could cut a block")

    def keep(self, shown: Stored, index_BCn: Tensor, capacity: int) -> None:
        raise AssertionError("dropping tokens could cut a block")

    def replace(self, x_BCTR: Tensor, rows: Tensor) -> None:
        raise AssertionError("dropping tokens could cut a block")

    def forget(self, tokens: int, window: int | None) -> None:
        """Tokens of a block that is cut come back as numbers."""
        left = self.blocks.end * self.format.block + self.count - tokens
        if tokens > self.count:
            assert self.recent is not None, "nothing was stored yet"
            cut = left // self.format.block
            kept = PackedTokens(self.blocks.tensor(), self.format, self.recent.dtype).read(
                cut * self.format.block, left
            )
            self.recent[:, :, : kept.shape[2]] = kept
            self.blocks.end = cut
        self.count = left - self.blocks.end * self.format.block

    def select(self, rows: Tensor) -> None:
        self.blocks.select(rows)
        if self.recent is not None:
            self.recent = self.recent.index_select(0, rows.to(self.recent.device))

    def repeat(self, repeats: int) -> None:
        self.blocks.repeat(repeats)
        if self.recent is not None:
            self.recent = self.recent.repeat_interleave(repeats, dim=0)

    @property
    def nbytes(self) -> int:
        exact = 0 if self.recent is None else self.recent[:, :, : self.count].numel() * self.recent.element_size()
        return self.blocks.nbytes + exact

    @property
    def nbytes_allocated(self) -> int:
        return self.blocks.nbytes_allocated + (0 if self.recent is None else self.recent.untyped_storage().nbytes())

    def _no_rows(self, like: Tensor) -> Tensor:
        return torch.empty(*like.shape[:2], 0, self.format.block_bytes, dtype=torch.uint8, device=like.device)


def buffer(format: NumberFormat | None, unit: int = CACHE_BLOCK) -> Buffer:
    """An empty storage for numbers of this format. unit: tokens by which it grows."""
    if format is None:
        return GrowingBuffer(unit)
    return PackedBuffer(format, unit) if format.block == 1 else BlockedBuffer(format)
