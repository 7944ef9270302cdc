"""What it costs a head to forget tokens, in nats, as a curve over how many it keeps.

Ordinary text hardly looks back: what some heads are needed for shows where a text is repeated. A sequence here is a context
and its passages once more, in another order, so that each has to be found again. Heads that find what stood where need it at
every distance up to the whole context. Of queries of either half, d_q is what the output of a head changes by when of the
context only the first tokens and the newest n stay, and g_q the gradient of sampled labels by that output: half the mean of
(g_q . d_q)^2 is what forgetting costs, to second order (linalg/sensitivity.py), comparable between all heads of all layers.

Where a scorer chooses what of a prompt stays, the context is that prompt, and the repetition what is asked behind it; of
ordinary text, the first half of the context is the prompt, and the second half what follows it. Where it is foreseen what
tokens are worth, that is fitted first (foresight.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from kvfold import distributed as processes
from kvfold import registry
from kvfold.calibration.calibrate import own_sequences
from kvfold.calibration.cross_moments import CrossMoments
from kvfold.calibration.foresight import Foresight, turned_out
from kvfold.calibration.layerwise_model import StreamedModel
from kvfold.calibration.passes import Passes, layer_file
from kvfold.calibration.statistics import Seen
from kvfold.checkpoint.atomic import make_folder, write_tensors
from kvfold.checkpoint.fingerprint import fingerprint
from kvfold.checkpoint.source import Source, read_layer, source_dtype
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.token_runs import FORESEEN
from kvfold.runtimes.reference import alibi_slope
from kvfold.runtimes.scorers.base import Prompt, Scorer

FORGETTING_VERSION = 9
"""To be raised when curves are computed differently, so that old ones on disk are not taken for new ones."""

SHARES = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Of the context, for which curves have points."""
KINDS = ("ordinary", "repeated", "missed")
"""Of curves, in a file."""
PASSAGE = 32
"""Tokens that are repeated in a row."""
QUERIES = 128
"""Of each repetition: every so-manieth."""

Output = Callable[[], Tensor]
"""Gives [D, N, H]: how values of every head come into the residual stream."""
States = tuple[Tensor, Tensor, Tensor]
"""q, k and v of one sequence [heads, T, H]."""


@dataclass(frozen=True)
class Forgetting:
    """Of every layer, key/value head and share (SHARES): nats per token, of ordinary text and of text that is repeated;
    smaller shares never cost less. missed_LCn: what tokens that would be dropped are worth by the scorer's own count, per
    context, where one chooses. worth_LCD: what says of a layer's input what a token will be worth, where that decides."""

    ordinary_LCn: Tensor
    repeated_LCn: Tensor
    missed_LCn: Tensor | None = None
    worth_LCD: Tensor | None = None

    def nats_LCn(self, recall: float) -> Tensor:
        """Both together. recall: what repeated text counts beside ordinary text."""
        return self.ordinary_LCn + recall * self.repeated_LCn


@dataclass(frozen=True)
class Choice:
    """A scorer, by name, or what is foreseen chooses what of a prompt stays, besides the first tokens and so many of the
    newest."""

    rule: str
    newest: int


class _Curves:
    """Gathers the curves of one layer."""

    def __init__(self, layer: AttentionLayer, sinks: int, choice: Choice | None, output: Output) -> None:
        self.layer, self.sinks, self.choice, self.output = layer, sinks, choice, output
        self.sum_kCn = torch.zeros(1, layer.num_kv_heads, len(SHARES), dtype=torch.float64)
        self.rows = 0
        self.worth_CD: Tensor | None = None

    def __call__(self, seen: Seen) -> None:
        assert seen.out_gradient is not None and seen.hidden is not None, "gradients are seen on the way down"
        gradient = seen.out_gradient.unflatten(2, (self.layer.num_attention_heads, -1)).transpose(1, 2)
        for q, k, v, g, hidden in zip(seen.q, seen.k, seen.v, gradient, seen.hidden, strict=True):
            self.see((q, k, v), g, hidden)

    def see(self, states: States, gradient_NTH: Tensor, hidden_TD: Tensor) -> None:
        """One sequence."""
        self._add(costs(self.layer, *states, gradient_NTH, self.sinks, self.choice, self.output))

    def _add(self, found_kCn: Tensor) -> None:
        self.sum_kCn = self.sum_kCn.to(found_kCn.device) + found_kCn
        self.rows += 1

    def gather(self) -> None:
        """Finish, with what other processes saw."""
        rows = processes.summed(torch.tensor(float(self.rows), device=self.sum_kCn.device))
        self.sum_kCn = (processes.summed(self.sum_kCn) / rows).cpu()


class _Foreseen(_Curves):
    """The same where a map of the layer's input chooses, which is fitted to all sequences before any is weighed."""

    def __init__(self, layer: AttentionLayer, sinks: int, choice: Choice | None, output: Output) -> None:
        super().__init__(layer, sinks, choice, output)
        self.foresight, self.held = Foresight(layer), list[tuple[States, Tensor, Tensor]]()

    def see(self, states: States, gradient_NTH: Tensor, hidden_TD: Tensor) -> None:
        S = len(hidden_TD) // 2
        worth_KS = turned_out(_prompt(self.layer, states, S, S, 2 * S, self.output))
        ordinary = slice(self.sinks, S)  # the first tokens always stay
        self.foresight.see(hidden_TD[ordinary], worth_KS[:, ordinary])
        self.held.append((states, gradient_NTH, hidden_TD[:S]))

    def gather(self) -> None:
        self.worth_CD = self.foresight.gather()
        for states, gradient_NTH, hidden_SD in self.held:
            worth_CS = self.worth_CD.to(hidden_SD) @ hidden_SD.T
            self._add(costs(self.layer, *states, gradient_NTH, self.sinks, self.choice, self.output, worth_CS))
        self.held.clear()
        super().gather()


def forgetting(
    source: Source,
    contexts_BT: Tensor,
    *,
    run_dir: Path,
    device: str,
    seed: int = 0,
    sinks: int = 4,
    choice: Choice | None = None,
) -> Forgetting:
    """Curves of all layers from the contexts and their repetitions; kept in `run_dir`. One layer is in memory at a time.
    choice: how tokens are chosen; without it the newest stay."""
    made: dict[str, Any] = {"seed": seed, "sinks": sinks} | (dataclasses.asdict(choice) if choice else {})
    key = fingerprint(version=FORGETTING_VERSION, model=source.checkpoint.fingerprint(), tokens=contexts_BT, **made)
    folder = run_dir / f"forgetting-{key[:12]}"
    file = folder / "curves.safetensors"
    if not file.exists():
        make_folder(folder)
        _measure(source, with_repetition(contexts_BT, seed), folder, device, seed, sinks, choice)
        if not processes.rank():
            curves = [load_file(layer_file(folder, layer.index)) for layer in source.layers]
            lost_kLCn = torch.stack([seen["sum"] for seen in curves], dim=1).flip(-1).cummax(-1).values.flip(-1)
            kinds = {kind: lost_LCn.clone() for kind, lost_LCn in zip(KINDS, lost_kLCn, strict=False)}
            worth = [seen["worth"] for seen in curves if "worth" in seen]
            write_tensors(file, kinds | ({"worth": torch.stack(worth)} if worth else {}), {})
            for layer in source.layers:
                layer_file(folder, layer.index).unlink()
        processes.wait_for_all()
    found = load_file(file)
    return Forgetting(found["ordinary"], found["repeated"], found.get("missed"), found.get("worth"))


def with_repetition(contexts_BT: Tensor, seed: int = 0) -> Tensor:
    """[B, 2 T]: each context, and its passages in another order."""
    generator = torch.Generator().manual_seed(seed)
    repeated = []
    for context_T in contexts_BT:
        passages = context_T.split(PASSAGE)
        order = torch.randperm(len(passages), generator=generator).tolist()
        repeated.append(torch.cat([passages[i] for i in order]))
    return torch.cat([contexts_BT, torch.stack(repeated)], dim=1)


def _measure(
    source: Source, tokens_BT: Tensor, folder: Path, device: str, seed: int, sinks: int, choice: Choice | None
) -> None:
    """Write the curves of every layer, one after the other."""
    model = StreamedModel(source.checkpoint, source.arch, device, outputs=True)
    dtype = getattr(torch, source_dtype(source.checkpoint, source.arch, model.layers[0]))
    passes = Passes(model, own_sequences(tokens_BT), folder, CrossMoments(frozenset(), frozenset()), dtype)
    draws_BT = torch.rand(tokens_BT.shape, generator=torch.Generator().manual_seed(seed))

    def keep(seen: _Curves) -> None:
        seen.gather()
        worth = {} if seen.worth_CD is None else {"worth": seen.worth_CD.cpu().contiguous()}
        if not processes.rank():
            write_tensors(layer_file(folder, seen.layer.index), {"sum": seen.sum_kCn.contiguous()} | worth, {})

    def curves_of(layer: AttentionLayer) -> _Curves:
        @functools.cache
        def output_DNH() -> Tensor:
            o_proj = read_layer(source.checkpoint, source.arch, layer).o_proj.to(device, torch.float32)
            return o_proj.unflatten(1, (layer.num_attention_heads, -1))

        kind = _Foreseen if choice and choice.rule == FORESEEN else _Curves
        return kind(layer, sinks, choice, output_DNH)

    passes.down(curves_of, keep, own_sequences(draws_BT))
    passes.forget()
    processes.wait_for_all()


def costs(
    layer: AttentionLayer,
    q_NTH: Tensor,
    k_KTH: Tensor,
    v_KTH: Tensor,
    gradient_NTH: Tensor,
    sinks: int,
    choice: Choice | None = None,
    output: Output | None = None,
    worth_KS: Tensor | None = None,
) -> Tensor:
    """[2 or 3, K, n] of one sequence, of which the second half repeats the first: of queries of the first half, of the
    second, and, where there is a choice, what is missed (`_missed`). n counts SHARES. output: where there is a choice, gives
    how values come into the residual stream. worth_KS: what tokens of the first half were said to be worth, where that
    chooses."""
    S, K = k_KTH.shape[1] // 2, layer.num_kv_heads
    found = []
    for start, end in ((S // 2, S), (S, 2 * S)):
        at_M = torch.arange(start, end, max((end - start) // QUERIES, 1), device=q_NTH.device)
        states = (q_NTH[:, :end], k_KTH[:, :end], v_KTH[:, :end])
        if choice is None:
            needed, context = _since(S, at_M, end)[None], S
        else:
            assert output is not None, "a choice may ask for it"
            states_of_all = (q_NTH, k_KTH, v_KTH)
            worth = _scored(layer, states_of_all, start, choice, output) if worth_KS is None else worth_KS[:, :start]
            ranks, context = _ranked(worth, choice.newest, sinks), start
            needed = F.pad(ranks, (0, end - start))[:, None]
        change_nNMH = _changes(layer, states[0][:, at_M], *states[1:], at_M, needed, context, sinks)
        felt_nNM = (change_nNMH * gradient_NTH[:, at_M]).sum(-1, dtype=torch.float64)
        felt_nKM = felt_nNM.unflatten(1, (K, -1)).sum(2)  # the queries of a head miss the same tokens
        found.append(felt_nKM.square().mean(-1).T / 2)
    if choice is not None:  # of the whole context, which was the last prompt
        found.append(_missed(worth, ranks, sinks))
    return torch.stack(found)


def _missed(worth_KT: Tensor, ranks_KT: Tensor, sinks: int) -> Tensor:
    """[K, n]: what tokens of a prompt that do not stay are worth in sum, above the least of the layer's. Where its heads
    compete for tokens, those with the most to miss get them (Ada-KV, arXiv 2407.11550)."""
    above_KT = worth_KT.double() - worth_KT.double().min()
    dropped_nKT = torch.stack([ranks_KT > _room(share, worth_KT.shape[1], sinks) for share in SHARES])
    return (above_KT * dropped_nKT).sum(-1).T


def _room(share: float, context: int, sinks: int) -> float:
    """For tokens besides the first ones."""
    return max(share * context - sinks, 0) if share < 1 else math.inf


def _changes(
    layer: AttentionLayer, q_NMH: Tensor, k_KTH: Tensor, v_KTH: Tensor, at_M: Tensor, needed: Tensor, context: int, sinks: int
) -> Tensor:  # fmt: skip
    """[n, N, M, H]: how the outputs of queries change where of the context its first tokens stay, and others up to the share.
    needed: [K or 1, M or 1, T], how many of these stay where a token does; 0 for those that always do."""
    H, T = q_NMH.shape[2], k_KTH.shape[1]
    weights_NMT = _weights(layer, q_NMH, k_KTH, at_M)
    values_KTh = torch.cat([v_KTH, torch.ones_like(v_KTH[..., :1])], dim=2)
    needed = torch.where(torch.arange(T, device=at_M.device) < sinks, 0, needed)
    group = 1 if len(needed) == 1 else len(q_NMH) // len(needed)
    parts, seen = [], torch.zeros_like(needed, dtype=torch.bool)
    for share in SHARES:
        more = (needed <= _room(share, context, sinks)) & ~seen
        parts.append(_sum_over(weights_NMT * more.repeat_interleave(group, dim=0), values_KTh))
        seen |= more
    summed_nNMh = torch.stack(parts).cumsum(0)
    out_nNMH = summed_nNMh[..., :H] / summed_nNMh[..., H:].clamp_min(1e-30)  # all may be gone
    return out_nNMH - out_nNMH[-1:]


def _scored(layer: AttentionLayer, states: States, T: int, choice: Choice, output: Output) -> Tensor:
    """[K, T]: what a scorer says of the first T tokens. Where it wants a second reading, the repetition is that."""
    rule: Scorer = registry.load("scorers", choice.rule)()
    first, end = (states[0].shape[1] // 2, states[0].shape[1]) if rule.repeats else (0, T)
    return rule.score(_prompt(layer, states, T, first, end, output))[0, :, :T]


def _prompt(layer: AttentionLayer, states: States, T: int, first: int, end: int, output: Output) -> Prompt:
    """The first T tokens, of which the queries of the tokens first:end see those up to their own."""
    q_NTH, k_KTH, v_KTH = states[0][:, first:end], *(x[:, :end] for x in states[1:])

    def seen(rows: slice) -> Tensor:
        at_S, at_Q = torch.arange(end, device=q_NTH.device), torch.arange(first, end, device=q_NTH.device)[rows]
        mask_QS = torch.zeros(len(at_Q), end).to(q_NTH).masked_fill(at_S > at_Q[:, None], torch.finfo(q_NTH.dtype).min)
        return mask_QS[None, None] if not layer.alibi else (mask_QS + _alibi(layer, at_S)[:, None])[None]

    return Prompt(
        layer=layer, queries_BnTH=q_NTH[None], absorb=lambda q: q, keys_BCSR=k_KTH[None], values_BCSV=v_KTH[None],
        seen=seen, first_B=torch.zeros(1, dtype=torch.long, device=q_NTH.device), output=output, again=end - T,
    )  # fmt: skip


def _ranked(worth_KT: Tensor, newest: int, sinks: int) -> Tensor:
    """[K, T]: as the how-maniest of the tokens each head keeps it: the newest come first, then what is worth most; 0 for the
    first tokens, which always stay."""
    T, worth_KT = worth_KT.shape[1], worth_KT.float().clone()
    newest, back_T = min(newest, T), T - torch.arange(T, device=worth_KT.device)
    worth_KT[:, :sinks] = worth_KT[:, T - newest :] = -torch.inf
    rank_KT = worth_KT.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    first_T = torch.arange(T, device=worth_KT.device) < sinks
    return torch.where(back_T <= newest, back_T, rank_KT + newest + 1).masked_fill(first_T, 0)


def _since(context: int, at_M: Tensor, tokens: int) -> Tensor:
    """[M, T]: as the how-maniest newest token a query has each of the tokens. While the context is repeated, those of the
    repetition stay, and others count back from its end."""
    token_T = torch.arange(tokens, device=at_M.device)
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
        scores_NMT = scores_NMT + _alibi(layer, torch.arange(T, device=at_M.device)).to(q_NMH)[:, None]
    scores_NMT = scores_NMT.masked_fill(torch.arange(T, device=at_M.device) > at_M[:, None], -math.inf)
    return (scores_NMT - scores_NMT.amax(-1, keepdim=True)).exp()


def _alibi(layer: AttentionLayer, token_T: Tensor) -> Tensor:
    """[N, T], to add to scores."""
    heads = layer.num_attention_heads
    slopes_N = torch.tensor([alibi_slope(n, heads) for n in range(heads)], device=token_T.device)
    return slopes_N[:, None] * token_T


def _sum_over(weights_NMT: Tensor, values_KTh: Tensor) -> Tensor:
    """[N, M, h]."""
    N, M, T = weights_NMT.shape
    return (weights_NMT.reshape(len(values_KTh), -1, T) @ values_KTh).view(N, M, -1)
