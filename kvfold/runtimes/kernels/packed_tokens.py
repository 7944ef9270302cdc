"""Stored tokens as attention gets them: plain numbers, or rows of bytes that are turned into numbers where they are read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.codecs.base import Scaled
from kvfold.plan.number_format import NumberFormat
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes.kernels.codec import unpack, unpack_scaled

Operand = Tensor | list[Scaled]
"""Heads of some tokens [B, heads, tokens, width], or their tiers: a number is (code + 1/2) times its token's scale."""


class PackedTokens:
    """Tokens [B, C, S, R] as bytes, turned into numbers where they are read.

    `rows`: [B, C, S / block, bytes]; `recent`: tokens behind them that are still exact, of a block that is not full. `width`:
    the first so many numbers of each, where others are not asked for. `fresh`: the last tokens as numbers, where these came
    with the running step.
    """

    def __init__(
        self,
        rows: Tensor,
        format: NumberFormat,
        dtype: torch.dtype,
        recent: Tensor | None = None,
        width: int | None = None,
        fresh: Tensor | None = None,
    ) -> None:
        self.rows, self.format, self.dtype, self.recent, self.fresh = rows, format, dtype, recent, fresh
        self.width = format.width if width is None else width

    @property
    def shape(self) -> torch.Size:
        B, C, blocks, _ = self.rows.shape
        recent = 0 if self.recent is None else self.recent.shape[2]
        return torch.Size((B, C, blocks * self.format.block + recent, self.width))

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def to(self, device: torch.device) -> PackedTokens:
        if self.rows.device == device:
            return self
        recent = None if self.recent is None else self.recent.to(device)
        return PackedTokens(self.rows.to(device), self.format, self.dtype, recent, self.width)

    def read(self, start: int, end: int) -> Tensor:
        """The tokens start:end as numbers."""
        block = self.format.block
        if block == 1:
            return self.read_into(None, start, end)
        packed = self.rows.shape[2] * block
        first = min(start // block, self.rows.shape[2])
        seen = unpack(self.rows[:, :, first : -(-min(end, packed) // block)], self.format, self.dtype)
        exact = [] if self.recent is None else [self.recent[:, :, max(start - packed, 0) : max(end - packed, 0)]]
        return torch.cat([seen[:, :, start - first * block : min(end, packed) - first * block], *exact], dim=2)

    def read_into(self, out: Tensor | None, start: int, end: int) -> Tensor:
        """The same, into memory that is there; of formats whose tokens stand alone."""
        from kvfold.runtimes.kernels.dispatch import unpack  # which imports this module

        return unpack(self.rows[:, :, start:end], self.format, self.dtype, out, self.width)

    def read_scaled(self, start: int, end: int) -> list[Scaled]:
        """The same with the scales of every tier apart."""
        return unpack_scaled(self.rows[:, :, start:end], self.format, self.dtype)


class PagedTokens:
    """Tokens of several sequences that lie in pages: `rows` [pages, heads, tokens, bytes], which are numbers of `dtype` where
    format is None; tables_Bp, int32: the pages of each sequence. width: the first so many numbers, where others are not asked
    for."""

    def __init__(
        self, rows: Tensor, format: NumberFormat | None, dtype: torch.dtype, tables_Bp: Tensor, width: int | None = None
    ) -> None:
        self.rows, self.format, self.dtype, self.tables_Bp = rows, format, dtype, tables_Bp
        whole = rows.shape[3] // dtype.itemsize if format is None else format.width
        self.width = whole if width is None else width

    def of(self, tables_Bp: Tensor) -> PagedTokens:
        """Those of other sequences."""
        return PagedTokens(self.rows, self.format, self.dtype, tables_Bp, self.width)

    @property
    def shape(self) -> torch.Size:
        """[B, heads, tokens that the tables have room for, R]."""
        _, heads, tokens, _ = self.rows.shape
        B, pages = self.tables_Bp.shape
        return torch.Size((B, heads, pages * tokens, self.width))


class ReadOnce(PackedTokens):
    """Packed tokens whose last reading is kept, for keys and values that are rebuilt from the same numbers."""

    def __init__(self, tokens: PackedTokens) -> None:
        super().__init__(tokens.rows, tokens.format, tokens.dtype, tokens.recent, tokens.width)
        self.last: tuple[tuple[int, int], Tensor] | None = None

    def read(self, start: int, end: int) -> Tensor:
        if self.last is None or self.last[0] != (start, end):
            self.last = (start, end), super().read(start, end)
        return self.last[1]


class SideBySide:
    """The same tokens as several layers store them, [B, C, S, R of the first + R of the second + ...]."""

    def __init__(self, parts: Sequence[Tensor | PackedTokens]) -> None:
        self.parts = list(parts)
        self.last: tuple[tuple[int, int], Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        B, C, S, _ = self.parts[0].shape
        return torch.Size((B, C, S, sum(part.shape[3] for part in self.parts)))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def to(self, device: torch.device) -> SideBySide:
        return SideBySide([part.to(device) for part in self.parts])

    def read(self, start: int, end: int) -> Tensor:
        """The tokens start:end as numbers; the last reading is kept, since keys and values are rebuilt from the same."""
        if self.last is None or self.last[0] != (start, end):
            self.last = (start, end), self._joined(start, end)
        return self.last[1]

    def _joined(self, start: int, end: int) -> Tensor:
        packed = [part for part in self.parts if isinstance(part, PackedTokens) and part.format.block == 1]
        if len(packed) < len(self.parts):
            return torch.cat([read(part, start, end) for part in self.parts], dim=3)
        B, C, _, R = self.shape
        out = torch.empty(B, C, end - start, R, dtype=packed[0].dtype, device=self.device)
        for part, columns in zip(packed, out.split([part.shape[3] for part in packed], dim=3), strict=True):
            part.read_into(columns, start, end)
        return out


Stored = Tensor | PackedTokens | SideBySide
"""All tokens of one side that queries may see."""


def parts_of(stored: Any) -> list[Any]:
    """The places where the numbers of a token lie."""
    return stored.parts if isinstance(stored, SideBySide) else [stored]


class AgedTokens(NamedTuple):
    """All tokens of one side, `far` [B, C, S, R], and the newest of them again in their finer form, `near` [B, C, n, E].
    Of what is made of a token, the first R numbers are far and the last E near."""

    far: Stored
    near: Stored
    recent: int

    @property
    def shape(self) -> torch.Size:
        return self.far.shape

    def to(self, device: torch.device) -> AgedTokens:
        return AgedTokens(self.far.to(device), self.near.to(device), self.recent)


class IndexedTokens(NamedTuple):
    """Keys of all tokens, and what says which of them few queries read: notes beside them, and who reads those."""

    stored: Stored
    notes: tuple[Tensor, ...]
    reader: Any

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    def to(self, device: torch.device) -> IndexedTokens:
        return self._replace(stored=self.stored.to(device), notes=tuple(x.to(device) for x in self.notes))


class RunPlace(NamedTuple):
    """Where the tokens of a run stand. first: the column of the one behind the `early` ones, which stand before it; None
    where no column is missing. early_B: of each sequence ([1]: of all) how many of the early ones count, the last ones,
    where these were chosen; None where they are the first of their sequences. added_BCS: what is added to the scores of
    tokens that stand for others as well. columns_BCS: of each token, where the plan knows them. gone_BCS: the
    length of its sequence from which on a token is not seen, where some are dropped in the running step."""

    first: int | None
    early: int
    early_B: Tensor | None = None
    added_BCS: Tensor | None = None
    columns_BCS: Tensor | None = None
    gone_BCS: Tensor | None = None


class RunTokens(NamedTuple):
    """One side of a cache, run by run: `parts` [B, heads of the run, S, width]. `length`: tokens that were seen. `again`: of
    these so many read the step before them a second time, and are not stored. `near`: of layers with one latent, the newest
    in their finer form.
    """

    parts: tuple[Stored, ...]
    places: tuple[RunPlace, ...]
    length: int
    tokens: TokenRuns
    again: int = 0
    near: Stored | None = None

    def to(self, device: torch.device) -> RunTokens:
        near = None if self.near is None else self.near.to(device)
        return self._replace(parts=tuple(stored.to(device) for stored in self.parts), near=near)

    def of_layer(self, recent: int) -> Any:
        """The tokens of a layer that has one latent, in both forms where there are two."""
        (far,) = self.parts
        return far if self.near is None else AgedTokens(far, self.near, recent)


def by_runs(stored_BCSR: Tensor, tokens: TokenRuns) -> RunTokens:
    """All tokens of all heads, where nothing was dropped."""
    parts = tuple(heads_of(stored_BCSR, run) for run in tokens.runs)
    return RunTokens(parts, (RunPlace(None, tokens.sinks),) * len(parts), stored_BCSR.shape[2], tokens)


@functools.lru_cache(maxsize=4096)
def index_of(heads: tuple[int, ...], device: torch.device) -> Any:
    """What picks these heads of a tensor: a slice where they are neighbours, else their numbers, sent to a device once."""
    first, count = heads[0], len(heads)
    if heads == tuple(range(first, first + count)):
        return slice(first, first + count)
    with torch.inference_mode(False):  # who trains later picks heads by it too
        return torch.tensor(heads, device=device)


def heads_of(stored_BCSR: Tensor, run: TokenRun) -> Tensor:
    """Those of a run: a view where they are neighbours."""
    return stored_BCSR[:, index_of(run.heads, stored_BCSR.device)]


def first_numbers(stored: Any, spec: CacheSpec) -> Any:
    """Of what a layer below has stored that which says something of a layer with this cache, in each form."""
    if isinstance(stored, AgedTokens):
        near = first_numbers(stored.near, spec.of_recent)
        return stored._replace(far=first_numbers(stored.far, spec), near=near)
    width = spec.predicting(stored.shape[3])
    if isinstance(stored, Tensor) or width == stored.shape[3]:
        return stored[..., :width] if isinstance(stored, Tensor) else stored
    return PackedTokens(stored.rows, stored.format, stored.dtype, stored.recent, width, stored.fresh)


def side_by_side(stored: Sequence[Any]) -> Any:
    """The same tokens of several layers, each form apart where there are two."""
    first = stored[0]
    if not isinstance(first, AgedTokens):
        return SideBySide(stored)
    return first._replace(far=SideBySide([x.far for x in stored]), near=SideBySide([x.near for x in stored]))


def newest(stored: Any, tokens: int) -> Tensor:
    """The last tokens as numbers [B, C, tokens, ...], all forms side by side."""
    forms = (stored.far, stored.near) if isinstance(stored, AgedTokens) else (stored,)
    return torch.cat([_last(part, tokens) for form in forms for part in parts_of(form)], dim=3)


def _last(stored: Any, tokens: int) -> Tensor:
    fresh = stored.fresh if isinstance(stored, PackedTokens) else None
    if fresh is not None and fresh.shape[2] == tokens:
        return fresh[..., : stored.width]
    return read(stored, stored.shape[2] - tokens, stored.shape[2])


def by_age(x: Tensor, far: int, near: int) -> tuple[Tensor, Tensor]:
    """The numbers of both forms in what is made of a token: the first `far` and the last `near`, which may be the same."""
    return x[..., :far], x[..., -near:]


def read_once(stored: Stored | AgedTokens) -> Any:
    """The same, so that keys and values which are made of it unpack each piece once."""
    if isinstance(stored, AgedTokens):
        return stored._replace(far=read_once(stored.far), near=read_once(stored.near))
    return ReadOnce(stored) if isinstance(stored, PackedTokens) else stored


def read(stored: Stored, start: int, end: int) -> Tensor:
    """The tokens start:end as numbers [B, heads, end - start, width]."""
    return stored[:, :, start:end] if isinstance(stored, Tensor) else stored.read(start, end)


def part(stored: Stored, start: int, end: int) -> Stored:
    """The tokens start:end as they are stored; of formats whose tokens stand alone."""
    if isinstance(stored, Tensor):
        return stored[:, :, start:end]
    if isinstance(stored, SideBySide):
        return SideBySide([part(one, start, end) for one in stored.parts])  # type: ignore[misc]
    return PackedTokens(stored.rows[:, :, start:end], stored.format, stored.dtype, width=stored.width)


def read_for_product(stored: Stored, start: int, end: int) -> Operand:
    """The same for a product with queries or probabilities, which can take scales afterwards."""
    from kvfold.runtimes.kernels import gpu  # which imports this module

    if not isinstance(stored, PackedTokens) or not stored.format.codec.keeps_scales_apart:
        return read(stored, start, end)
    if not gpu.unpacks(stored.rows, stored.format, stored.dtype):  # which makes numbers in one launch
        return stored.read_scaled(start, end)
    return read(stored, start, end)


def read_all(stored: Stored) -> Tensor:
    """All tokens as numbers."""
    return read(stored, 0, stored.shape[2])


def with_gradient(stored: Stored, new_BCTR: Tensor) -> Stored:
    """What is stored, with the gradient of the new tokens passing straight through: bytes have none."""
    if isinstance(stored, RunTokens):
        pairs = zip(stored.parts, stored.tokens.runs, strict=True)
        parts = (with_gradient(part, heads_of(new_BCTR[..., : part.shape[3]], run)) for part, run in pairs)
        return stored._replace(parts=tuple(parts))
    if isinstance(stored, IndexedTokens):
        return stored._replace(stored=with_gradient(stored.stored, new_BCTR))
    if isinstance(stored, AgedTokens) and torch.is_grad_enabled() and new_BCTR.requires_grad:
        far, near = by_age(new_BCTR, stored.far.shape[-1], stored.near.shape[-1])
        return stored._replace(far=with_gradient(stored.far, far), near=with_gradient(stored.near, near))
    if not isinstance(stored, PackedTokens) or not (torch.is_grad_enabled() and new_BCTR.requires_grad):
        return stored
    seen, tokens = read_all(stored), new_BCTR.shape[2]
    exact = seen[:, :, -tokens:] + (new_BCTR - new_BCTR.detach())
    return torch.cat([seen[:, :, :-tokens], exact], dim=2)
