"""Which tokens heads drop, and when, where every token came with what it is worth: alike in whatever steps they came."""

from __future__ import annotations

import numpy as np
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
    """Of sequences with as many tokens. Of tokens worth as much the earliest goes first. By numpy: what is dropped at one
    length decides what can be at the next, and torch's operations on so few numbers take longer to call than to do."""
    rank_rS = worth_bCS.float().argsort(dim=-1, stable=True).argsort(dim=-1).flatten(0, 1).cpu().numpy()
    gone_rS = np.full(rank_rS.shape, NEVER, dtype=np.int32)  # of the token of each rank
    counted = own_S.argsort(stable=True)[int((own_S < 0).sum()) :]
    places_s, counted_s = own_S[counted].cpu().numpy(), counted.cpu().numpy()
    held_rn, row_r1 = rank_rS[:, :0], np.arange(len(rank_rS))[:, None]
    seen = 0
    for at in lengths:
        due = int(np.searchsorted(places_s, at - tokens.newest))
        held_rn, seen = np.concatenate([held_rn, rank_rS[:, counted_s[seen:due]]], axis=1), due
        excess = held_rn.shape[1] - (run.kept(at) - tokens.newest)
        if excess > 0:
            held_rn = np.partition(held_rn, excess - 1, axis=1)
            gone_rS[row_r1, held_rn[:, :excess]] = at
            held_rn = held_rn[:, excess:]
    gone_rS = np.take_along_axis(gone_rS, rank_rS, axis=1)
    return torch.from_numpy(gone_rS).view(worth_bCS.shape).to(worth_bCS.device)
