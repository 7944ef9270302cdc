"""Many queries over the source's heads in two forms: each sees its newest tokens finely, others as stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.runtimes.kernels.aged_attention import QUERIES_AT_ONCE
from kvfold.runtimes.kernels.attention import additive_rows, as_wide, prefill_attention, repeat_heads
from kvfold.runtimes.kernels.recording import followed
from kvfold.runtimes.kernels.sinks import beside_sinks

LONG = 4
"""So many times as long as what is recent a prompt is worth being read in blocks of that."""
Heads = tuple[Tensor, Tensor]
"""Of the source, keys or values: far [B, K, S, H] of all S tokens, near [B, K, n, H] of the last n."""


def prefill_by_age(
    q_BNTH: Tensor,
    keys: Heads,
    values: Heads,
    mask: Tensor | None,
    *,
    recent: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """[B, T, N, V] of T queries, the last of S tokens, of which each sees the newest `recent` in the near form. mask: None
    where they see all that came before them."""
    sizes: dict[str, Any] = {"recent": recent, "scale": scale, "sinks": sinks}
    long = q_BNTH.shape[2] >= LONG * recent
    if mask is None and long and _takes(q_BNTH, *keys, *values):
        return prefill_by_log_sums(q_BNTH, keys, values, **sizes)
    return prefill_by_biases(q_BNTH, keys, values, mask, **sizes)


def _takes(*tensors: Tensor) -> bool:
    """Whether the operator that gives log-sums takes these, which checks nothing, and nobody wants gradients or a graph."""
    if followed(*tensors):
        return False
    kinds = {(x.dtype, x.device.type) for x in tensors}
    return len(kinds) == 1 and tensors[0].device.type == "cpu" and all(x.stride(-1) == 1 for x in tensors)


def prefill_by_log_sums(
    q_BNTH: Tensor, keys: Heads, values: Heads, *, recent: int, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Without a mask, by torch's fused kernel on a CPU: what all queries see far, what they see far one token further each,
    and what they see near in blocks; the logarithms of their sums say what each part counts."""
    (far_k, near_k), (far_v, near_v) = keys, values
    T, S = q_BNTH.shape[2], far_k.shape[2]
    out, log_sum = _banded(q_BNTH, near_k[:, :, -S:], near_v[:, :, -S:], recent, scale)
    common = max(S - T - recent + 1, 0)  # so many tokens are far for the first query, and for all
    if common:
        old = _fused(q_BNTH, far_k[:, :, :common], far_v[:, :, :common], scale)
        out, log_sum = _merged((out, log_sum), old)
    first = common + recent - (S - T)  # the first query that sees one more
    if first < T:
        seen = slice(common, common + T - first)
        older = _fused(q_BNTH[:, :, first:], far_k[:, :, seen], far_v[:, :, seen], scale, causal=True)
        later = _merged((out[:, :, first:], log_sum[:, :, first:]), older)
        out, log_sum = (torch.cat([x[:, :, :first], y], dim=2) for x, y in zip((out, log_sum), later, strict=True))
    return beside_sinks(out.transpose(1, 2).to(q_BNTH.dtype), [log_sum], sinks)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Averages [B, N, T, V] and log-sums [B, N, T] over the tokens of both."""
    (x, x_sum), (y, y_sum) = one, other
    return torch.lerp(x, y, (y_sum - x_sum).sigmoid()[..., None]), torch.logaddexp(x_sum, y_sum)


def _banded(q_BNTH: Tensor, k_BKnH: Tensor, v_BKnV: Tensor, recent: int, scale: float) -> tuple[Tensor, Tensor]:
    """Queries, the last of n tokens, over the newest `recent` of each: blocks of so many queries over two of tokens."""
    B, _, T, _ = q_BNTH.shape
    blocks = -(-T // recent)
    behind, before = blocks * recent - T, min(k_BKnH.shape[2] - T, recent)
    q = F.pad(q_BNTH, (0, 0, 0, behind)).unflatten(2, (blocks, recent)).transpose(1, 2).flatten(0, 1)
    k, v = (_in_pairs(x[:, :, -(before + T) :], recent, recent - before, behind) for x in (k_BKnH, v_BKnV))
    bias = _bias_of_blocks(blocks, recent, before, q).expand(B, -1, -1, -1, -1).flatten(0, 1)
    out, log_sum = _fused(q, k, v, scale, bias=bias)
    out, log_sum = (x.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T] for x in (out, log_sum))
    return out, log_sum


def _in_pairs(x_BKSH: Tensor, size: int, before: int, behind: int) -> Tensor:
    """[B * blocks, K, 2 * size, H]: each block of tokens with the one in front of it, after zeros are added at both ends."""
    padded = F.pad(x_BKSH, (0, 0, before, behind))
    return padded.unfold(2, 2 * size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)


def _bias_of_blocks(blocks: int, size: int, before: int, like: Tensor) -> Tensor:
    """[blocks, 1, size, 2 * size], to add: a query sees as many tokens as a block has, itself the last; of those in front of
    the first block only `before` are there."""
    queries = torch.arange(size, device=like.device)[:, None]
    tokens = torch.arange(-size, size, device=like.device)
    hidden = (tokens > queries) | (tokens <= queries - size)
    hidden = hidden.expand(blocks, 1, size, 2 * size).clone()
    hidden[0] |= tokens < -before
    return like.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(like.dtype).min)


def _fused(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSV: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Averages [B, N, T, V], in float32 at least so that parts are merged as exactly as they were made, and log-sums
    [B, N, T]. The operator is the one behind `scaled_dot_product_attention` on a CPU, which does not give the second."""
    N, V = q_BNTH.shape[1], v_BKSV.shape[3]
    q, k, v = as_wide(q_BNTH, repeat_heads(k_BKSH, N), repeat_heads(v_BKSV, N))
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out[..., :V].to(log_sum.dtype), log_sum


def prefill_by_biases(
    q_BNTH: Tensor,
    keys: Heads,
    values: Heads,
    mask: Tensor | None,
    *,
    recent: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same with any mask, and by the fused kernel of any device: QUERIES_AT_ONCE at a time, over what one of them sees
    far and behind it what one of them sees near."""
    T, S = q_BNTH.shape[2], keys[0].shape[2]
    shift, parts = keys[1].shape[2] - S, []
    for first in range(0, T, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, T)
        position, end = S - T + first, S - T + last
        old, new = max(end - recent, 0), max(position - recent + 1, 0)
        k, v = (
            torch.cat([far[:, :, :old], near[:, :, new + shift : end + shift]], dim=2) for far, near in (keys, values)
        )
        every = torch.arange(end, device=q_BNTH.device)
        tokens = torch.cat([every[:old], every[new:]])
        is_near = torch.arange(len(tokens), device=tokens.device) >= old
        other = (every[position:, None] - tokens < recent) != is_near
        seen = additive_rows(mask, T, S, first, last, q_BNTH)
        bias = q_BNTH.new_zeros(1, end) if seen is None else seen.to(q_BNTH.dtype)
        bias = torch.cat([bias[..., :old], bias[..., new:end]], dim=-1).masked_fill(
            other, torch.finfo(q_BNTH.dtype).min
        )
        parts.append(prefill_attention(q_BNTH[:, :, first:last], k, v, bias, scale=scale, sinks=sinks))
    return torch.cat(parts, dim=1)
