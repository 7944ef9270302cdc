"""The storage of a layer whose heads keep different tokens, and what its attention module does with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvfold import registry
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.token_runs import TokenRun
from kvfold.runtimes.kernels import cpu_decode
from kvfold.runtimes.kernels.attention import kernels_for
from kvfold.runtimes.kernels.cpu_layer import Steps
from kvfold.runtimes.kernels.dispatch import FEW_TOKENS, choose
from kvfold.runtimes.kernels.head_runs import (
    attend_by_run,
    by_one_call,
    probabilities,
    query_heads,
)
from kvfold.runtimes.kernels.packed_tokens import RunPlace, RunTokens, Stored, heads_of, index_of, read_all
from kvfold.runtimes.kernels.seen_tokens import seen_by
from kvfold.runtimes.scorers._matching import matched
from kvfold.runtimes.scorers.base import AT_ONCE, Prompt, Scorer, root_of
from kvfold.runtimes.transformers.foreseen_run import ForeseenRun
from kvfold.runtimes.transformers.head_run import HeadRun, begin_of_rows
from kvfold.runtimes.transformers.on_read import KeysOnRead, all_keys, all_values, value_map
from kvfold.runtimes.transformers.projections import Made

KEPT, SOME = 1 << 21, 61
"""Numbers of what is kept beside a layer's weights; of those one in so many tells whether they have changed."""
TOGETHER = 1 << 26
"""Probabilities that may be there at once, of heads that are scored together."""
CHOSEN = (
    "attentions cannot be shown: which tokens of the prompt stayed is not kept, but them; ask for those of a forward without"
    " a cache."
)


class RunsMixin:
    """The part of a cache's layer that knows of runs."""

    spec: CacheSpec
    length: int
    record_past: bool

    def start_runs(self) -> None:
        tokens = self.spec.tokens
        self.begin_B: Tensor | None = None
        self.again = False  # whether a prompt is read a second time
        kind = ForeseenRun if tokens and tokens.foreseen else HeadRun
        self.runs = [kind(run, tokens, self.spec) for run in tokens.runs] if tokens else []

    def update_runs(
        self, z_BCTR: Tensor, y_BCTV: Tensor, begin_B: Tensor | None, worth_BCT: Tensor | None = None
    ) -> tuple[RunTokens, RunTokens]:
        """As `update`."""
        assert self.spec.tokens is not None, "there are runs"
        T = z_BCTR.shape[2]
        length, again = self.length + T, T if self.again else 0
        new = [(heads_of(z_BCTR, one.run), heads_of(y_BCTV, one.run)) for one in self.runs]
        if self.again:
            shown = [one.ask_again(*states, length) for one, states in zip(self.runs, new, strict=True)]
        else:
            self.length, self.begin_B = length, begin_B
            adding = zip(self.runs, new, strict=True)
            shown = [self._add(one, *states, worth_BCT) for one, states in adding]
        places = tuple(at for _, at in shown)
        sides = zip(*(sides for sides, _ in shown), strict=True)
        k, v = (RunTokens(parts, places, length, self.spec.tokens, again) for parts in sides)
        return k, v

    def _add(self, one: HeadRun, z: Tensor, y: Tensor, worth_BCT: Tensor | None) -> tuple[Any, RunPlace]:
        if not isinstance(one, ForeseenRun):
            return one.add(z, y, self.length, self.begin_B, keep_all=self.record_past)
        if worth_BCT is None:  # random numbers of a benchmark, say: the newest are worth most
            own_BcT = torch.arange(self.length - z.shape[2], self.length, device=z.device).expand(*z.shape[:2], -1)
        else:
            own_BcT = heads_of(worth_BCT, one.run)
        return one.add_worth(z, y, own_BcT, self.length, self.begin_B)

    @property
    def waits(self) -> bool:
        """Whether a prompt was read of which nothing was chosen yet."""
        return any(one.pending is not None for one in self.runs)

    def check_removal(self, left: int) -> None:
        """Raise RuntimeError where the last of `left` tokens would see what is gone."""
        for one in self.runs:
            if one.misses(left, self.length, self.begin_B):
                raise RuntimeError(
                    f"tokens cannot be removed down to {left}: heads {list(one.run.heads)} have forgotten what would come"
                    " back into sight. Call activate_past_recording() before generating."
                )

    def settle_runs(self) -> None:
        """Forget what the next token does not see."""
        for one in self.runs:
            one.tidy(self.length, self.begin_B)


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
    steps: Steps
    made: Made
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
            raise ValueError(CHOSEN)
        dropout = self.layer.attention_dropout if self.training else 0.0
        absorbed, probs = self._absorb(q), None
        if self._eager() or wants_probs or dropout > 0:
            sizes: dict[str, Any] = {"scale": self.scaling, "softcap": self.layer.softcap, "dropout": dropout}
            out, probs = probabilities(absorbed, z, y, mask, **sizes)
        else:
            if (made := self._runs_by_kernel(absorbed, z, y, mask)) is not None:
                return made, None
            out = attend_by_run(absorbed, z, y, mask, few=self._few, scale=self.scaling)
        return self._lead_values_back(out), probs

    def _runs_by_kernel(self, q: Tensor, z: RunTokens, y: RunTokens, mask: Tensor | None) -> Tensor | None:
        """Few queries over all runs at once; None where the CPU's kernel does not serve."""
        if q.shape[2] > FEW_TOKENS or kernels_for(q) is not cpu_decode:
            return None
        back = value_map(self, q.dtype)
        out = by_one_call(self.steps, q, z, y, mask, back, scale=self.scaling, softcap=None)
        return out if out is None or back else self._lead_values_back(out)

    def _of_layer(
        self, q: Tensor, z: RunTokens, y: RunTokens, mask: Tensor | None, tables: Any, *, wants_probs: bool = False
    ) -> tuple[Any, Any, Tensor | None, Any]:
        """Keys and values of a layer of which every head keeps the same tokens, what queries see of them, and tables."""
        (run,), (place,) = z.tokens.runs, z.places
        if wants_probs and place.early_B is not None:
            raise ValueError(CHOSEN)
        if tables is not None and place.first is not None:
            assert place.columns_BCS is not None, "keys that are rotated when they are read know where they stood"
            columns_BS1 = place.columns_BCS[:, 0, :, None].long()
            tables = tuple(
                table.expand(len(columns_BS1), -1, -1).gather(1, columns_BS1.expand(-1, -1, table.shape[2]))
                for table in tables
            )
        seen = seen_by(run, z, place, mask, q, slice(0, q.shape[2]))
        keys, values = z.of_layer(self.spec.recent), y.of_layer(self.spec.recent)
        return keys, keys if self.spec.shared_latent else values, seen, tables

    def _few(self, q: Tensor, z: Stored, y: Stored, mask: Tensor | None) -> Tensor:
        way = choose(q, z, y, head_dim=self.layer.head_dim)
        return self._over_stored(way, q, z, y, mask, None, 0.0)[0]

    @torch.no_grad()
    def _choose(
        self, q: Tensor, z: RunTokens, y: RunTokens, mask: Tensor | None, cache: Any, tables: Any = None
    ) -> None:
        """What of a prompt that was just read stays, run by run."""
        rule: Scorer = registry.load("scorers", z.tokens.rule)()
        if rule.repeats and not z.again:
            return
        begin_B, length = cache.begin_B, z.length - z.again
        scored = []
        for one, keys, values, place in zip(cache.runs, z.parts, y.parts, z.places, strict=True):
            if one.pending is not None and (one.drops or begin_B is not None):
                scored.append(Pending(one, place, *self._numbers(keys, values, tables)))
            elif one.pending is not None:
                one.choose(q.new_zeros(len(q), keys.shape[1], keys.shape[2] - z.again), length, begin_B)
        for runs in [scored] if not rule.agree and _alike(scored, q) else [[run] for run in scored]:
            places = _places(runs)
            prompt = self._prompt(runs, places, q, z, mask, begin_of_rows(begin_B, q))
            worth_BCS = rule.score(prompt)[..., : prompt.keys_BCSR.shape[2] - z.again]
            for run, heads in zip(runs, places, strict=True):
                own_BCS = worth_BCS[:, heads].sum(1, keepdim=True) if self.spec.drops_of_layer else worth_BCS[:, heads]
                match = functools.partial(matched, prompt, heads) if z.tokens.matched else None
                run.held.choose(own_BCS, length, begin_B, match)

    def _prompt(
        self, runs: list[Pending], places: list[Any], q: Tensor, held: RunTokens, mask: Tensor | None, begin_B: Tensor
    ) -> Prompt:
        """As the heads of some runs see it, which hold the same tokens. places: what picks each run's of all these heads."""
        (B, N, T, H), (run, place, keys, values) = q.shape, runs[0]
        if len(runs) > 1:
            keys = _side_by_side([each.keys_BCSR for each in runs], places)
            values = _side_by_side([each.values_BCSV for each in runs], places)
        heads = query_heads(_together(runs), N // self.spec.num_kv_heads, q.device)
        own, queries_BnTH = mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask, q[:, heads]

        def seen(rows: slice) -> Tensor:
            found = seen_by(run.run, held, place, own, queries_BnTH, rows)
            if found is not None:
                return found
            last_T = torch.arange(held.length - T, held.length, device=q.device)[rows]
            return (torch.arange(held.length, device=q.device) <= last_T[:, None])[None, None]

        def absorb(q_BnQH: Tensor) -> Tensor:
            if self.k_b_proj is None or self.spec.rope == "on_read":
                return q_BnQH
            of_all = q_BnQH.new_zeros(B, N, q_BnQH.shape[2], H)
            of_all[:, heads] = q_BnQH
            return self._absorb(of_all)[:, heads, :, : keys.shape[3]]

        return Prompt(
            layer=self.layer, queries_BnTH=queries_BnTH, absorb=absorb, keys_BCSR=keys,
            values_BCSV=values, seen=seen, first_B=(begin_B - (held.length - held.again - T)).clamp_min(0),
            output=lambda: self._output_of_values()[:, heads, : values.shape[3]],
            root=lambda: self._root_of_values(values.shape[3])[heads], again=held.again,
        )  # fmt: skip

    def _numbers(self, keys: Stored, values: Stored, tables: Any) -> tuple[Tensor, Tensor]:
        """As a scorer sees them: as they are stored, or, where keys are rotated when they are read, the source's heads."""
        if self.spec.rope != "on_read":
            return read_all(keys), read_all(values)
        return all_keys(self, keys, KeysOnRead(self, tables)), all_values(self, values)

    def _root_of_values(self, width: int) -> Tensor:
        """[N, V, V], the `root_of` the same; kept where it is small."""
        weights = (self.o_proj.weight, None if self.v_b_proj is None else self.v_b_proj.weight)

        def make() -> Tensor:
            return root_of(self._output_of_values()[..., :width])

        if self.layer.num_attention_heads * width**2 > KEPT:
            return make()
        root: Tensor = self.made.of(width, weights, make, some=SOME)
        return root

    def _output_of_values(self) -> Tensor:
        """[D, N, V]: how averages of what a scorer sees of values come into the residual stream."""
        weight_DNV = self.o_proj.weight.unflatten(1, (self.layer.num_attention_heads, -1))
        if self.v_b_proj is None or self.spec.rope == "on_read":
            return weight_DNV
        back_KHV = self.v_b_proj.weight.reshape(self.layer.num_kv_heads, self.layer.head_dim, -1)
        return torch.einsum("dkgh,khv->dkgv", weight_DNV.unflatten(1, (len(back_KHV), -1)), back_KHV).flatten(1, 2)


class Pending(NamedTuple):
    """A run of which it has to be chosen what stays, and what a scorer sees of its tokens."""

    held: HeadRun
    place: RunPlace
    keys_BCSR: Tensor
    values_BCSV: Tensor


def _alike(runs: list[Pending], q_BNTH: Tensor) -> bool:
    """Whether they hold the same tokens, all that there were, and are no more than one matrix may be of."""
    B, N = q_BNTH.shape[:2]
    return bool(runs) and all(
        run.place.first is None and B * N * AT_ONCE * run.keys_BCSR.shape[2] <= TOGETHER for run in runs
    )


def _together(runs: list[Pending]) -> TokenRun:
    return TokenRun(heads=tuple(sorted(head for run in runs for head in run.held.run.heads)))


def _places(runs: list[Pending]) -> list[Any]:
    """What picks each run's heads of all of theirs."""
    if len(runs) == 1:
        return [slice(None)]
    place = {head: i for i, head in enumerate(_together(runs).heads)}
    device = runs[0].keys_BCSR.device
    return [index_of(tuple(place[head] for head in run.held.run.heads), device) for run in runs]


def _side_by_side(sides: Sequence[Tensor], places: list[Any]) -> Tensor:
    """Keys or values of runs [B, C, S, R] as those of all their heads."""
    B, _, S, R = sides[0].shape
    together = sides[0].new_empty(B, sum(side.shape[1] for side in sides), S, R)
    for side, place in zip(sides, places, strict=True):
        together[:, place] = side
    return together
