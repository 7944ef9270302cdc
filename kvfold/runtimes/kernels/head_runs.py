"""Attention of heads that keep different tokens: run by run, each over the tokens that its heads keep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.token_runs import FEW_TOKENS, TokenRun
from kvfold.runtimes.kernels.attention import grouped_attention, prefill_attention
from kvfold.runtimes.kernels.cpu_layer import Form, Steps, asked_of
from kvfold.runtimes.kernels.gathering import gather_tokens
from kvfold.runtimes.kernels.packed_tokens import RunPlace, RunTokens, Stored, index_of, read_all
from kvfold.runtimes.kernels.seen_tokens import begin_of, columns, not_gone, reads_whole, seen_by, sees_all

QUERIES_AT_ONCE = 256
"""Of a prompt: what they see is a mask, and of a window only the tokens that one of them sees are read."""
SURVIVING = 256
"""Queries that share what was not dropped before them."""

Attend = Callable[[Tensor, Stored, Stored, Tensor | None], Tensor]
"""Few absorbed queries [B, n, T, R] over stored keys and values under a mask: [B, T, n, V]."""


def query_heads(run: TokenRun, group: int, device: torch.device) -> Any:
    """What picks the heads of queries that read a run, `group` per stored head."""
    return index_of(_of_queries(run.heads, group), device)


@functools.lru_cache(maxsize=4096)
def _of_queries(heads: tuple[int, ...], group: int) -> tuple[int, ...]:
    return tuple(head * group + i for head in heads for i in range(group))


def attend_by_run(
    q_BNTR: Tensor, z: RunTokens, y: RunTokens, mask: Tensor | None, *, few: Attend, scale: float
) -> Tensor:
    """Absorbed queries over what each run keeps: [B, T, N, V]. `few`: attends with at most FEW_TOKENS queries."""
    T = q_BNTR.shape[2]

    def attend(
        heads: Any, q: Tensor, keys: Stored, values: Stored, run: TokenRun, place: RunPlace, own: Tensor | None
    ) -> Tensor:
        if T > FEW_TOKENS:
            return _prompt(q, keys, values, run, z, place, own, scale)
        return few(q, keys, values, seen_by(run, z, place, own, q, slice(0, T)))

    return _over_runs(q_BNTR, z, y, mask, attend)


def by_one_call(
    steps: Steps, q_BNTR: Tensor, z: RunTokens, y: RunTokens, mask: Tensor | None, map: Any, **sizes: Any
) -> Tensor | None:
    """As `attend_by_run`, of few queries on a CPU, led back by the map; None where its kernel does not serve. steps: of the
    layer."""
    N, T = q_BNTR.shape[1:3]
    group = N // sum(len(run.heads) for run in z.tokens.runs)
    forms, asked = [], []
    for run, keys, values, place in zip(z.tokens.runs, z.parts, y.parts, z.places, strict=True):
        heads = query_heads(run, group, q_BNTR.device)
        own, q = mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask, q_BNTR[:, heads]
        forms.append(Form(keys, values, heads=_of_queries(run.heads, group)))
        asked.append(asked_of(q, keys.shape[2], seen_by(run, z, place, own, q, slice(0, T))))
    return steps.read(forms, asked, y.parts[0].shape[3], map, heads=N, **sizes)


def _over_runs(
    q_BNTR: Tensor, z: RunTokens, y: RunTokens, mask: Tensor | None, attend: Callable[..., Tensor]
) -> Tensor:
    """[B, T, N, V], put together of what `attend` gives for each run: of what picks its query heads, its queries, keys and
    values, the run itself, where its tokens stand, and its heads' part of the mask."""
    group = q_BNTR.shape[1] // sum(len(run.heads) for run in z.tokens.runs)
    out: Tensor | None = None
    for run, keys, values, place in zip(z.tokens.runs, z.parts, y.parts, z.places, strict=True):
        heads = query_heads(run, group, q_BNTR.device)
        own = mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask
        part_BTnV = attend(heads, q_BNTR[:, heads], keys, values, run, place, own)
        if out is None:
            B, T, _, V = part_BTnV.shape
            out = part_BTnV.new_empty(B, T, q_BNTR.shape[1], V)
        out[:, :, heads] = part_BTnV
    assert out is not None, "a plan has a run for every head"
    return out


def _prompt(
    q_BnTR: Tensor, keys: Stored, values: Stored, run: TokenRun, held: RunTokens, place: RunPlace,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Many queries, QUERIES_AT_ONCE at a time, by torch's fused kernel."""
    T, k, v = q_BnTR.shape[2], read_all(keys), read_all(values)
    if sees_all(run, held, place, T):
        return prefill_attention(q_BnTR, k, v, mask, scale=scale)
    if held.tokens.foreseen and mask is None and place.gone_BCS is not None and not reads_whole(held.tokens, T):
        return _by_survivors(q_BnTR, k, v, held, place, scale)
    if held.tokens.foreseen and (mask is None or mask.shape[1] == 1):
        seen = not_gone(held, place, mask, q_BnTR, slice(0, T))
        return _by_stored_head(q_BnTR, k, v, seen, scale)
    parts = []
    for start in range(0, T, QUERIES_AT_ONCE):
        rows = slice(start, min(start + QUERIES_AT_ONCE, T))
        seen = seen_by(run, held, place, mask, q_BnTR, rows)
        assert seen is not None, "several queries see different tokens"
        some = _of_some(seen)
        parts.append(prefill_attention(q_BnTR[:, :, rows], k[:, :, some], v[:, :, some], seen[..., some], scale=scale))
    return torch.cat(parts, dim=1)


def _by_survivors(q_BnTR: Tensor, k: Tensor, v: Tensor, held: RunTokens, place: RunPlace, scale: float) -> Tensor:
    """The same where it is said when each token is dropped, and no sequence is padded: some queries at a time, of what the
    first of them sees and of their own tokens, as many of every head."""
    assert place.gone_BCS is not None, "it is said"
    (B, C, S), T = place.gone_BCS.shape, q_BnTR.shape[2]
    column_S = columns(place, held.length, torch.zeros(1, 1, dtype=torch.long, device=q_BnTR.device))[0]
    parts = []
    for start in range(0, T, SURVIVING):
        rows = slice(start, min(start + SURVIVING, T))
        at_T = torch.arange(held.length - T, held.length, device=q_BnTR.device)[rows, None]
        gone_BCS = place.gone_BCS[..., : S - T + rows.stop]
        index_BCn = (gone_BCS > held.length - T + start).nonzero()[:, 2].view(B, C, -1)
        seen = (column_S[index_BCn][:, :, None] <= at_T) & (at_T < gone_BCS.gather(2, index_BCn)[:, :, None])
        keys, values = (gather_tokens(x, index_BCn) for x in (k, v))
        parts.append(_by_stored_head(q_BnTR[:, :, rows], keys, values, seen, scale))
    return torch.cat(parts, dim=1)


def _by_stored_head(q_BnTR: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """The same where a mask is for stored heads, [B or 1, C or 1, T, S]: each by itself, so that none is copied for the query
    heads that read it."""
    B, n, T, _ = q_BnTR.shape
    C = k.shape[1]
    own = None if seen is None else seen.expand(B, C, *seen.shape[2:]).flatten(0, 1)[:, None]
    parts = (k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None])
    out = prefill_attention(
        q_BnTR.unflatten(1, (C, -1)).flatten(0, 1), *parts, own, scale=scale
    )  # [B * C, T, n / C, V]
    return out.unflatten(0, (B, C)).transpose(1, 2).reshape(B, T, n, -1)


def _of_some(seen: Tensor) -> Tensor:
    """The columns that at least one query sees, and the first, so that a query that sees nothing has one to be given."""
    some = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    some_S = some.flatten(0, -2).any(0)
    some_S[0] = True
    return some_S.nonzero()[:, 0]


def probabilities(
    q_BNTR: Tensor,
    z: RunTokens,
    y: RunTokens,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The obvious way, by two matrix products: [B, T, N, V], and probabilities [B, N, T, S] of all columns, 0 for dropped
    ones (those of sinks that stand before the newest tokens stand where they were)."""
    B, N, T, _ = q_BNTR.shape
    probs_BNTL = q_BNTR.new_zeros(B, N, T, z.length)
    begin_B = begin_of(mask)
    begin_B1 = torch.zeros(B, 1, dtype=torch.long, device=q_BNTR.device) if begin_B is None else begin_B[:, None]

    def attend(
        heads: Any, q: Tensor, keys: Stored, values: Stored, run: TokenRun, place: RunPlace, own: Tensor | None
    ) -> Tensor:
        seen, numbers = seen_by(run, z, place, own, q, slice(0, T)), (read_all(keys), read_all(values))
        averaged, probs = grouped_attention(q, *numbers, seen, scale=scale, dropout=dropout, softcap=softcap)
        column_BS = columns(place, z.length, begin_B1).clamp_max(z.length - 1)
        index = column_BS[:, None, None].expand(B, q.shape[1], T, -1)
        probs_BNTL[:, heads] = probs_BNTL[:, heads].scatter_add(3, index, probs)
        return averaged

    return _over_runs(q_BNTR, z, y, mask, attend), probs_BNTL
