"""How many tokens each head keeps, when it is known what a token takes: where forgetting costs least."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kvfold.compression.hulls import Curves as ShapeCurves
from kvfold.compression.hulls import best_within
from kvfold.compression.request import Request
from kvfold.errors import BudgetError, RecipeError
from kvfold.linalg.sensitivity import RECENT
from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.plan import CachePlan
from kvfold.plan.rounding import SLACK

STEPS = 64
"""Windows are multiples of so many parts of the context."""
SHARES_TRIED = (1.0, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)
"""Of the tokens, in the mean over heads, where nobody says how many stay."""
ROOM_FOR_ALL = 2.0
"""Of the original's bytes: where every token stays, what stands beside it may take more than all of them."""
SAFEGUARD = 0.2
"""Of the mean of its layer, what a head keeps where heads compete (Ada-KV)."""
MOST_RUNS = 4
"""In one layer: each is read by a call of its own."""

Head = tuple[int, int]
"""Owner of a cache, and a stored head of it."""
Curves = Callable[[int, CacheSpec], Tensor]
"""(owner, its cache) -> what its stored heads lose, [C, sizes], for the shares of the context that `shares` says."""


def of_shapes(request: Request, kv_budget: float | None) -> tuple[Request, float | None]:
    """What is asked of what is stored of each token that stays: where nobody says how many do, as if all did and there was
    room for them."""
    method = request.axes.length
    if not method.drops:
        return request, kv_budget
    if method.share_kept is not None:
        return dataclasses.replace(request, kept=method.share_kept), kv_budget
    return request, None if kv_budget is None else ROOM_FOR_ALL


def leaves_open(request: Request) -> bool:
    """Whether bytes can be saved by dropping tokens as well as by storing less of each, and nobody said how much of which."""
    several = any(len(shapes) > 1 for shapes in request.options.values()) or request.axes.bits.by_spectrum
    return request.axes.length.drops and request.axes.length.share_kept is None and several


def check_tokens(request: Request, kv_budget: float | None, *, in_nats: bool) -> None:
    """Raise RecipeError where nothing says how many tokens to drop. in_nats: whether it is known what storing less costs, so
    that both can be compared."""
    method = request.axes.length
    if not method.drops or method.share_kept is not None:
        return
    if kv_budget is None:
        raise RecipeError("say how many tokens stay: --kv-budget 1/4 or --set length.kept=0.25, for example.")
    if leaves_open(request) and not (in_nats and method.weighs_heads and not method.competes):
        raise RecipeError(
            "this method can store several sizes and drop tokens; say how many stay (--set length.kept=0.5, for example), or"
            " choose methods that count both in nats: width.method=fisher and length.sharing=measured, or allocate=measured."
        )


def check_heads(request: Request) -> None:
    """Raise RecipeError where heads drop tokens of their own, and keys have other heads than values."""
    if len(request.axes.latents_of_heads) > 1:
        raise RecipeError(
            "heads that drop tokens of their own store as many heads of values as of keys; set width.latent and"
            " width.v_latent to the same."
        )


def best_of_shares(
    made: Callable[[float], CachePlan], shapes: Callable[[CachePlan], float], tokens: Callable[[CachePlan], float]
) -> CachePlan:
    """Of plans that keep so many of the tokens in the mean over heads, and have what that leaves of the budget for each, the
    one that is expected to lose least: damages of storing less of every token and of storing fewer add. made: (share) -> a
    plan; shapes, tokens: what it loses by either, in nats.

    Raises BudgetError where no share fits.
    """
    found, problem = [], None
    for share in SHARES_TRIED:
        try:
            plan = made(share)
        except BudgetError as error:
            problem = problem or error
            continue
        found.append((shapes(plan) + tokens(plan), -share, plan))
    if not found:
        assert problem is not None, "something was tried"
        raise problem
    return min(found, key=lambda one: one[:2])[2]


def lost_by_shapes(plan: CachePlan, parts: Sequence[str], known: ShapeCurves) -> float:
    """What storing less of every token is expected to cost, in nats per token; recent ones in their finer form."""
    total = 0.0
    for owner, spec in enumerate(plan.caches):
        if spec is not None:
            forms = [("", spec.sides)] + ([(RECENT, spec.recent_sides)] if spec.recent_head_dim else [])
            for age, sides in forms:
                total += sum(dict(known[owner, age + part])[side] for part, side in zip(parts, sides, strict=False))
    return total


def lost_by_tokens(plan: CachePlan, curves: Curves, shares: Sequence[float]) -> float:
    """What dropping tokens is expected to cost."""
    total, context = 0.0, plan.context_len
    for owner, spec in enumerate(plan.caches):
        if spec is not None and spec.tokens is not None:
            nats_Cn = curves(owner, spec)
            for run in spec.tokens.runs:
                kept = run.kept(context) / context
                lost = (float(np.interp(kept, shares, nats_Cn[head].numpy())) for head in run.heads)
                total += sum(lost) if kept < 1 else 0.0
    return total


def share_tokens(
    plan: CachePlan, method: LengthMethod, kv_budget: float | None, curves: Curves | None, shares: Sequence[float]
) -> CachePlan:
    """The same plan, whose heads keep as many tokens as the budget leaves, or the mean share that the method names.

    Raises BudgetError where not even what every head keeps at least fits.
    """
    context = plan.context_len
    dropping = {i: spec for i, spec in enumerate(plan.caches) if spec is not None and spec.tokens is not None}
    if not dropping:  # every layer has a sliding window or is kept
        if method.share_kept is None and kv_budget is not None and plan.kv_budget > kv_budget * SLACK:
            raise BudgetError(
                f"kv_budget {kv_budget:.4g} is out of reach: no layer drops tokens, since all have a sliding window or are"
                f" kept (keep_layers); they take {plan.kv_budget:.4g}."
            )
        return plan
    heads = [(i, head) for i, spec in dropping.items() for head in range(spec.num_kv_heads)]
    price = {head: _row_bytes(plan, dropping[head[0]]) for head in heads}
    sizes = method.sizes(context, [context * step // STEPS for step in range(1, STEPS)])
    budget = _left(plan, method, kv_budget, sum(price.values()))
    if budget * SLACK < sizes[0] * sum(price.values()):
        asked, least = kv_budget or method.share_kept, sizes[0] / context
        raise BudgetError(
            f"kv_budget {asked:.4g} is out of reach: every head keeps {sizes[0]} of {context:,} tokens at least,"
            f" {least:.3g} of them. Ask for more, count bytes over more tokens (--context), or lower length.newest."
        )
    known = np.array(shares) * context
    if curves is not None and not method.competes:
        kept = _by_cost(dropping, price, sizes, budget, curves, known)
    else:
        of_layer = dict(zip(dropping, method.spread(budget / sum(price.values()), len(dropping), context), strict=True))
        if curves is None:
            kept = {(owner, head): of_layer[owner] for owner, head in heads}
        else:
            kept = _competing(dropping, price, sizes, of_layer, curves, known)
    caches = list(plan.caches)
    for owner, spec in dropping.items():
        tokens_C = _merged([kept[owner, head] for head in range(spec.num_kv_heads)])
        caches[owner] = method.keep(spec, tokens_C, context)
    return dataclasses.replace(plan, caches=tuple(caches))


def _competing(
    dropping: dict[int, CacheSpec],
    price: dict[Head, float],
    sizes: Sequence[int],
    of_layer: dict[int, int],
    curves: Curves,
    known: np.ndarray,
) -> dict[Head, int]:
    """Of heads that share what their layer keeps: so many tokens in the mean, each a part of them at least."""
    kept: dict[Head, int] = {}
    for owner, mean in of_layer.items():
        spec, floor = dropping[owner], max(sizes[0], round(mean * SAFEGUARD))
        room = mean * sum(price[owner, head] for head in range(spec.num_kv_heads))
        allowed = [floor, *(size for size in sizes if size > floor)]
        kept |= _by_cost({owner: spec}, price, allowed, room, curves, known)
    return kept


def _row_bytes(plan: CachePlan, spec: CacheSpec) -> float:
    """Of one token in one stored head."""
    return spec.bytes_per_token(plan.itemsize()) / spec.num_kv_heads


def _left(plan: CachePlan, method: LengthMethod, kv_budget: float | None, whole: float) -> float:
    """Bytes for the tokens of heads that drop some; `whole`: of one token in all of them."""
    if method.share_kept is not None:
        return method.share_kept * whole * plan.context_len
    assert kv_budget is not None, "check_tokens was asked"
    everything = sum(spec.bytes_per_token(plan.itemsize()) for spec in plan.owned) + plan.position_bytes
    asked = kv_budget * plan.source_kv_bytes_per_token()
    return (asked - (everything - whole)) * plan.context_len - plan.recent_bytes()


def _by_cost(
    dropping: dict[int, CacheSpec],
    price: dict[Head, float],
    sizes: Sequence[int],
    budget: float,
    curves: Curves,
    known: np.ndarray,
) -> dict[Head, int]:
    points: dict[Any, Any] = {}
    for owner, spec in dropping.items():
        for head, nats_n in enumerate(curves(owner, spec).tolist()):
            lost = np.interp(sizes, known, nats_n)
            lost[-1] = 0.0
            points[owner, head] = list(zip(sizes, lost.tolist(), strict=True))
    return best_within(budget, points, lambda head, tokens: price[head] * tokens)  # type: ignore[index, operator, return-value]


def _merged(tokens_C: list[int]) -> list[int]:
    """At most MOST_RUNS different numbers: neighbouring ones become their mean."""
    while len(values := sorted(set(tokens_C))) > MOST_RUNS:
        low, high = min(itertools.pairwise(values), key=lambda pair: pair[1] - pair[0])
        both = [tokens for tokens in tokens_C if tokens in (low, high)]
        mean = sum(both) // len(both)
        tokens_C = [mean if tokens in (low, high) else tokens for tokens in tokens_C]
    return tokens_C
