"""Storage that grows in place: plain numbers, packed ones, and packed ones whose scales several tokens share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CACHE_BLOCK, round_up
from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.dispatch import pack, store_in_place, stores_in_place
from kvfold.runtimes.kernels.gathering import gather_tokens
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored


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
        data = self.room_for(new_BCTR[:, :, :0], tokens, capacity)
        if torch.is_grad_enabled() and new_BCTR.requires_grad:
            self._append_differentiably(new_BCTR)
        else:
            data[:, :, self.end : self.end + tokens] = new_BCTR
        self.end += tokens

    def room_for(self, none_BC0R: Tensor, tokens: int, capacity: int) -> Tensor:
        """The storage, with room for so many tokens from `end` on. none_BC0R: says of what kind and size."""
        if self.data is None:
            self.data = torch.empty_like(none_BC0R)
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
        (B, C, T, _), self.dtype = new_BCTR.shape, new_BCTR.dtype
        no_rows = torch.empty(B, C, 0, self.format.row_bytes, dtype=torch.uint8, device=new_BCTR.device)
        self.fresh = store_in_place(self.rows.room_for(no_rows, T, capacity), self.rows.end, new_BCTR, self.format)
        self.rows.end += T

    def view(self, last: int | None = None) -> Stored:
        return PackedTokens(self.rows.tensor(last), self.format, self.dtype, fresh=self.fresh)

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
        self.fresh = None
        self.rows.forget(tokens, window)

    def select(self, rows: Tensor) -> None:
        self.fresh = None
        self.rows.select(rows)

    def repeat(self, repeats: int) -> None:
        self.fresh = None
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


def _early(shown_BCSR: Tensor, early: Tensor | None, count: int) -> Tensor:
    """Tokens at the places `early` [B, count], or the first, as memory of their own."""
    if early is None:
        return shown_BCSR[:, :, :count].clone()
    return gather_tokens(shown_BCSR, early[:, None].expand(-1, shown_BCSR.shape[1], -1))


def buffer(format: NumberFormat | None, unit: int = CACHE_BLOCK) -> Buffer:
    """An empty storage for numbers of this format. unit: tokens by which it grows."""
    if format is None:
        return GrowingBuffer(unit)
    return PackedBuffer(format, unit) if format.block == 1 else BlockedBuffer(format)
