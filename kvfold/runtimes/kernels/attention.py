"""Attention over stored heads: the obvious way (`grouped_attention`) and the fast ways that are compared with it.

Keys z [B, C, S, R] and values y [B, U, S, V] may differ in head count and width; C and U divide the N query heads, and
nothing is ever expanded to N heads. Queries q [B, N, T, R] are already absorbed. Results are [B, T, N, V]. `sinks`: sinks.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvfold.plan.number_format import tokens_at_once
from kvfold.runtimes.kernels import cpu_decode, gpu_decode
from kvfold.runtimes.kernels.packed_tokens import Operand, Stored
from kvfold.runtimes.kernels.sinks import beside_sinks, sink_tokens, with_sinks

LARGEST_CODE = 128

Piece = Callable[[int, int], Operand]
"""(start, end) -> the heads of these tokens."""


def grouped_attention(
    q_BNTR: Tensor,
    z_BCSR: Tensor,
    y_BUSV: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Any widths and head counts, by two matrix products. Returns the output and the probabilities [B, N, T, S]."""
    B, N, T, R = q_BNTR.shape
    C, S = z_BCSR.shape[1:3]
    U, V = y_BUSV.shape[1], y_BUSV.shape[3]
    queries = (q_BNTR * scale).reshape(B, C, N // C * T, R)
    scores_BNTS = (queries @ z_BCSR.transpose(2, 3)).view(B, N, T, S)
    if softcap is not None:
        scores_BNTS = softcap * torch.tanh(scores_BNTS / softcap)
    probs_BNTS = softmax(scores_BNTS, mask, sinks)
    used = F.dropout(probs_BNTS, dropout) if dropout else probs_BNTS
    out_BNTV = (used.reshape(B, U, N // U * T, S) @ y_BUSV).view(B, N, T, V)
    return out_BNTV.transpose(1, 2), probs_BNTS


def one_query_attention(q_BN1R: Tensor, z_BCSR: Tensor, y_BCSR: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """One query token, keys and values alike in heads and width: torch's fused kernel, where the queries of a stored head
    become the rows of one product."""
    B, N, _, R = q_BN1R.shape
    C = z_BCSR.shape[1]
    packed = q_BN1R.view(B, C, N // C, R)
    if mask is not None and mask.shape[1] == N > 1:  # one mask per query head
        mask = mask.expand(B, -1, -1, -1).view(B, C, N // C, -1)
    with _without_cudnn(q_BN1R):
        out = F.scaled_dot_product_attention(packed, z_BCSR, y_BCSR, attn_mask=mask, scale=scale)
    return out.reshape(B, N, 1, R).transpose(1, 2)


def _without_cudnn(q: Tensor) -> AbstractContextManager[None]:
    """cuDNN plans anew for every length of a cache: 50 ms of each step on an H200 with torch 2.11, 0.1 ms without it."""
    if not q.is_cuda:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def kernels_for(q: Tensor) -> ModuleType:
    """Those of its device, `cpu_decode` or `gpu_decode`, which are called alike."""
    return gpu_decode if q.is_cuda else cpu_decode


def kernel_attention(
    q_BNTR: Tensor,
    z: Stored,
    y: Stored,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rebuild: cpu_decode.Rebuild | None = None,
    map: cpu_decode.ValueMap | None = None,
) -> Tensor:
    """Few query tokens over numbers or packed ones that the device's kernels serve, which never exist as numbers; `rebuild`
    says how keys are made of them on read, `map` how values are made of averages (on a CPU)."""
    T, S, kernels = q_BNTR.shape[2], z.shape[2], kernels_for(q_BNTR)
    bias = additive(mask, T, S, 0, S, q_BNTR)
    added = None if bias is None else bias.float()
    part = kernels.decode_part(q_BNTR, z, y, added, scale=scale, softcap=softcap, rebuild=rebuild)
    return beside_sinks(kernels.values_of([part], y.shape[3], q_BNTR.dtype, map), [part.log_sums], sinks)


def products_attention(q_BN1R: Tensor, z_BCSR: Tensor, y_BUSV: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """One query token, by two matrix products per stored head."""
    # On the CPU a batched half-precision product over a view of a larger buffer copies the buffer first; mm does not.
    B, N, _, R = q_BN1R.shape
    C, S = z_BCSR.shape[1:3]
    U, V = y_BUSV.shape[1], y_BUSV.shape[3]
    queries = (q_BN1R * scale).view(B, C, N // C, R)
    scores = queries.new_empty(B, C, N // C, S)
    out = queries.new_empty(B, U, N // U, V)
    for b in range(B):
        for c in range(C):
            torch.mm(queries[b, c], z_BCSR[b, c].T, out=scores[b, c])
    probs = softmax(scores.view(B, N, 1, S), mask).view(B, U, N // U, S)
    for b in range(B):
        for u in range(U):
            torch.mm(probs[b, u], y_BUSV[b, u], out=out[b, u])
    return out.view(B, N, 1, V).transpose(1, 2)


def chunked_attention(
    q_BNTH: Tensor,
    keys: Piece,
    values: Piece,
    tokens: int,
    mask: Tensor | None,
    *,
    elements: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Query tokens over `tokens` keys and values made piece by piece. elements: the most of a side, per token and row.

    Running maximum and sum, as in flash attention: equal to `grouped_attention` over all keys at once, but for rounding.
    """
    B, N, T, _ = q_BNTH.shape
    running = RunningSoftmax(q_BNTH)
    step = tokens_at_once(B * max(elements, N * T), q_BNTH.device.type)
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        scores = scores_of(q_BNTH * scale, keys(start, end))
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        part = additive(mask, T, tokens, start, end, q_BNTH)
        running.add(scores if part is None else scores + part, values(start, end))
    return running.result(sinks)


class RunningSoftmax:
    """Softmax and weighted sum over pieces that come one after the other. width: of the sum, where some values are only its
    first or its last numbers."""

    def __init__(self, q_BNTH: Tensor, width: int | None = None) -> None:
        self.width = width
        B, N, T, _ = q_BNTH.shape
        self.dtype, precise = q_BNTH.dtype, exact(q_BNTH)
        self.largest = torch.full((B, N, T, 1), torch.finfo(precise).min, dtype=precise, device=q_BNTH.device)
        self.total = torch.zeros_like(self.largest)
        self.out: Tensor | None = None

    def add(self, scores_BNTs: Tensor, values_BUsV: Operand, *, last: bool = False) -> None:
        highest = torch.maximum(self.largest, scores_BNTs.amax(-1, keepdim=True))
        shrink, weights = (self.largest - highest).exp(), (scores_BNTs - highest).exp()
        new = weighted(weights, values_BUsV, self.dtype)
        if self.width is not None and (beside := self.width - new.shape[-1]):
            new = F.pad(new, (beside, 0) if last else (0, beside))
        self.largest = highest
        if self.out is None:
            self.out = new
        elif torch.is_grad_enabled():
            self.out = self.out * shrink + new
        else:  # of a long prompt these are the largest tensors that exist
            self.out = new.add_(self.out.mul_(shrink))
        self.total = self.total * shrink + weights.sum(-1, keepdim=True)

    def result(self, sinks: Tensor | None = None) -> Tensor:
        """[B, T, N, V]."""
        assert self.out is not None, "a query sees at least itself"
        log_sums_BNT = [] if sinks is None else [(self.largest + self.total.log())[..., 0]]
        return beside_sinks((self.out / self.total).transpose(1, 2), log_sums_BNT, sinks).to(self.dtype)


def scores_of(q_BNTH: Tensor, keys: Operand) -> Tensor:
    """q . k [B, N, T, s], in float32 at least."""
    B, N, T, _ = q_BNTH.shape
    if isinstance(keys, Tensor):
        rows = q_BNTH.reshape(B, keys.shape[1], -1, keys.shape[3])
        return (rows @ keys.transpose(2, 3)).reshape(B, N, T, -1).to(exact(q_BNTH))
    C, total, at = keys[0].codes.shape[1], torch.zeros((), dtype=exact(q_BNTH), device=q_BNTH.device), 0
    for codes, scale in keys:
        # codes are up to 128: what is divided by that here keeps products of half precision in range
        rows = q_BNTH[..., at : at + codes.shape[3]].reshape(B, C, N // C * T, -1) / LARGEST_CODE
        at += codes.shape[3]
        half = rows.sum(-1, keepdim=True, dtype=total.dtype) / 2
        products = (rows @ codes.transpose(2, 3)).to(total.dtype) + half
        total = total + products * (LARGEST_CODE * scale).transpose(2, 3)
    return total.reshape(B, N, T, -1)


def weighted(weights_BNTs: Tensor, values: Operand, dtype: torch.dtype) -> Tensor:
    """sum_s w_s v_s [B, N, T, V], in float32 at least; products are taken in `dtype`."""
    B, N, T, s = weights_BNTs.shape
    if isinstance(values, Tensor):
        rows = weights_BNTs.reshape(B, values.shape[1], -1, s)
        return (rows.to(dtype) @ values).to(weights_BNTs.dtype).reshape(B, N, T, -1)
    rows, parts = weights_BNTs.reshape(B, values[0].codes.shape[1], -1, s), []
    for codes, scale in values:
        largest = scale.amax(2, keepdim=True)  # small weights times small scales would vanish in half precision
        scaled = rows * (scale / largest).transpose(2, 3)
        half = scaled.sum(-1, keepdim=True) / 2
        parts.append(((scaled.to(dtype) @ codes).to(weights_BNTs.dtype) + half) * largest)
    return torch.cat(parts, dim=-1).reshape(B, N, T, -1)


def additive(mask: Tensor | None, T: int, S: int, start: int, end: int, like: Tensor) -> Tensor | None:
    """A piece of any of the masks as numbers to add, finite so that a row or a piece of padding stays a number."""
    lowest = torch.finfo(like.dtype).min
    if mask is None and T == 1:
        return None
    if mask is None:
        seen = torch.arange(start, end, device=like.device) <= torch.arange(S - T, S, device=like.device)[:, None]
    elif mask.dtype == torch.bool:
        seen = mask[..., start:end]
    else:
        return mask[..., start:end].clamp_min(lowest)
    return torch.zeros(seen.shape, dtype=exact(like), device=like.device).masked_fill(~seen, lowest)


def additive_rows(mask: Tensor | None, T: int, S: int, first: int, last: int, like: Tensor) -> Tensor | None:
    """Of queries first:last out of T what is added to their scores; none where they see all that came before them."""
    if mask is not None:
        return additive(mask[..., first:last, :], last - first, S, 0, S, like)
    seen = S - T + last
    return additive(None, last - first, seen, 0, seen, like)


def mask_of(
    hidden_BTD: Tensor, mask: Tensor | None, alibi: Tensor | None, position_bias: Tensor | None, heads: int
) -> Tensor | None:
    """One mask out of what a family hands over: alibi of a batch beside a mask to add, or a bias of positions [N, 1, tokens],
    of which the last is the newest key's, beside a mask [B, 1, T, S] of what is not seen."""
    if position_bias is None:
        return with_alibi(mask, alibi, heads)
    assert mask is not None, "such families always make one"
    distance_S = torch.arange(1 - mask.shape[-1], 1, device=mask.device)
    slopes_N11 = -position_bias[:, :, -2:-1]
    bias_NTS = (slopes_N11 * distance_S).to(hidden_BTD.dtype)
    return bias_NTS.where(~mask, torch.finfo(hidden_BTD.dtype).min)


def with_alibi(mask: Tensor | None, alibi: Tensor | None, heads: int) -> Tensor | None:
    """Alibi [B*N, 1, S] and a mask of numbers to add (or none) as one mask [B, N, T, S]."""
    if alibi is None:
        return mask
    bias_BN1S = alibi.unflatten(0, (-1, heads))
    if mask is None:
        return bias_BN1S
    # a masked score stays the lowest number: adding to it could overflow to infinity, and a row of infinities is no number
    return (bias_BN1S + mask).clamp_min(torch.finfo(bias_BN1S.dtype).min)


def prefill_attention(
    q_BNTR: Tensor,
    k_BKSR: Tensor,
    y_BUSV: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Many query tokens: torch's fused kernel, on heads and widths made equal for the duration of this call."""
    if sinks is not None:
        q_BNTR, k_BKSR, y_BUSV, mask = sink_tokens(q_BNTR, k_BKSR, y_BUSV, mask, sinks, scale)
    N, T = q_BNTR.shape[1:3]
    K, U, V = k_BKSR.shape[1], y_BUSV.shape[1], y_BUSV.shape[3]
    # with a mask, torch shares heads between queries only in its slow kernel; transformers repeats them there as well
    heads = N if mask is not None else K if K % U == 0 else U if U % K == 0 else N
    k_BKSR, y_BUSV = repeat_heads(k_BKSR, heads), repeat_heads(y_BUSV, heads)
    q, k, v = as_wide(q_BNTR, k_BKSR, y_BUSV)
    causal = mask is None and T > 1
    assert not causal or k.shape[2] == T, "a prompt that continues a cache needs a mask"
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=heads != N
    )
    return out[..., :V].transpose(1, 2)


def as_wide(*heads: Tensor) -> list[Tensor]:
    """Heads whose last numbers are 0 where others have more, as torch's fused kernels want them."""
    width = max(x.shape[-1] for x in heads)
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in heads]


def repeat_heads(x_BCSR: Tensor, heads: int) -> Tensor:
    """Each head as often in a row as queries read it."""
    repeats = heads // x_BCSR.shape[1]
    return x_BCSR if repeats == 1 else x_BCSR.repeat_interleave(repeats, dim=1)


def softmax(scores_BNTS: Tensor, mask: Tensor | None, sinks: Tensor | None = None) -> Tensor:
    """Softmax in float32 under a mask: None (causal), bool (True = seen) or additive."""
    T, S = scores_BNTS.shape[2:]
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=scores_BNTS.device).tril(S - T)
    if mask is not None and mask.dtype == torch.bool:
        scores_BNTS = scores_BNTS.masked_fill(~mask, torch.finfo(scores_BNTS.dtype).min)
    elif mask is not None:
        scores_BNTS = scores_BNTS + mask
    probs = with_sinks(scores_BNTS, sinks).softmax(dim=-1, dtype=exact(scores_BNTS))
    return probs[..., :S].to(scores_BNTS.dtype)


def exact(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)
