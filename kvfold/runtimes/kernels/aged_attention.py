"""Attention over tokens whose form depends on their age: a query sees the newest ones finely, others as stored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.plan.cache_spec import round_up
from kvfold.plan.number_format import tokens_at_once
from kvfold.runtimes.kernels.attention import (
    Piece,
    RunningSoftmax,
    additive_rows,
    scores_of,
    softmax,
    weighted,
)
from kvfold.runtimes.kernels.dispatch import FEW_TOKENS
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, Operand, Stored, read

QUERIES_AT_ONCE = 256
"""Of a prompt."""
TOKENS_ALIKE = 64
"""Of a step the far tokens are read in multiples of so many, those beyond being masked: oneDNN compiles a product for every
new shape, which takes several times as long as the product."""


class Aged(NamedTuple):
    """Keys or values of which a query sees the newest `recent` in a finer form. far(start, end): those of all `tokens`;
    near(start, end): of these again in that form, where they are kept: the last `kept`."""

    far: Piece
    near: Piece
    tokens: int
    kept: int
    recent: int


def attend_by_age(
    q: tuple[Tensor, Tensor],
    z: AgedTokens,
    y: AgedTokens,
    mask: Tensor | None,
    *,
    keys: tuple[Callable[[Stored], Piece], Callable[[Stored], Piece]] | None,
    width: int,
    by_masks: bool,
    elements: int,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """[B, T, N, V] and, `by_masks`, probabilities. q: as queries meet far and near keys. keys: make the source's keys of far
    and of near ones, where they are rebuilt on read; otherwise queries are absorbed. width: V, of which far values are the
    first numbers and near ones the last. A prompt reads all tokens several times, so they are made once."""
    k, v = _aged(z, keys, q[0]), _aged(y, None, q[0])
    if by_masks:
        return aged_attention_by_masks(q, k, v, mask, width, scale=scale, dropout=dropout, softcap=softcap, sinks=sinks)
    return aged_attention(q, k, v, mask, width, elements=elements, scale=scale, softcap=softcap, sinks=sinks), None


def _aged(x: AgedTokens, makers: tuple[Callable[[Stored], Piece], ...] | None, q: Tensor) -> Aged:
    far, near = (make(part) for make, part in zip(makers or (_reader, _reader), (x.far, x.near), strict=True))
    if q.shape[2] > FEW_TOKENS:
        far, near = _whole(far, x.far.shape[2]), _whole(near, x.near.shape[2])
    if (beyond := x.near.shape[2] - x.shape[2]) > 0:  # of a sliding window
        near = functools.partial(_shifted, near, beyond)
    return Aged(far, near, x.shape[2], min(x.near.shape[2], x.shape[2]), x.recent)


def _reader(stored: Stored) -> Piece:
    return functools.partial(read, stored)


def _shifted(piece: Piece, by: int, start: int, end: int) -> Operand:
    return piece(start + by, end + by)


def _whole(piece: Piece, tokens: int) -> Piece:
    made = piece(0, tokens)
    assert isinstance(made, Tensor), "pieces are numbers here"
    return lambda start, end: made[:, :, start:end]


def aged_attention(
    q: tuple[Tensor, Tensor],
    keys: Aged,
    values: Aged,
    mask: Tensor | None,
    width: int,
    *,
    elements: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries (as they meet far and near keys, [B, N, T, R and E]) over tokens whose form their age gives: equal to
    `aged_attention_by_masks`, by pieces with a running maximum and sum, for QUERIES_AT_ONCE queries at a time."""
    T, S = q[0].shape[2], keys.tokens
    parts = []
    for first in range(0, T, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, T)
        some = tuple(x[:, :, first:last] for x in q)
        seen = additive_rows(mask, T, S, first, last, q[0])
        parts.append(_aged_rows(some, keys, values, seen, S - T + first, width, elements, scale, softcap, sinks))
    return torch.cat(parts, dim=1)


def _aged_rows(
    q: tuple[Tensor, ...],
    keys: Aged,
    values: Aged,
    mask_TS: Tensor | None,
    position: int,
    width: int,
    elements: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Of queries that lie together, the first at `position`. mask_TS: to add, of all tokens; None: a query that sees all."""
    B, N, T, _ = q[0].shape
    oldest_near = max(position - keys.recent + 1, 0)
    ranges = (
        (keys.far, values.far, 0, max(position + T - keys.recent, 0), 0),
        (keys.near, values.near, oldest_near, position + T, keys.tokens - keys.kept),
    )
    step = tokens_at_once(B * max(elements, N * T), q[0].device.type)
    step, known = step // TOKENS_ALIKE * TOKENS_ALIKE or step, keys.tokens if mask_TS is None else mask_TS.shape[-1]
    running = RunningSoftmax(q[0], width)
    for queries, (k, v, start, end, shift), is_near in zip(q, ranges, (False, True), strict=True):
        for at in range(start, end, step):
            to = min(at + step, end)
            if to == end and not is_near:  # those beyond are masked
                to = min(at + round_up(to - at, TOKENS_ALIKE), at + step, known)
            scores = scores_of(queries * scale, k(at - shift, to - shift))
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores if mask_TS is None else scores + mask_TS[..., at:to]
            of_age = _of_age(T, position, at, to, end, keys.recent, is_near, scores)
            scores = scores if of_age is None else scores.masked_fill(~of_age, float("-inf"))
            running.add(scores, v(at - shift, to - shift), last=is_near)
    return running.result(sinks)


def _of_age(
    T: int, position: int, start: int, end: int, last: int, recent: int, near: bool, like: Tensor
) -> Tensor | None:
    """[T, s]: of which tokens start:end queries from `position` on see this form, which none does of those from `last` on;
    None where it is all."""
    if T == 1 and end <= last:
        return None
    queries = torch.arange(position, position + T, device=like.device)[:, None]
    fine = queries - torch.arange(start, end, device=like.device) < recent
    return fine if near else ~fine


def beside(far: Tensor, near: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Far numbers as the first and near ones as the last of `width`, the others being 0."""
    return F.pad(far, (0, width - far.shape[-1])), F.pad(near, (width - near.shape[-1], 0))


def aged_attention_by_masks(
    q: tuple[Tensor, Tensor],
    keys: Aged,
    values: Aged,
    mask: Tensor | None,
    width: int,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The obvious version: all scores in both forms, and a mask that chooses. Also the probabilities [B, N, T, S]."""
    S, T = keys.tokens, q[0].shape[2]
    lead = S - keys.kept  # of these tokens no query sees the finer form
    far = scores_of(q[0] * scale, keys.far(0, S))
    near = F.pad(scores_of(q[1] * scale, keys.near(0, keys.kept)), (lead, 0))
    fine = torch.arange(S - T, S, device=far.device)[:, None] - torch.arange(S, device=far.device) < keys.recent
    scores = torch.where(fine, near, far)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    probs = softmax(scores, mask, sinks)
    used = F.dropout(probs, dropout) if dropout else probs
    old = weighted(used * ~fine, values.far(0, S), q[0].dtype)
    new = weighted((used * fine)[..., lead:], values.near(0, keys.kept), q[0].dtype)
    old, new = beside(old, new, width)
    out = old + new
    return out.to(q[0].dtype).transpose(1, 2), probs
