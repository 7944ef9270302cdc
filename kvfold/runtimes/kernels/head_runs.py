"""Attention of heads that keep different tokens: run by run, each over the tokens that its heads keep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.token_runs import FEW_TOKENS, TokenRun, TokenRuns
from kvfold.runtimes.kernels.attention import grouped_attention, prefill_attention
from kvfold.runtimes.kernels.cpu_layer import Form, Steps, asked_of
from kvfold.runtimes.kernels.gathering import gather_tokens
from kvfold.runtimes.kernels.packed_tokens import RunPlace, RunTokens, Stored, index_of, read_all

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


def begins(mask: Tensor | None) -> Tensor | None:
    """[B, T]: the column where each query's sequence begins, the first that it sees, or their number where it sees none; None
    without a mask, for 0."""
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    first_BT = seen[:, 0].int().argmax(-1)
    return torch.where(seen[:, 0].any(-1), first_BT, seen.shape[-1])


def begin_of(mask: Tensor | None) -> Tensor | None:
    """[B]: the same for sequences, of which each query of a step sees one."""
    last_B1 = begins(None if mask is None else mask[..., -1:, :])
    return None if last_B1 is None else last_B1[:, 0]


def seen_by(
    run: TokenRun, held: RunTokens, place: RunPlace, mask: Tensor | None, q_BnTR: Tensor, rows: slice
) -> Tensor | None:
    """Which of a run's tokens each of its queries sees, `rows` of them, the last of all that are held, as a mask [B or 1, 1
    or n, rows, S]: bool, or numbers to add where `mask` is of those or tokens stand for others. None where no mask is needed.
    `mask`: over all columns, dropped ones too."""
    if held.tokens.foreseen:
        seen = _not_gone(held, place, mask, q_BnTR, rows)
        repeats = 1 if seen is None or seen.shape[1] == 1 else q_BnTR.shape[1] // seen.shape[1]
        return seen if seen is None or repeats == 1 else seen.repeat_interleave(repeats, dim=1)
    if q_BnTR.shape[2] == 1 and mask is None and place.early_B is not None:
        return _seen_by_one(run, held, place, q_BnTR)
    seen = _seen_by(run, held, place, mask, q_BnTR, rows)
    if place.added_BCS is None or place.first is None:
        return seen
    added = place.added_BCS.repeat_interleave(q_BnTR.shape[1] // len(run.heads), dim=1)[:, :, None].to(q_BnTR.dtype)
    if seen is None:
        return added
    return added.masked_fill(~seen, torch.finfo(added.dtype).min) if seen.dtype == torch.bool else added + seen


def _seen_by_one(run: TokenRun, held: RunTokens, place: RunPlace, q_BnTR: Tensor) -> Tensor | None:
    """The same of a step's one token behind chosen ones, where no sequence is padded: all but the oldest of the newest ones
    that have not been forgotten yet."""
    assert place.first is not None, "tokens were chosen"
    B, n = q_BnTR.shape[:2]
    first = held.tokens.first_newest(run, held.length, place.early)
    hidden = slice(place.early, place.early + first - place.first)
    if place.added_BCS is None and hidden.start == hidden.stop:
        return None
    C, S = len(run.heads), place.early + held.length - place.first
    seen = q_BnTR.new_zeros(1, 1, 1, S) if place.added_BCS is None else q_BnTR.new_empty(B, C, n // C, S)
    if place.added_BCS is not None:
        seen.copy_(place.added_BCS[:, :, None])
    seen[..., hidden] = torch.finfo(seen.dtype).min
    return seen if place.added_BCS is None else seen.view(B, n, 1, S)


def _seen_by(
    run: TokenRun, held: RunTokens, place: RunPlace, mask: Tensor | None, q_BnTR: Tensor, rows: slice
) -> Tensor | None:
    length, tokens, T, device = held.length, held.tokens, q_BnTR.shape[2], q_BnTR.device
    mask = None if mask is None else mask[..., rows, :length]
    if sees_all(run, held, place, T):
        return mask
    if mask is None and place.first == tokens.first_newest(run, length, place.early) and T == 1:
        return None
    begin_BT = torch.zeros(1, 1, dtype=torch.long, device=device) if mask is None else begins(mask)
    assert begin_BT is not None, "there is a mask"
    last_T = torch.arange(length - T, length, device=device)[rows]
    column_BS = columns(place, length, begin_BT[:, -1:])
    if reads_whole(tokens, T):
        start = length - T - held.again
        before_BS = stays_before(run, tokens, place, column_BS, begin_BT[:, -1:], start)
        new_BS = is_new(place, column_BS, begin_BT[:, -1:], start)
        seen = (before_BS | new_BS)[:, None] & (column_BS[:, None] <= last_T[:, None])
    else:
        seen = _recent_or_early(run, tokens, place, column_BS[:, None], last_T[:, None], begin_BT[..., None])
    return _under(mask, seen[:, None], column_BS, place, q_BnTR.shape[1])


def _not_gone(held: RunTokens, place: RunPlace, mask: Tensor | None, q_BnTR: Tensor, rows: slice) -> Tensor | None:
    """The same where it is said of each token when it is dropped; for stored heads where `mask` says nothing of others."""
    T, device = q_BnTR.shape[2], q_BnTR.device
    mask = None if mask is None else mask[..., rows, : held.length]
    gone_BCS = None if T == 1 or reads_whole(held.tokens, T) else place.gone_BCS
    if gone_BCS is None and (place.first is None or (mask is None and T == 1)):
        return mask
    begin_B = begin_of(mask)
    begin_B1 = torch.zeros(1, 1, dtype=torch.long, device=device) if begin_B is None else begin_B[:, None]
    last_T1 = torch.arange(held.length - T, held.length, device=device)[rows, None]
    column_BS = columns(place, held.length, begin_B1)
    seen = ((column_BS[:, None] <= last_T1) & (column_BS >= begin_B1)[:, None])[:, None]
    if gone_BCS is not None:
        if mask is not None and mask.shape[1] > 1:
            gone_BCS = gone_BCS.repeat_interleave(q_BnTR.shape[1] // gone_BCS.shape[1], dim=1)
        own_B1T1 = (last_T1 - begin_B1[:, None])[:, None].int()
        seen = seen & (own_B1T1 < gone_BCS[:, :, None])
    return _under(mask, seen, column_BS, place, q_BnTR.shape[1])


def reads_whole(tokens: TokenRuns, T: int) -> bool:
    """Whether T queries see all tokens of their step."""
    return tokens.prompt == "whole" and T > FEW_TOKENS


def sees_all(run: TokenRun, held: RunTokens, place: RunPlace, T: int) -> bool:
    """Whether none of the last T queries misses anything."""
    if held.tokens.foreseen:
        return place.first is None and (place.gone_BCS is None or reads_whole(held.tokens, T))
    dropped = held.tokens.first_newest(run, held.length) > held.tokens.sinks
    return place.first is None and (not dropped or reads_whole(held.tokens, T))


def columns(place: RunPlace, length: int, begin_B1: Tensor) -> Tensor:
    """[B, S]: which columns are stored. Where tokens were chosen their columns are forgotten: those that count have their
    sequence's first, which every query sees, others one that none does."""
    if place.first is None:
        return torch.arange(length, device=begin_B1.device)[None]
    early_E = torch.arange(place.early, device=begin_B1.device)
    if place.early_B is None:
        early_BE = begin_B1 + early_E
    else:
        early_BE = torch.where(early_E >= place.early - place.early_B[:, None], begin_B1, length)
    newest_S = torch.arange(place.first, length, device=begin_B1.device)
    return torch.cat([early_BE, newest_S.expand(len(early_BE), -1)], dim=1)


def kept_of(run: TokenRun, context: Tensor) -> Tensor:
    """As `run.kept`, of contexts of so many tokens each."""
    kept = (run.share * context.double()).ceil().long().clamp_min(run.least)
    return torch.minimum(kept, context)


def is_new(place: RunPlace, column_BS: Tensor, begin_B1: Tensor, start: int) -> Tensor:
    """[B, S]: which tokens are of columns from `start` on, and no padding."""
    at_S = torch.arange(column_BS.shape[1], device=column_BS.device)
    of_newest = at_S >= (0 if place.first is None else place.early)  # where early ones may stand as well
    return of_newest & (column_BS >= start) & (column_BS >= begin_B1)


def stays_before(
    run: TokenRun, tokens: TokenRuns, place: RunPlace, column_BS: Tensor, begin_B1: Tensor, start: int
) -> Tensor:
    """[B, S]: what of the columns before `start` a query there sees."""
    last_11 = torch.full((1, 1), start, device=column_BS.device)
    seen = _recent_or_early(run, tokens, place, column_BS[:, None], last_11, begin_B1[..., None])
    return seen[:, 0] & (column_BS < start)


def _recent_or_early(
    run: TokenRun, tokens: TokenRuns, place: RunPlace, column_B1S: Tensor, last_T1: Tensor, begin_BT1: Tensor
) -> Tensor:
    """[B, T, S], as `TokenRuns` says; equal to `run.kept` for every query."""
    kept_BT1 = kept_of(run, last_T1 + 1 - begin_BT1)
    if place.early_B is None:
        before: Any = tokens.sinks
        early = (column_B1S >= begin_BT1) & (column_B1S < begin_BT1 + tokens.sinks)
    else:
        before = place.early_B[:, None, None]
        at_S = torch.arange(column_B1S.shape[2], device=column_B1S.device)
        early = (at_S >= place.early - before) & (at_S < place.early)
    newest_BT1 = (kept_BT1 - before).clamp_min(0)
    seen = (early | (column_B1S > last_T1 - newest_BT1)) & (column_B1S <= last_T1)
    if place.first is not None:  # sinks that have not left the newest tokens stand there as well
        seen[..., : place.early] &= column_B1S[..., : place.early] < place.first
    return seen


def _under(mask: Tensor | None, seen: Tensor, column_BS: Tensor, place: RunPlace, heads: int) -> Tensor:
    """Both masks as one, of the kind of `mask`, for so many query heads."""
    if mask is None:
        return seen
    if place.first is not None:
        column_BnS = column_BS[:, None] if place.columns_BCS is None else place.columns_BCS.long()
        if column_BnS.shape[1] > 1:
            column_BnS = column_BnS.repeat_interleave(heads // column_BnS.shape[1], dim=1)
        mask = mask.take_along_dim(column_BnS[:, :, None].clamp_max(mask.shape[-1] - 1), dim=-1)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


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
        seen = _not_gone(held, place, mask, q_BnTR, slice(0, T))
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
