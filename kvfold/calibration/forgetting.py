"""What it costs a head to forget tokens, in nats, as a curve over how many it keeps.

Ordinary text hardly looks back: what a head is needed for shows where a text is repeated. A sequence here is a context and
the same context once more. While it is repeated, heads that find what stood where it stood before need it at every distance
up to the whole context. Of queries there, d_q is what the output of a head changes by when only the first tokens of the
context and its newest n stay, and g_q the gradient of sampled labels by that output: half the mean of (g_q . d_q)^2 is what
forgetting costs, to second order (linalg/sensitivity.py), comparable between all heads of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvfold import distributed as processes
from kvfold.calibration.cross_moments import CrossMoments
from kvfold.calibration.layerwise_model import StreamedModel
from kvfold.calibration.passes import Passes
from kvfold.calibration.statistics import Seen
from kvfold.checkpoint.atomic import make_folder, write_tensors
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.source import Source, source_dtype
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.reference import alibi_slope

FORGETTING_VERSION = 1
"""To be raised when curves are computed differently, so that old ones on disk are not taken for new ones."""

SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Of the context, for which curves have points."""
QUERIES = 128
"""Of each repetition: every so-manieth."""


@dataclass(frozen=True)
class Forgetting:
    """`nats_LCn`: of every layer, key/value head and share (SHARES); smaller shares never cost less."""

    nats_LCn: Tensor


class _Curves:
    """Gathers the curves of one layer."""

    def __init__(self, layer: AttentionLayer, sinks: int) -> None:
        self.layer, self.sinks = layer, sinks
        self.sum_Cn = torch.zeros(layer.num_kv_heads, len(SHARES), dtype=torch.float64)
        self.rows = 0

    def __call__(self, seen: Seen) -> None:
        assert seen.out_gradient is not None, "gradients are seen on the way down"
        gradient = seen.out_gradient.unflatten(2, (self.layer.num_attention_heads, -1)).transpose(1, 2)
        for q, k, v, g in zip(seen.q, seen.k, seen.v, gradient, strict=True):
            self.sum_Cn += costs(self.layer, q, k, v, g, self.sinks).cpu()
            self.rows += 1

    def gather(self) -> None:
        rows = processes.summed(torch.tensor(float(self.rows)))
        self.sum_Cn = processes.summed(self.sum_Cn) / rows


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
        nats_LCn = _measured(source, contexts_BT.repeat(1, 2), folder, device, seed, sinks)
        if not processes.rank():
            write_tensors(file, {"nats": nats_LCn}, {})
        processes.wait_for_all()
    return Forgetting(load_file(file)["nats"])


def _measured(source: Source, tokens_BT: Tensor, folder: Path, device: str, seed: int, sinks: int) -> Tensor:
    model = StreamedModel(source.checkpoint, source.arch, device, outputs=True)
    dtype = getattr(torch, source_dtype(source.checkpoint, source.arch, model.layers[0]))
    own = slice(processes.rank(), None, processes.world_size())
    passes = Passes(model, tokens_BT[own], folder, CrossMoments(frozenset(), frozenset()), dtype)
    draws_BT = torch.rand(tokens_BT.shape, generator=torch.Generator().manual_seed(seed))
    curves: dict[int, Tensor] = {}

    def keep(seen: _Curves) -> None:
        seen.gather()
        curves[seen.layer.index] = seen.sum_Cn

    passes.down(lambda layer: _Curves(layer, sinks), keep, draws_BT[own])
    passes.forget()
    nats_LCn = torch.stack([curves[layer] for layer in sorted(curves)])
    return nats_LCn.flip(-1).cummax(-1).values.flip(-1)


def costs(
    layer: AttentionLayer, q_NTH: Tensor, k_KTH: Tensor, v_KTH: Tensor, gradient_NTH: Tensor, sinks: int
) -> Tensor:
    """[K, n] of one sequence, of which the second half repeats the first; n counts SHARES."""
    S, K = k_KTH.shape[1] // 2, layer.num_kv_heads
    at = torch.arange(S, 2 * S, max(S // QUERIES, 1), device=q_NTH.device)
    change_nNMH = _changes(layer, q_NTH[:, at], k_KTH, v_KTH, at, sinks)
    felt_nNM = (change_nNMH * gradient_NTH[:, at]).sum(-1, dtype=torch.float64)
    felt_nKM = felt_nNM.unflatten(1, (K, -1)).sum(2)  # the queries of a head miss the same tokens
    return felt_nKM.square().mean(-1).T / 2


def _changes(layer: AttentionLayer, q_NMH: Tensor, k_KTH: Tensor, v_KTH: Tensor, at_M: Tensor, sinks: int) -> Tensor:
    """[n, N, M, H]: how the outputs of queries change where of the context its first tokens and its newest stay."""
    N, M, H = q_NMH.shape
    K, T, _ = k_KTH.shape
    scores_KmT = (q_NMH.reshape(K, -1, H) @ k_KTH.transpose(1, 2) * layer.scaling).view(N, M, T)
    if layer.softcap is not None:
        scores_KmT = layer.softcap * torch.tanh(scores_KmT / layer.softcap)
    if layer.alibi:
        slopes_N = torch.tensor([alibi_slope(n, N) for n in range(N)]).to(q_NMH)
        scores_KmT = scores_KmT + slopes_N[:, None, None] * torch.arange(T).to(q_NMH)
    later = torch.arange(T, device=at_M.device) > at_M[:, None]
    weights_NMT = (scores_KmT - scores_KmT.amax(-1, keepdim=True)).masked_fill(later, -math.inf).exp()
    values = torch.cat([v_KTH, torch.ones_like(v_KTH[..., :1])], dim=2)
    parts = [_sum_over(weights_NMT, values, start, end) for start, end in _pieces(T // 2, sinks)]
    kept = parts[-1]  # the first tokens and those of the repetition
    whole = torch.stack(parts).sum(0)
    found = []
    for newer in parts[:-1]:
        kept = kept + newer
        found.append(kept[..., :H] / kept[..., H:] - whole[..., :H] / whole[..., H:])
    return torch.stack(found)


def _sum_over(weights_NMT: Tensor, values_KTh: Tensor, start: Sequence[int], end: Sequence[int]) -> Tensor:
    """[N, M, h] over the tokens of some stretches."""
    total: Tensor | float = 0.0
    for first, last in zip(start, end, strict=True):
        rows_KmS = weights_NMT[..., first:last].unflatten(0, (len(values_KTh), -1)).flatten(1, 2)
        total = total + (rows_KmS @ values_KTh[:, first:last]).view(*weights_NMT.shape[:2], -1)
    assert isinstance(total, Tensor), "a stretch at least"
    return total


def _pieces(context: int, sinks: int) -> list[tuple[list[int], list[int]]]:
    """Starts and ends of what each share keeps more than the one before it, from the newest tokens on; last what all keep."""
    bounds = [max(context - max(round(share * context) - sinks, 0), sinks) for share in SHARES]
    bounds[-1] = sinks
    newer = [([start], [end]) for start, end in zip(bounds, [context, *bounds[:-1]], strict=True)]
    return [*newer, ([0, context], [sinks, 2 * context])]
