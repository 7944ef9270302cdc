"""What it costs a head to forget tokens, in nats, as a curve over how many it keeps.

Ordinary text hardly looks back: what some heads are needed for shows where a text is repeated. A sequence here is a context
and its passages once more, in another order, so that each has to be found again. Heads that find what stood where need it at
every distance up to the whole context. Of queries of either half, d_q is what the output of a head changes by when of the
context only the first tokens and the newest n stay, and g_q the gradient of sampled labels by that output: half the mean of
(g_q . d_q)^2 is what forgetting costs, to second order (linalg/sensitivity.py), comparable between all heads of all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvfold import distributed as processes
from kvfold.calibration.calibrate import own_sequences
from kvfold.calibration.cross_moments import CrossMoments
from kvfold.calibration.layerwise_model import StreamedModel
from kvfold.calibration.passes import Passes
from kvfold.calibration.statistics import Seen
from kvfold.checkpoint.atomic import make_folder, write_tensors
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.source import Source, source_dtype
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.reference import alibi_slope

FORGETTING_VERSION = 3
"""To be raised when curves are computed differently, so that old ones on disk are not taken for new ones."""

SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Of the context, for which curves have points."""
PASSAGE = 32
"""Tokens that are repeated in a row."""
QUERIES = 128
"""Of each repetition: every so-manieth."""


@dataclass(frozen=True)
class Forgetting:
    """Of every layer, key/value head and share (SHARES): nats per token, of ordinary text and of text that is repeated;
    smaller shares never cost less."""

    ordinary_LCn: Tensor
    repeated_LCn: Tensor

    def nats_LCn(self, recall: float) -> Tensor:
        """Both together. recall: what repeated text counts beside ordinary text."""
        return self.ordinary_LCn + recall * self.repeated_LCn


class _Curves:
    """Gathers the curves of one layer."""

    def __init__(self, layer: AttentionLayer, sinks: int) -> None:
        self.layer, self.sinks = layer, sinks
        self.sum_2Cn = torch.zeros(2, layer.num_kv_heads, len(SHARES), dtype=torch.float64)
        self.rows = 0

    def __call__(self, seen: Seen) -> None:
        assert seen.out_gradient is not None, "gradients are seen on the way down"
        gradient = seen.out_gradient.unflatten(2, (self.layer.num_attention_heads, -1)).transpose(1, 2)
        for q, k, v, g in zip(seen.q, seen.k, seen.v, gradient, strict=True):
            self.sum_2Cn = self.sum_2Cn.to(q.device) + costs(self.layer, q, k, v, g, self.sinks)
            self.rows += 1

    def gather(self) -> None:
        rows = processes.summed(torch.tensor(float(self.rows), device=self.sum_2Cn.device))
        self.sum_2Cn = (processes.summed(self.sum_2Cn) / rows).cpu()


def forgetting(
    source: Source, contexts_BT: Tensor, *, run_dir: Path, device: str, seed: int = 0, sinks: int = 4
) -> Forgetting:
    """Curves of all layers from the contexts and their repetitions; kept in `run_dir`. One layer is in memory at a time."""
    key = fingerprint(
        version=FORGETTING_VERSION, model=source.checkpoint.fingerprint(), tokens=contexts_BT, seed=seed, sinks=sinks
    )
    folder = run_dir / f"forgetting-{key[:12]}"
    file = folder / "curves.safetensors"
    if not file.exists():
        make_folder(folder)
        nats_L2Cn = _measured(source, with_repetition(contexts_BT, seed), folder, device, seed, sinks)
        if not processes.rank():
            kinds = {"ordinary": nats_L2Cn[:, 0].contiguous(), "repeated": nats_L2Cn[:, 1].contiguous()}
            write_tensors(file, kinds, {})
        processes.wait_for_all()
    found = load_file(file)
    return Forgetting(found["ordinary"], found["repeated"])


def with_repetition(contexts_BT: Tensor, seed: int = 0) -> Tensor:
    """[B, 2 T]: each context, and its passages in another order."""
    generator = torch.Generator().manual_seed(seed)
    repeated = []
    for context_T in contexts_BT:
        passages = context_T.split(PASSAGE)
        order = torch.randperm(len(passages), generator=generator).tolist()
        repeated.append(torch.cat([passages[i] for i in order]))
    return torch.cat([contexts_BT, torch.stack(repeated)], dim=1)


def _measured(source: Source, tokens_BT: Tensor, folder: Path, device: str, seed: int, sinks: int) -> Tensor:
    model = StreamedModel(source.checkpoint, source.arch, device, outputs=True)
    dtype = getattr(torch, source_dtype(source.checkpoint, source.arch, model.layers[0]))
    passes = Passes(model, own_sequences(tokens_BT), folder, CrossMoments(frozenset(), frozenset()), dtype)
    draws_BT = torch.rand(tokens_BT.shape, generator=torch.Generator().manual_seed(seed))
    curves: dict[int, Tensor] = {}

    def keep(seen: _Curves) -> None:
        seen.gather()
        curves[seen.layer.index] = seen.sum_2Cn

    passes.down(lambda layer: _Curves(layer, sinks), keep, own_sequences(draws_BT))
    passes.forget()
    nats_L2Cn = torch.stack([curves[layer] for layer in sorted(curves)])
    return nats_L2Cn.flip(-1).cummax(-1).values.flip(-1)


def costs(
    layer: AttentionLayer, q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, gradient_NTH: Tensor, sinks: int
) -> Tensor:
    """[2, K, n] of one sequence, of which the second half repeats the first: of queries of the first half, and of the second.
    n counts SHARES."""
    S, K = k_KTH.shape[1] // 2, layer.num_kv_heads
    found = []
    for start, end in ((S // 2, S), (S, 2 * S)):
        at_M = torch.arange(start, end, max((end - start) // QUERIES, 1), device=q_NTH.device)
        change_nNMH = _changes(layer, q_NTH[:, at_M], k_KTH, v_KTH, at_M, sinks)
        felt_nNM = (change_nNMH * gradient_NTH[:, at_M]).sum(-1, dtype=torch.float64)
        felt_nKM = felt_nNM.unflatten(1, (K, -1)).sum(2)  # the queries of a head miss the same tokens
        found.append(felt_nKM.square().mean(-1).T / 2)
    return torch.stack(found)


def _changes(layer: AttentionLayer, q_NMH: Tensor, k_KTH: Tensor, v_KTH: Tensor, at_M: Tensor, sinks: int) -> Tensor:
    """[n, N, M, H]: how the outputs of queries change where of the context its first tokens and its newest stay."""
    H, T = q_NMH.shape[2], k_KTH.shape[1]
    weights_NMT = _weights(layer, q_NMH, k_KTH, at_M)
    values_KTh = torch.cat([v_KTH, torch.ones_like(v_KTH[..., :1])], dim=2)
    kept_MT = _kept(T // 2, at_M)
    needed_MT = torch.where(torch.arange(T, device=at_M.device) < sinks, 0, kept_MT)
    parts, seen = [], torch.zeros_like(needed_MT, dtype=torch.bool)
    for share in SHARES:
        more = (needed_MT <= max(share * (T // 2) - sinks, 0) if share < 1 else torch.ones_like(seen)) & ~seen
        parts.append(_sum_over(weights_NMT * more, values_KTh))
        seen |= more
    summed_nNMh = torch.stack(parts).cumsum(0)
    out_nNMH = summed_nNMh[..., :H] / summed_nNMh[..., H:]
    return out_nNMH - out_nNMH[-1:]


def _kept(context: int, at_M: Tensor) -> Tensor:
    """[M, T]: as the how-maniest newest token a query has each of the tokens. While the context is repeated, those of the
    repetition stay, and others count back from its end."""
    token_T = torch.arange(2 * context, device=at_M.device)
    end_M1 = at_M[:, None].clamp_max(context - 1)
    return torch.where(token_T >= context, 0, end_M1 + 1 - token_T).clamp_min(0)


def _weights(layer: AttentionLayer, q_NMH: Tensor, k_KTH: Tensor, at_M: Tensor) -> Tensor:
    """[N, M, T]: attention before it is divided by its sum."""
    N, M, H = q_NMH.shape
    K, T, _ = k_KTH.shape
    scores_NMT = (q_NMH.reshape(K, -1, H) @ k_KTH.transpose(1, 2) * layer.scaling).view(N, M, T)
    if layer.softcap is not None:
        scores_NMT = layer.softcap * torch.tanh(scores_NMT / layer.softcap)
    if layer.alibi:
        slopes_N = torch.tensor([alibi_slope(n, N) for n in range(N)]).to(q_NMH)
        scores_NMT = scores_NMT + slopes_N[:, None, None] * torch.arange(T).to(q_NMH)
    scores_NMT = scores_NMT.masked_fill(torch.arange(T, device=at_M.device) > at_M[:, None], -math.inf)
    return (scores_NMT - scores_NMT.amax(-1, keepdim=True)).exp()


def _sum_over(weights_NMT: Tensor, values_KTh: Tensor) -> Tensor:
    """[N, M, h]."""
    N, M, T = weights_NMT.shape
    return (weights_NMT.reshape(len(values_KTh), -1, T) @ values_KTh).view(N, M, -1)
