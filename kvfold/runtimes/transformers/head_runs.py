"""The storage of a layer whose heads keep different tokens, and what its attention module does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvfold import registry
from kvfold.plan.cache_spec import CACHE_BLOCK, RUN_BLOCK, CacheSpec, room_for
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.token_runs import FEW_TOKENS, TokenRun, TokenRuns
from kvfold.runtimes.kernels.attention import kernel_attention
from kvfold.runtimes.kernels.dispatch import Way, choose
from kvfold.runtimes.kernels.head_runs import (
    attend_by_run,
    columns,
    is_new,
    kept_of,
    probabilities,
    query_heads,
    seen_by,
    stays_before,
)
from kvfold.runtimes.kernels.packed_tokens import RunPlace, RunTokens, Stored, heads_of, read_all
from kvfold.runtimes.scorers.base import Prompt, Scorer
from kvfold.runtimes.transformers.buffers import Buffer, buffer


class HeadRun:
    """What the heads of one run keep: early tokens of every sequence (the first, or chosen ones), and the newest. `place`
    says where they stand; `pending` is what a prompt of `new` tokens is seen to consist of, until some of it stay."""

    def __init__(self, run: TokenRun, tokens: TokenRuns, spec: CacheSpec) -> None:
        self.run, self.tokens = run, tokens
        unit = CACHE_BLOCK if run.keeps_all else RUN_BLOCK
        self.k: Buffer = buffer(spec.k_bits, unit)
        self.v: Buffer = buffer(spec.v_bits, unit)
        self.place = RunPlace(None, tokens.sinks)
        self.pending: tuple[Stored, Stored] | None = None
        self.new = 0

    @property
    def buffers(self) -> tuple[Buffer, Buffer]:
        return self.k, self.v

    def add(
        self, z_BcTR: Tensor, y_BcTV: Tensor, length: int, begin_B: Tensor | None, *, keep_all: bool
    ) -> tuple[tuple[Stored, Stored], RunPlace]:
        """Store T new tokens, the last of `length`; show all that one of their queries may see, and where they stand. A long
        prompt passes through without ever being stored whole."""
        T, new = z_BcTR.shape[2], (z_BcTR, y_BcTV)
        self.settle(length - T, begin_B)
        room = room_for(self.run, length)
        if not keep_all:
            self.drop(self.due(length - T + 1, begin_B), length - T, begin_B)
            if T > FEW_TOKENS and self._chooses(length, begin_B):
                self.pending, self.new = (self.k.beside(z_BcTR), self.v.beside(y_BcTV)), T
                return self.pending, self.place
            if T > RUN_BLOCK and self.due(length, begin_B) > (self.place.first or self.tokens.sinks):
                return self._pass_by(new, length, begin_B, room)
        self._append(new, room)
        return (self.k.view(), self.v.view()), self.place

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

    def choose(self, worth_BCS: Tensor, length: int, begin_B: Tensor | None) -> None:
        """Keep of a prompt that was read its first tokens, its newest, and those in between that are worth most."""
        assert self.pending is not None, "a prompt was read"
        newest = min(self.tokens.newest, length)
        free_BS, sink_BS = self._candidates(length, _begin(begin_B, worth_BCS)[:, None], newest)
        chosen_B = (kept_of(self.run, length - _begin(begin_B, worth_BCS)) - newest).clamp_min(0)
        chosen_B = torch.minimum(chosen_B, free_BS.sum(1))
        worth_BCS = worth_BCS.float().nan_to_num().masked_fill(sink_BS[:, None], torch.inf)
        worth_BCS = worth_BCS.masked_fill(~free_BS[:, None], -torch.inf)
        early, shown = int(chosen_B.max()), worth_BCS.shape[2]
        last_n = torch.arange(shown - newest, shown, device=worth_BCS.device)
        best_BCE = worth_BCS.topk(early).indices
        rank_E = torch.arange(early, device=best_BCE.device)
        # those that do not count, of shorter sequences, come first, and others as they came
        unused_BCE = (rank_E >= chosen_B[:, None])[:, None]
        best_BCE = best_BCE.gather(2, best_BCE.masked_fill(unused_BCE, -1).argsort(stable=True))
        index_BCn = torch.cat([best_BCE, last_n.expand(*worth_BCS.shape[:2], -1)], dim=2)
        for side, stored in zip(self.buffers, self.pending, strict=True):
            side.keep(stored, index_BCn, room_for(self.run, length))
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
        before_BS = stays_before(self.run, self.tokens, self.place, column_BS, begin_B1, start)
        new_BS = is_new(self.place, column_BS, begin_B1, start)
        free_BS = (before_BS | new_BS) & (at_S < len(at_S) - newest)
        if self.place.early_B is None:
            return free_BS, free_BS & (column_BS < begin_B1 + self.tokens.sinks)
        of_early_BS = at_S < self.place.early - self.place.early_B[:, None] + self.tokens.sinks
        of_newest_BS = column_BS < begin_B1 + self.tokens.sinks
        return free_BS, free_BS & torch.where(at_S < self.place.early, of_early_BS, of_newest_BS)

    def drop(self, first: int, held: int, begin_B: Tensor | None) -> None:
        """Forget the columns before `first` but for early ones; `held`: columns so far."""
        gone = first - (self.tokens.sinks if self.place.first is None else self.place.first)
        if gone > 0:
            early = self._early(held, begin_B)
            for side in self.buffers:
                side.drop(gone, early, self.place.early)
            self.place = self.place._replace(first=first)

    def _append(self, new: tuple[Tensor, Tensor], room: int) -> None:
        for side, states in zip(self.buffers, new, strict=True):
            side.append(states, room)

    def _pass_by(
        self, new: tuple[Tensor, Tensor], length: int, begin_B: Tensor | None, room: int
    ) -> tuple[tuple[Stored, Stored], RunPlace]:
        shown_at, due = self.place, self.due(length, begin_B)
        early, sinks = self._early(length, begin_B), self.tokens.sinks
        pairs = zip(self.buffers, new, strict=True)
        k, v = (side.pass_by(states, room, early, sinks, length - due) for side, states in pairs)
        self.place = self.place._replace(first=due)
        return (k, v), shown_at

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


def _begin(begin_B: Tensor | None, like: Tensor) -> Tensor:
    """[B] or [1]."""
    return torch.zeros(1, dtype=torch.long, device=like.device) if begin_B is None else begin_B


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
        places = tuple(at for _, at in shown)
        sides = zip(*(sides for sides, _ in shown), strict=True)
        k, v = (RunTokens(parts, places, self.length, self.spec.tokens) for parts in sides)
        return k, v

    def check_removal(self, left: int) -> None:
        """Raise RuntimeError where the last of `left` tokens would see what is gone."""
        for one in self.runs:
            if one.place.first is not None and one.due(left, self.begin_B) < one.place.first:
                raise RuntimeError(
                    f"tokens cannot be removed down to {left}: heads {list(one.run.heads)} have forgotten what would come"
                    " back into sight. Call activate_past_recording() before generating."
                )

    def settle_runs(self) -> None:
        """Forget what the next token does not see."""
        for one in self.runs:
            one.settle(self.length, self.begin_B)
            one.drop(one.due(self.length, self.begin_B), self.length, self.begin_B)


class AttentionByRun(nn.Module):
    """The part of `FoldedAttention` that knows of runs."""

    spec: CacheSpec
    layer: AttentionLayer
    scaling: float
    _absorb: Callable[[Tensor], Tensor]
    _lead_values_back: Callable[[Tensor], Tensor]
    o_proj: Any
    k_b_proj: Any
    v_b_proj: Any
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
        if wants_probs and any(place.early_B is not None for place in z.places):
            raise ValueError(
                "attentions cannot be shown: which tokens of the prompt stayed is not kept, but them; ask for those of a"
                " forward without a cache."
            )
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
            return kernel_attention(q, z, y, mask, scale=self.scaling)
        return self._over_stored(way, q, z, y, mask, None, 0.0)[0]

    @torch.no_grad()
    def _choose(self, q: Tensor, z: RunTokens, y: RunTokens, mask: Tensor | None, cache: Any) -> None:
        """What of a prompt that was just read stays, run by run."""
        rule: Scorer = registry.load("scorers", z.tokens.rule)()
        begin_B = cache.begin_B
        runs = zip(cache.runs, z.parts, y.parts, z.places, strict=True)
        for one, keys, values, place in (run for run in runs if run[0].pending is not None):
            worth_BCS = q.new_zeros(q.shape[0], *keys.shape[1:3])
            if one.drops or begin_B is not None:
                worth_BCS = rule.score(self._prompt(one.run, q, keys, values, z, place, mask, _begin(begin_B, q)))
            one.choose(worth_BCS, z.length, begin_B)

    def _prompt(
        self, run: TokenRun, q: Tensor, keys: Stored, values: Stored, held: RunTokens, place: RunPlace, mask: Tensor | None,
        begin_B: Tensor,
    ) -> Prompt:  # fmt: skip
        B, N, T, H = q.shape
        heads = query_heads(run, N // self.spec.num_kv_heads, q.device)
        own = mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask

        def seen(rows: slice) -> Tensor:
            found = seen_by(run, held, place, own, T, rows, q.device)
            if found is not None:
                return found
            last_T = torch.arange(held.length - T, held.length, device=q.device)[rows]
            return (torch.arange(held.length, device=q.device) <= last_T[:, None])[None, None]

        def absorb(q_BnQH: Tensor) -> Tensor:
            if self.k_b_proj is None:
                return q_BnQH
            of_all = q_BnQH.new_zeros(B, N, q_BnQH.shape[2], H)
            of_all[:, heads] = q_BnQH
            return self._absorb(of_all)[:, heads]

        return Prompt(
            layer=self.layer, queries_BnTH=q[:, heads], absorb=absorb, keys_BCSR=read_all(keys),
            values_BCSV=read_all(values), seen=seen, first_B=(begin_B - (held.length - T)).clamp_min(0),
            output=lambda: self._output_of_values()[:, heads],
        )  # fmt: skip

    def _output_of_values(self) -> Tensor:
        """[D, N, V]: how averages of what is stored of values come into the residual stream."""
        weight_DNV = self.o_proj.weight.unflatten(1, (self.layer.num_attention_heads, -1))
        if self.v_b_proj is None:
            return weight_DNV
        back_KHV = self.v_b_proj.weight.reshape(self.layer.num_kv_heads, self.layer.head_dim, -1)
        return torch.einsum("dkgh,khv->dkgv", weight_DNV.unflatten(1, (len(back_KHV), -1)), back_KHV).flatten(1, 2)
