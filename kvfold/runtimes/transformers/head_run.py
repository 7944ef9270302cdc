"""What the heads of one run keep: their storage, and where its tokens stand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CACHE_BLOCK, RUN_BLOCK, CacheSpec, room_for
from kvfold.plan.token_runs import FEW_TOKENS, TokenRun, TokenRuns
from kvfold.runtimes.kernels.packed_tokens import RunPlace, Stored, read_all
from kvfold.runtimes.kernels.seen_tokens import columns, is_new, kept_of, stays_before
from kvfold.runtimes.transformers.buffers import Buffer, GrowingBuffer
from kvfold.runtimes.transformers.packed_buffers import buffer

ADDED = torch.float16
"""Two bytes per token and head (ADDED_BYTES)."""

Match = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(tokens that stay [B, C, n], which of them count [B or 1, n]) -> what more is added to their scores [B, C, n], and their
values [B, C, n, V]."""


class HeadRun:
    """What the heads of one run keep: early tokens of every sequence (the first, or chosen ones), and the newest. `place`
    says where they stand; `pending` is what a prompt of `new` tokens is seen to consist of, until some of it stay. `added`:
    where kept tokens stand for others as well, what their scores get for it."""

    def __init__(self, run: TokenRun, tokens: TokenRuns, spec: CacheSpec) -> None:
        self.run, self.tokens = run, tokens
        unit = CACHE_BLOCK if run.keeps_all else RUN_BLOCK
        self.k: Buffer = buffer(spec.k_bits, unit)
        self.v: Buffer = self.k if spec.shared_latent else buffer(spec.v_bits, unit)
        self.added = GrowingBuffer(unit) if tokens.matched else None
        self.columns = GrowingBuffer(unit) if spec.knows_columns else None
        self.place = RunPlace(None, tokens.sinks)
        self.pending: list[Stored] | None = None
        self.new = 0

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        sides = (self.k,) if self.v is self.k else (self.k, self.v)
        return (*sides, *(beside for beside in (self.added, self.columns) if beside is not None))

    def add(
        self, z_BcTR: Tensor, y_BcTV: Tensor, length: int, begin_B: Tensor | None, *, keep_all: bool
    ) -> tuple[tuple[Stored, Stored], RunPlace]:
        """Store T new tokens, the last of `length`; show all that one of their queries may see, and where they stand. A long
        prompt passes through without ever being stored whole."""
        T, new = z_BcTR.shape[2], self._new(z_BcTR, y_BcTV, length)
        self.settle(length - T, begin_B)
        room = room_for(self.run, length)
        if not keep_all:
            due = self.due(length - T + 1, begin_B)
            if T > 1 or not self._waits(due):
                self.drop(due, length - T, begin_B)
            if T > FEW_TOKENS and self._chooses(length, begin_B):
                self.pending = [side.beside(states) for side, states in zip(self.buffers, new, strict=True)]
                self.new = T
                return self._shown(self.pending, self.place)
            if T > RUN_BLOCK and self.due(length, begin_B) > (self.place.first or self.tokens.sinks):
                return self._pass_by(new, length, begin_B, room)
        for side, states in zip(self.buffers, new, strict=True):
            side.append(states, room)
        return self._shown([side.view() for side in self.buffers], self.place)

    def _waits(self, due: int) -> bool:
        """Whether what no query sees any more may lie there for some steps: behind chosen tokens, all of which would have to
        be moved. There is room for so many, since blocks are whole."""
        chosen = self.place.early_B is not None and self.place.first is not None
        return chosen and due - (self.place.first or 0) < RUN_BLOCK

    def _new(self, z_BcTR: Tensor, y_BcTV: Tensor, length: int) -> list[Tensor]:
        """What the buffers get of the last T of `length` columns."""
        B, C, T, _ = z_BcTR.shape
        new = [z_BcTR] if self.v is self.k else [z_BcTR, y_BcTV]
        if self.added is not None:
            new.append(z_BcTR.new_zeros(B, C, T, 1, dtype=ADDED))
        if self.columns is not None:
            columns = torch.arange(length - T, length, dtype=torch.int32, device=z_BcTR.device)
            new.append(columns[:, None].expand(B, C, T, 1))
        return new

    def ask_again(self, z_BcTR: Tensor, y_BcTV: Tensor, length: int) -> tuple[tuple[Stored, Stored], RunPlace]:
        """Show what a prompt is seen to consist of and T tokens behind it, which are not stored."""
        new = self._new(z_BcTR, y_BcTV, length)
        if self.pending is None:
            shown = [side.beside(states) for side, states in zip(self.buffers, new, strict=True)]
        else:
            sides = zip(self.buffers, self.pending, new, strict=True)
            shown = [side.behind(held, states) for side, held, states in sides]
        return self._shown(shown, self.place)

    def _shown(self, sides: list[Stored], place: RunPlace) -> tuple[tuple[Stored, Stored], RunPlace]:
        k, *others = sides
        v = k if self.v is self.k else others.pop(0)
        beside = [read_all(numbers)[..., 0] for numbers in others]
        if self.added is not None:
            place = place._replace(added_BCS=beside[0])
        if self.columns is not None:
            place = place._replace(columns_BCS=beside[-1])
        return (k, v), place

    def _chooses(self, length: int, begin_B: Tensor | None) -> bool:
        """Whether a prompt that ends here leaves tokens that a scorer chose; all, while there is room."""
        context = length if begin_B is None else length - int(begin_B.min())
        return self.tokens.scored and not self.run.keeps_all and context > self.tokens.sinks + self.tokens.newest

    @property
    def drops(self) -> bool:
        """Whether not all of what a prompt is seen to consist of can stay."""
        return self.pending is not None and self.pending[0].shape[2] > self.run.kept(self.pending[0].shape[2])

    def due(self, length: int, begin_B: Tensor | None) -> int:
        """The first of the newest columns that some sequence still sees after `length` columns."""
        if self.place.early_B is None or begin_B is None:
            begin = 0 if begin_B is None else min(int(begin_B.min()), length)
            return begin + self.tokens.first_newest(self.run, length - begin, self.place.early)
        context_B = length - begin_B
        newest_B = (kept_of(self.run, context_B) - self.place.early_B).clamp_min(0)
        return length - int(newest_B.max())

    def choose(self, worth_BCS: Tensor, length: int, begin_B: Tensor | None, match: Match | None = None) -> None:
        """Keep of a prompt that was read its first tokens, its newest, and those in between that are worth most. match: makes
        them stand for the others as well."""
        assert self.pending is not None, "a prompt was read"
        newest = min(self.tokens.newest, length)
        free_BS, sink_BS = self._candidates(length, begin_of_rows(begin_B, worth_BCS)[:, None], newest)
        chosen_B = (kept_of(self.run, length - begin_of_rows(begin_B, worth_BCS)) - newest).clamp_min(0)
        drops_B = free_BS.sum(1) > chosen_B
        chosen_B = torch.minimum(chosen_B, free_BS.sum(1))
        worth_BCS = worth_BCS.float().nan_to_num().masked_fill(sink_BS[:, None], torch.inf)
        worth_BCS = worth_BCS.masked_fill(~free_BS[:, None], -torch.inf)
        early, shown = int(chosen_B.max()), worth_BCS.shape[2]
        last_n = torch.arange(shown - newest, shown, device=worth_BCS.device)
        best_BCE = worth_BCS.argsort(dim=-1, descending=True, stable=True)[..., :early]  # of equals the first
        if begin_B is None:
            best_BCE = best_BCE.sort().values  # as they came
        else:  # behind those that do not count, of shorter sequences
            unused_BCE = (torch.arange(early, device=best_BCE.device) >= chosen_B[:, None])[:, None]
            best_BCE = best_BCE.gather(2, best_BCE.masked_fill(unused_BCE, -1).argsort(stable=True))
        index_BCn = torch.cat([best_BCE, last_n.expand(*worth_BCS.shape[:2], -1)], dim=2)
        room = room_for(self.run, length)
        for side, stored in zip(self.buffers, self.pending, strict=True):
            side.keep(stored, index_BCn, room)
        if match is not None and self.added is not None:
            counts_Bn = torch.arange(early + newest, device=index_BCn.device) >= (early - chosen_B)[:, None]
            more_BCn, values_BCnV = match(index_BCn, counts_Bn)
            added_BCn1 = (self.added.tensor() + more_BCn[..., None]).to(ADDED)
            rows_B = drops_B.expand(len(more_BCn))  # packed again, values would change where nothing did
            self.added.replace(added_BCn1, rows_B)
            self.v.replace(values_BCnV, rows_B)
        self.place, self.pending = RunPlace(length - newest, early, chosen_B), None

    def settle(self, length: int, begin_B: Tensor | None) -> None:
        """Where nobody said what a prompt's tokens are worth (random numbers of a benchmark, say), the newest are."""
        if self.pending is not None:
            B, C, S, _ = self.pending[0].shape
            self.choose(torch.arange(S, device=self.pending[0].device).expand(B, C, S), length, begin_B)

    def _candidates(self, length: int, begin_B1: Tensor, newest: int) -> tuple[Tensor, Tensor]:
        """[B or 1, S]: which of the shown tokens could stay besides the newest, and which stay as the first."""
        column_BS = columns(self.place, length, begin_B1)
        at_S = torch.arange(column_BS.shape[1], device=column_BS.device)
        start = length - self.new
        if start == 0:  # all is new
            free_BS = (column_BS >= begin_B1) & (at_S < len(at_S) - newest)
            return free_BS, free_BS & (column_BS < begin_B1 + self.tokens.sinks)
        before_BS = stays_before(self.run, self.tokens, self.place, column_BS, begin_B1, start)
        new_BS = is_new(self.place, column_BS, begin_B1, start)
        free_BS = (before_BS | new_BS) & (at_S < len(at_S) - newest)
        if self.place.early_B is None:
            return free_BS, free_BS & (column_BS < begin_B1 + self.tokens.sinks)
        of_early_BS = at_S < self.place.early - self.place.early_B[:, None] + self.tokens.sinks
        of_newest_BS = column_BS < begin_B1 + self.tokens.sinks
        return free_BS, free_BS & torch.where(at_S < self.place.early, of_early_BS, of_newest_BS)

    def misses(self, left: int, length: int, begin_B: Tensor | None) -> bool:
        """Whether the last of `left` of so many tokens would see what is gone."""
        return self.place.first is not None and self.due(left, begin_B) < self.place.first

    def tidy(self, length: int, begin_B: Tensor | None) -> None:
        """Forget what the next token does not see."""
        self.settle(length, begin_B)
        self.drop(self.due(length, begin_B), length, begin_B)

    def drop(self, first: int, held: int, begin_B: Tensor | None) -> None:
        """Forget the columns before `first` but for early ones; `held`: columns so far."""
        first = min(first, held)  # sequences whose tokens have yet to come, behind padding, have none to forget
        gone = first - (self.tokens.sinks if self.place.first is None else self.place.first)
        if gone > 0:
            early = self._early(held, begin_B)
            for side in self.buffers:
                side.drop(gone, early, self.place.early)
            self.place = self.place._replace(first=first)

    def _pass_by(
        self, new: list[Tensor], length: int, begin_B: Tensor | None, room: int
    ) -> tuple[tuple[Stored, Stored], RunPlace]:
        shown_at, due = self.place, self.due(length, begin_B)
        early, sinks = self._early(length, begin_B), self.tokens.sinks
        pairs = zip(self.buffers, new, strict=True)
        shown = [side.pass_by(states, room, early, sinks, length - due) for side, states in pairs]
        self.place = self.place._replace(first=due)
        return self._shown(shown, shown_at)

    def _early(self, held: int, begin_B: Tensor | None) -> Tensor | None:
        """[B, sinks]: where each sequence's first tokens lie among those that are shown; None for the very first."""
        if begin_B is None or self.place.early_B is not None:
            return None
        early = torch.arange(self.tokens.sinks, device=begin_B.device)
        column_BS = (begin_B[:, None] + early).clamp_max(held - 1)
        if self.place.first is None:
            return column_BS
        return torch.where(column_BS < self.place.first, early, column_BS - self.place.first + self.tokens.sinks)

    def select(self, rows: Tensor) -> None:
        """Keep what is known of these rows of the batch; storage chooses its own."""
        early_B = self.place.early_B
        if early_B is not None and len(early_B) > 1:
            self.place = self.place._replace(early_B=early_B[rows.to(early_B.device)])

    def repeat(self, repeats: int) -> None:
        """The same of every row so many times."""
        early_B = self.place.early_B
        if early_B is not None and len(early_B) > 1:
            self.place = self.place._replace(early_B=early_B.repeat_interleave(repeats))


def begin_of_rows(begin_B: Tensor | None, like: Tensor) -> Tensor:
    """[B] or [1]."""
    return torch.zeros(1, dtype=torch.long, device=like.device) if begin_B is None else begin_B
