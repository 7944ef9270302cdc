"""Storage that grows in place, and that of plain numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CACHE_BLOCK, round_up
from kvfold.runtimes.kernels.gathering import gather_tokens
from kvfold.runtimes.kernels.packed_tokens import Stored


class Buffer(ABC):
    """One side of one cache: tokens are appended, shown, forgotten from the end; rows of the batch are chosen."""

    @abstractmethod
    def append(self, new_BCTR: Tensor, capacity: int) -> None:
        """Write T new tokens behind the live ones, in a storage of at least `capacity` tokens."""

    @abstractmethod
    def view(self, last: int | None = None) -> Stored:
        """The live tokens, or the last of them, without a copy."""

    @abstractmethod
    def slide(self, new_BCTR: Tensor, capacity: int, window: int) -> Stored:
        """Append, and show what the new tokens may see; beyond the window only its last tokens are kept."""

    @abstractmethod
    def drop(self, tokens: int, early: Tensor | None, count: int) -> None:
        """Forget so many tokens behind the first `count`, in whose place those at `early` [B, count] stay (None: they do)."""

    @abstractmethod
    def pass_by(self, new_BCTR: Tensor, capacity: int, early: Tensor | None, count: int, last: int) -> Stored:
        """Append, and show all; of these only those at `early` and the `last` ones are kept."""

    @abstractmethod
    def beside(self, new_BCTR: Tensor) -> Stored:
        """The live tokens and new ones, without storing these."""

    def behind(self, shown: Stored, new_BCTR: Tensor) -> Stored:
        """What `beside` has shown, and new ones."""
        raise AssertionError("only where tokens can be dropped")

    @abstractmethod
    def keep(self, shown: Stored, index_BCn: Tensor, capacity: int) -> None:
        """Of what `beside` has shown store these tokens, of each head its own, and nothing else."""

    @abstractmethod
    def replace(self, x_BCTR: Tensor, rows: Tensor) -> None:
        """Other numbers for the live tokens, in these rows [B] of the batch."""

    @abstractmethod
    def forget(self, tokens: int, window: int | None) -> None:
        """Drop the last tokens."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""

    @abstractmethod
    def repeat(self, repeats: int) -> None:
        """Every row of the batch so many times."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the live tokens."""

    @property
    @abstractmethod
    def nbytes_allocated(self) -> int:
        """Bytes of the storage."""


class GrowingBuffer(Buffer):
    """A tensor [B, heads, capacity, width] of which the tokens start:end are live. Growing never touches the live ones."""

    def __init__(self, unit: int = CACHE_BLOCK) -> None:
        self.unit = unit
        self.data: Tensor | None = None
        self.start = 0
        self.end = 0

    def append(self, new_BCTR: Tensor, capacity: int) -> None:
        tokens = new_BCTR.shape[2]
        data = self.room_for(new_BCTR, capacity)
        if torch.is_grad_enabled() and new_BCTR.requires_grad:
            self._append_differentiably(new_BCTR)
        else:
            data[:, :, self.end : self.end + tokens] = new_BCTR
        self.end += tokens

    def room_for(self, new_BCTR: Tensor, capacity: int, *, row_bytes: int = 0) -> Tensor:
        """The storage, with room for these tokens from `end` on: as they are, or in rows of so many bytes."""
        (B, C, tokens, R), dtype = new_BCTR.shape, torch.uint8 if row_bytes else new_BCTR.dtype
        if self.data is None:
            self.data = new_BCTR.new_empty(B, C, 0, row_bytes or R, dtype=dtype)
        if max(capacity, self.end + tokens) > self.data.shape[2]:
            self._make_room(tokens, capacity)
        return self.data

    def view(self, last: int | None = None) -> Tensor:
        return self.tensor(last)

    def tensor(self, last: int | None = None) -> Tensor:
        """The live part of the storage, or the end of it."""
        assert self.data is not None, "nothing was stored yet"
        start = self.start if last is None else max(self.end - last, self.start)
        return self.data[:, :, start : self.end]

    def slide(self, new_BCTR: Tensor, capacity: int, window: int) -> Tensor:
        """A long prompt passes through without ever being stored whole."""
        count, tokens = self.end - self.start, new_BCTR.shape[2]
        if tokens == 1 or count + tokens <= window:
            self.append(new_BCTR, capacity)
            shown = self.tensor()
        else:
            shown = new_BCTR if self.data is None else torch.cat([self.tensor(), new_BCTR], dim=2)
            self.start = self.end = 0  # the tokens that stay are written again, from `shown`
            self.append(shown[:, :, shown.shape[2] - window + 1 :], capacity)
        self.start = max(self.start, self.end - window + 1)
        return shown

    def drop(self, tokens: int, early: Tensor | None, count: int) -> None:
        assert self.data is not None, "nothing was stored yet"
        kept = _early(self.tensor(), early, count)
        self.start += tokens
        self.data[:, :, self.start : self.start + count] = kept

    def pass_by(self, new_BCTR: Tensor, capacity: int, early: Tensor | None, count: int, last: int) -> Tensor:
        shown = self.beside(new_BCTR)
        self.start = self.end = 0  # the tokens that stay are written again, from `shown`
        self.append(torch.cat([_early(shown, early, count), shown[:, :, shown.shape[2] - last :]], dim=2), capacity)
        return shown

    def beside(self, new_BCTR: Tensor) -> Tensor:
        return new_BCTR if self.data is None else torch.cat([self.tensor(), new_BCTR], dim=2)

    def behind(self, shown: Tensor, new_BCTR: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([shown, new_BCTR], dim=2)

    def keep(self, shown: Tensor, index_BCn: Tensor, capacity: int) -> None:  # type: ignore[override]
        self.start = self.end = 0
        self.append(gather_tokens(shown, index_BCn), capacity)

    def replace(self, x_BCTR: Tensor, rows: Tensor) -> None:
        self.tensor()[rows] = x_BCTR[rows]

    def forget(self, tokens: int, window: int | None) -> None:
        self.end -= tokens
        if window is not None:
            self.start = max(self.start, self.end - window + 1)

    def select(self, rows: Tensor) -> None:
        """The usual beam step that changes nothing copies nothing."""
        if self.data is None:
            return
        identity = torch.arange(self.data.shape[0], device=rows.device)
        if rows.shape != identity.shape or not torch.equal(rows, identity):
            self.data = self.data.index_select(0, rows.to(self.data.device))

    def repeat(self, repeats: int) -> None:
        if self.data is not None:
            self.data = self.data.repeat_interleave(repeats, dim=0)

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.tensor().numel() * self.data.element_size()

    @property
    def nbytes_allocated(self) -> int:
        return 0 if self.data is None else self.data.untyped_storage().nbytes()

    def _make_room(self, tokens: int, capacity: int) -> None:
        assert self.data is not None
        live = self.tensor()
        count = live.shape[2]
        room = max(capacity, round_up(count + tokens, self.unit))
        if room <= self.data.shape[2]:  # a window slid far enough: back to the front of the same storage
            self.data[:, :, :count] = live.clone()
        else:
            B, C, _, R = self.data.shape
            grown = self.data.new_empty(B, C, room, R)
            grown[:, :, :count] = live
            self.data = grown
        self.start, self.end = 0, count

    def _append_differentiably(self, new_BCTR: Tensor) -> None:
        # Writing in place would invalidate what an earlier forward saved for its backward pass.
        assert self.data is not None
        unused = self.data[:, :, self.end + new_BCTR.shape[2] :].detach()
        self.data = torch.cat([self.data[:, :, : self.end], new_BCTR, unused], dim=2)


def _early(shown_BCSR: Tensor, early: Tensor | None, count: int) -> Tensor:
    """Tokens at the places `early` [B, count], or the first, as memory of their own."""
    if early is None:
        return shown_BCSR[:, :, :count].clone()
    return gather_tokens(shown_BCSR, early[:, None].expand(-1, shown_BCSR.shape[1], -1))
