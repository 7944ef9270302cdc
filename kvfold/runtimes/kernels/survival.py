"""Which tokens heads drop, and when, where every token came with what it is worth: alike in whatever steps they came."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.plan.cache_spec import RUN_BLOCK
from kvfold.plan.token_runs import TokenRun, TokenRuns

NEVER = 1 << 30


def crossed(run: TokenRun, before: int, length: int) -> list[int]:
    """The lengths of a sequence from `before` (not with it) to `length` at which heads of this run drop tokens."""
    lengths = range((before // RUN_BLOCK + 1) * RUN_BLOCK, length + 1, RUN_BLOCK)
    return [at for at in lengths if run.kept(at) < at]


def gone_at(
    run: TokenRun, tokens: TokenRuns, worth_BCS: Tensor, own_BS: Tensor, steps_B: list[tuple[int, int]], *, whole: bool
) -> Tensor:
    """[B, C, S]: the length of its sequence at which each head drops each token, or NEVER.

    own_BS: where tokens stand in their sequences, rising; of those that do not count a negative number, or one beyond the
    newest. steps_B: how many tokens each sequence had before the step, and has now. whole: a step that sees all of itself,
    of which only the last length at which tokens are dropped matters.
    """
    gone_BCS = torch.full(worth_BCS.shape, NEVER, dtype=torch.int32, device=worth_BCS.device)
    for step in set(steps_B):
        lengths = crossed(run, *step)[-1:] if whole else crossed(run, *step)
        rows = torch.tensor([b for b, other in enumerate(steps_B) if other == step], device=worth_BCS.device)
        if lengths:
            gone_BCS[rows] = _gone_at(run, tokens, worth_BCS[rows], own_BS[rows[0]], lengths)
    return gone_BCS


def _gone_at(run: TokenRun, tokens: TokenRuns, worth_bCS: Tensor, own_S: Tensor, lengths: list[int]) -> Tensor:
    """Of sequences with as many tokens. Of tokens worth as much the earliest goes first."""
    rank_bCS = worth_bCS.float().argsort(dim=-1, stable=True).argsort(dim=-1)
    gone_bCS = torch.full(worth_bCS.shape, NEVER, dtype=torch.int32, device=worth_bCS.device)
    counted = [own for own in own_S.tolist() if own >= 0]
    dropped = 0
    for at in lengths:
        beyond = at - tokens.newest
        excess = sum(own < beyond for own in counted) - dropped - (run.kept(at) - tokens.newest)
        if excess > 0:
            stays_bCS = (own_S < 0) | (own_S >= beyond) | (gone_bCS != NEVER)
            worst_bCn = rank_bCS.masked_fill(stays_bCS, own_S.numel()).topk(excess, largest=False).indices
            gone_bCS.scatter_(2, worst_bCn, at)
            dropped += excess
    return gone_bCS
