"""Attention whose softmax has one more score for every query head, which no token and no value goes with (gpt-oss).

`sinks_N` everywhere: these scores, as they stand beside scaled ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 8
"""Numbers by which heads grow: fused kernels want multiples of so many."""


def beside_sinks(out_BTNV: Tensor, log_sums: Sequence[Tensor], sinks_N: Tensor | None) -> Tensor:
    """What is left of averages over tokens alone. log_sums: logarithms of the sums of exponentials [B, N, T] of the parts
    that the tokens came in."""
    if sinks_N is None:
        return out_BTNV
    of_tokens_BNT = torch.stack(list(log_sums)).logsumexp(0)
    share_BNT = (of_tokens_BNT - sinks_N.to(of_tokens_BNT)[:, None]).sigmoid()
    return (out_BTNV * share_BNT.transpose(1, 2)[..., None]).to(out_BTNV.dtype)


def with_sinks(scores_BNTS: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Scores with those of the sinks behind them: [B, N, T, S + 1]."""
    if sinks_N is None:
        return scores_BNTS
    column = sinks_N.to(scores_BNTS.dtype)[:, None, None].expand(*scores_BNTS.shape[:3], 1)
    return torch.cat([scores_BNTS, column], dim=3)


def sink_tokens(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BUSV: Tensor, mask: Tensor | None, sinks_N: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same attention without sinks: heads have a further number, in which queries say their sink's score, and one more
    token says 1; its value is 0. Returns queries, keys, values and a mask."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    said = (sinks_N / scale).to(q_BNTH.dtype)[:, None, None].expand(*q_BNTH.shape[:3], 1)
    q = F.pad(torch.cat([q_BNTH, said], dim=3), (0, LANES - 1))
    token = F.pad(k_BKSH.new_ones(*k_BKSH.shape[:2], 1, 1), (k_BKSH.shape[3], LANES - 1))
    k = torch.cat([F.pad(k_BKSH, (0, LANES)), token], dim=2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
    return q, k, F.pad(v_BUSV, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=mask.dtype == torch.bool)
