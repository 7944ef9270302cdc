"""The storage of a layer whose heads keep different tokens, and what its attention module does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.plan.cache_spec import CACHE_BLOCK, RUN_BLOCK, CacheSpec, room_for
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.token_runs import TokenRun, TokenRuns
from kvfold.runtimes.kernels.attention import cpu_attention
from kvfold.runtimes.kernels.dispatch import Way, choose
from kvfold.runtimes.kernels.head_runs import attend_by_run, probabilities
from kvfold.runtimes.kernels.packed_tokens import RunTokens, Stored, heads_of
from kvfold.runtimes.transformers.buffers import Buffer, buffer


class HeadRun:
    """What the heads of one run keep: the first tokens of every sequence, and the newest. `first`: the column of the token
    behind those first ones; None as long as nothing was dropped."""

    def __init__(self, run: TokenRun, tokens: TokenRuns, spec: CacheSpec) -> None:
        self.run, self.tokens = run, tokens
        unit = CACHE_BLOCK if run.keeps_all else RUN_BLOCK
        self.k: Buffer = buffer(spec.k_bits, unit)
        self.v: Buffer = buffer(spec.v_bits, unit)
        self.first: int | None = None

    @property
    def buffers(self) -> tuple[Buffer, Buffer]:
        return self.k, self.v

    def add(
        self, z_BcTR: Tensor, y_BcTV: Tensor, length: int, begin_B: Tensor | None, *, keep_all: bool
    ) -> tuple[tuple[Stored, Stored], int | None]:
        """Store T new tokens, the last of `length`; show all that one of their queries may see, and which is the first of
        them. A long prompt passes through without ever being stored whole."""
        T, new = z_BcTR.shape[2], (z_BcTR, y_BcTV)
        room = room_for(self.run, length)
        if not keep_all:
            self.drop(self.due(length - T + 1, begin_B), length - T, begin_B)
            if T > RUN_BLOCK and self.due(length, begin_B) > (self.first or self.tokens.sinks):
                return self._pass_by(new, length, begin_B, room)
        self._append(new, room)
        return (self.k.view(), self.v.view()), self.first

    def due(self, length: int, begin_B: Tensor | None) -> int:
        """The first of the newest columns that some sequence still sees after `length` columns."""
        begin = 0 if begin_B is None else min(int(begin_B.min()), length)
        return begin + self.tokens.first_newest(self.run, length - begin)

    def drop(self, first: int, held: int, begin_B: Tensor | None) -> None:
        """Forget the columns before `first` but for sinks; `held`: columns so far."""
        gone = first - (self.tokens.sinks if self.first is None else self.first)
        if gone > 0:
            early = self._early(held, begin_B)
            for side in self.buffers:
                side.drop(gone, early, self.tokens.sinks)
            self.first = first

    def _append(self, new: tuple[Tensor, Tensor], room: int) -> None:
        for side, states in zip(self.buffers, new, strict=True):
            side.append(states, room)

    def _pass_by(
        self, new: tuple[Tensor, Tensor], length: int, begin_B: Tensor | None, room: int
    ) -> tuple[tuple[Stored, Stored], int | None]:
        shown_from, due = self.first, self.due(length, begin_B)
        early, sinks = self._early(length, begin_B), self.tokens.sinks
        pairs = zip(self.buffers, new, strict=True)
        k, v = (side.pass_by(states, room, early, sinks, length - due) for side, states in pairs)
        self.first = due
        return (k, v), shown_from

    def _early(self, held: int, begin_B: Tensor | None) -> Tensor | None:
        """[B, sinks]: where each sequence's first tokens lie among those that are shown; None for the very first."""
        if begin_B is None:
            return None
        early = torch.arange(self.tokens.sinks, device=begin_B.device)
        column_BS = (begin_B[:, None] + early).clamp_max(held - 1)
        if self.first is None:
            return column_BS
        return torch.where(column_BS < self.first, early, column_BS - self.first + self.tokens.sinks)


class RunsMixin:
    """The part of a cache's layer that knows of runs."""

    spec: CacheSpec
    length: int
    record_past: bool

    def start_runs(self) -> None:
        tokens = self.spec.tokens
        self.begin_B: Tensor | None = None
        self.runs = [HeadRun(run, tokens, self.spec) for run in tokens.runs] if tokens else []

    def update_runs(self, z_BCTR: Tensor, y_BCTV: Tensor, begin_B: Tensor | None) -> tuple[RunTokens, RunTokens]:
        """As `update`."""
        assert self.spec.tokens is not None, "there are runs"
        self.length += z_BCTR.shape[2]
        self.begin_B = begin_B
        shown = [
            one.add(
                heads_of(z_BCTR, one.run), heads_of(y_BCTV, one.run), self.length, begin_B, keep_all=self.record_past
            )
            for one in self.runs
        ]
        first = tuple(at for _, at in shown)
        sides = zip(*(sides for sides, _ in shown), strict=True)
        k, v = (RunTokens(parts, first, self.length, self.spec.tokens) for parts in sides)
        return k, v

    def check_removal(self, left: int) -> None:
        """Raise RuntimeError where the last of `left` tokens would see what is gone."""
        for one in self.runs:
            if one.first is not None and one.due(left, self.begin_B) < one.first:
                raise RuntimeError(
                    f"tokens cannot be removed down to {left}: heads {list(one.run.heads)} have forgotten what would come"
                    " back into sight. Call activate_past_recording() before generating."
                )

    def settle_runs(self) -> None:
        """Forget what the next token does not see."""
        for one in self.runs:
            one.drop(one.due(self.length, self.begin_B), self.length, self.begin_B)


class AttentionByRun(nn.Module):
    """The part of `FoldedAttention` that knows of runs."""

    spec: CacheSpec
    layer: AttentionLayer
    scaling: float
    _absorb: Callable[[Tensor], Tensor]
    _lead_values_back: Callable[[Tensor], Tensor]
    _eager: Callable[[], bool]
    _over_stored: Callable[..., Any]

    def _attend_by_run(
        self,
        q: Tensor,
        z: RunTokens,
        y: RunTokens,
        mask: Tensor | None,
        keys: None = None,
        *,
        wants_probs: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The same as `_attend`, where heads keep different tokens."""
        dropout = self.layer.attention_dropout if self.training else 0.0
        absorbed, probs = self._absorb(q), None
        if self._eager() or wants_probs or dropout > 0:
            sizes: dict[str, Any] = {"scale": self.scaling, "softcap": self.layer.softcap, "dropout": dropout}
            out, probs = probabilities(absorbed, z, y, mask, **sizes)
        else:
            out = attend_by_run(absorbed, z, y, mask, few=self._few, scale=self.scaling)
        return self._lead_values_back(out), probs

    def _few(self, q: Tensor, z: Stored, y: Stored, mask: Tensor | None) -> Tensor:
        way = choose(q, z, y, head_dim=self.layer.head_dim)
        if way is Way.CPU:
            return cpu_attention(q, z, y, mask, scale=self.scaling)
        return self._over_stored(way, q, z, y, mask, None, 0.0)[0]
