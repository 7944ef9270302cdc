"""Which tokens queries see, of heads that keep some of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvfold.plan.token_runs import FEW_TOKENS, TokenRun, TokenRuns
from kvfold.runtimes.kernels.packed_tokens import RunPlace, RunTokens


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
        seen = not_gone(held, place, mask, q_BnTR, rows)
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
    if place.added_BCS is None:
        seen = q_BnTR.new_zeros(1, 1, 1, S)
    else:
        seen = q_BnTR.new_empty(B, C, n // C, S).copy_(place.added_BCS[:, :, None]).view(B, n, 1, S)
    seen[..., hidden] = torch.finfo(seen.dtype).min
    return seen


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


def not_gone(held: RunTokens, place: RunPlace, mask: Tensor | None, q_BnTR: Tensor, rows: slice) -> Tensor | None:
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
