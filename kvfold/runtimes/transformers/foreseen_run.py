"""What the heads of one run keep where every token comes with what it will be worth."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.plan.cache_spec import CACHE_BLOCK, RUN_BLOCK, CacheSpec, room_for
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes.kernels.packed_tokens import RunPlace, RunTokens, Stored, heads_of
from kvfold.runtimes.kernels.seen_tokens import columns, reads_whole
from kvfold.runtimes.kernels.survival import crossed, gone_at
from kvfold.runtimes.transformers.buffers import Buffer, GrowingBuffer
from kvfold.runtimes.transformers.head_run import HeadRun, begin_of_rows

WORTH = torch.float16
"""Two bytes per token and head (WORTH_BYTES)."""


class ForeseenRun(HeadRun):
    """Early tokens are the worthiest of those before the newest ones when some were last dropped, of every head its own."""

    def __init__(self, run: TokenRun, tokens: TokenRuns, spec: CacheSpec) -> None:
        super().__init__(run, tokens, spec)
        self.worth = GrowingBuffer(CACHE_BLOCK if run.keeps_all else RUN_BLOCK)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return (*super().buffers, self.worth)

    def add_worth(
        self, z_BcTR: Tensor, y_BcTV: Tensor, worth_BcT: Tensor, length: int, begin_B: Tensor | None
    ) -> tuple[tuple[Stored, Stored], RunPlace]:
        """Store T new tokens, the last of `length`, and drop what is due; show all that one of their queries may see. A step
        in which tokens are dropped passes through without being stored whole."""
        T, room = z_BcTR.shape[2], room_for(self.run, length)
        new = [*self._new(z_BcTR, y_BcTV, length), marked(self.tokens, worth_BcT, length, begin_B)[..., None]]
        steps = steps_of(begin_B, length, T, 1)
        if not any(crossed(self.run, *step) for step in steps):
            for side, states in zip(self.buffers, new, strict=True):
                side.append(states, room)
            return self._shown([side.view() for side in self.buffers[:-1]], self.place)
        sides = zip(self.buffers, new, strict=True)
        *shown, worth = [side.beside(states) for side, states in sides]
        place = self.place._replace(gone_BCS=self._gone(worth[..., 0], length, begin_B, T))  # type: ignore[index]
        self._keep([*shown, worth], place, length, begin_B, room)
        return self._shown(shown, place)

    def _gone(self, worth_BCS: Tensor, length: int, begin_B: Tensor | None, T: int) -> Tensor:
        begin_B1 = begin_of_rows(begin_B, worth_BCS)[:, None]
        own_BS = (columns(self.place, length, begin_B1) - begin_B1).expand(len(worth_BCS), -1)
        steps = steps_of(begin_B, length, T, len(worth_BCS))
        return gone_at(self.run, self.tokens, worth_BCS, own_BS, steps, whole=reads_whole(self.tokens, T))

    def _keep(self, shown: list[Stored], place: RunPlace, length: int, begin_B: Tensor | None, room: int) -> None:
        """Of all that is shown."""
        assert place.gone_BCS is not None, "it was said what is dropped"
        begin_B1 = begin_of_rows(begin_B, place.gone_BCS)[:, None]
        column_BS = columns(place, length, begin_B1)
        newest = min(self.tokens.newest, length)
        counts_BS = (column_BS >= begin_B1) & (column_BS < length)
        counts_BS[:, counts_BS.shape[1] - newest :] = False
        stays_BCS = counts_BS[:, None] & (place.gone_BCS > (length - begin_B1)[:, None])
        early_B = stays_BCS[:, 0].sum(1)
        last_n = torch.arange(column_BS.shape[1] - newest, column_BS.shape[1], device=column_BS.device)
        order_BCS = stays_BCS.int().argsort(dim=-1, stable=True)  # those that stay come last, as they came
        early_BCE = order_BCS[..., order_BCS.shape[2] - int(early_B.max()) :]
        index_BCn = torch.cat([early_BCE, last_n.expand(*early_BCE.shape[:2], -1)], dim=2)
        for side, stored in zip(self.buffers, shown, strict=True):
            side.keep(stored, index_BCn, room)
        self.place = RunPlace(length - newest, early_BCE.shape[2], early_B)

    def misses(self, left: int, length: int, begin_B: Tensor | None) -> bool:
        return any(crossed(self.run, *step) for step in steps_of(begin_B, length, length - left, 1))

    def tidy(self, length: int, begin_B: Tensor | None) -> None:
        """Nothing: tokens are dropped when steps end."""


def steps_of(begin_B: Tensor | None, length: int, T: int, sequences: int) -> list[tuple[int, int]]:
    """How many tokens each sequence had before the last T of so many columns, and has with them; of one that stands for all
    as often as there are sequences."""
    begins = [0] if begin_B is None else begin_B.tolist()
    steps = [(max(length - T - begin, 0), max(length - begin, 0)) for begin in begins]
    return steps * (sequences // len(steps)) if len(steps) < sequences else steps


def marked(tokens: TokenRuns, worth_BcT: Tensor, length: int, begin_B: Tensor | None) -> Tensor:
    """What new tokens are worth, as it is stored: the first ones of a sequence without end."""
    begin_B1 = begin_of_rows(begin_B, worth_BcT)[:, None]
    own_BT = torch.arange(length - worth_BcT.shape[2], length, device=worth_BcT.device) - begin_B1
    largest = torch.finfo(WORTH).max
    worth_BcT = worth_BcT.nan_to_num().clamp(-largest, largest).to(WORTH)
    return worth_BcT.masked_fill((own_BT < tokens.sinks)[:, None], torch.inf)


def without_cache(stored: RunTokens, worth_BCT: Tensor, begin_B: Tensor | None) -> RunTokens:
    """The same, with what a cache would have dropped while these tokens came."""
    tokens, T = stored.tokens, stored.length
    begin_B1 = begin_of_rows(begin_B, worth_BCT)[:, None]
    own_BS = (torch.arange(T, device=worth_BCT.device) - begin_B1).expand(len(worth_BCT), -1)
    steps = steps_of(begin_B, T, T, len(worth_BCT))
    worth_BCT = marked(tokens, worth_BCT, T, begin_B)
    places = []
    for run, place in zip(tokens.runs, stored.places, strict=True):
        if any(crossed(run, *step) for step in steps):
            found = gone_at(run, tokens, heads_of(worth_BCT, run), own_BS, steps, whole=reads_whole(tokens, T))
            place = place._replace(gone_BCS=found)
        places.append(place)
    return stored._replace(places=tuple(places))
