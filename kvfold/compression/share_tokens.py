"""How many tokens each head keeps, when it is known what a token takes: where forgetting costs least."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kvfold.compression.hulls import SLACK, best_within
from kvfold.compression.request import Request
from kvfold.errors import BudgetError, RecipeError
from kvfold.methods.length.base import LengthMethod
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.plan import CachePlan

STEPS = 64
"""Windows are multiples of so many parts of the context."""
MOST_RUNS = 4
"""In one layer: each is read by a call of its own."""

Head = tuple[int, int]
"""Owner of a cache, and a stored head of it."""
Curves = Callable[[int, CacheSpec], Tensor]
"""(owner, its cache) -> what its stored heads lose, [C, sizes], for the shares of the context that `shares` says."""


def budget_of_shapes(method: LengthMethod, kv_budget: float | None) -> float | None:
    """The budget of what is stored of a token, as if all stayed."""
    if kv_budget is None or not method.drops:
        return kv_budget
    return 1.0 if method.share_kept is None else min(kv_budget / method.share_kept, 1.0)


def check_tokens(request: Request, kv_budget: float | None) -> None:
    """Raise RecipeError where bytes could be saved by dropping tokens as well as by storing less of each, and nothing says
    how much of which, or where nothing says how many tokens to drop."""
    method = request.axes.length
    if not method.drops or method.share_kept is not None:
        return
    if kv_budget is None:
        raise RecipeError("say how many tokens stay: --kv-budget 1/4 or --set length.kept=0.25, for example.")
    if any(len(shapes) > 1 for shapes in request.options.values()) or request.axes.bits.by_spectrum:
        raise RecipeError(
            "this method can store several sizes and drop tokens; say how many stay: --set length.kept=0.5, for example."
        )


def share_tokens(
    plan: CachePlan, method: LengthMethod, kv_budget: float | None, curves: Curves | None, shares: Sequence[float]
) -> CachePlan:
    """The same plan, whose heads keep as many tokens as the budget leaves, or the mean share that the method names.

    Raises BudgetError where not even what every head keeps at least fits.
    """
    context = plan.context_len
    dropping = {i: spec for i, spec in enumerate(plan.caches) if spec is not None and spec.tokens is not None}
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
    if curves is None:
        spread = method.spread(budget / sum(price.values()), len(dropping), context)
        of_layer = dict(zip(dropping, spread, strict=True))
        kept = {(owner, head): of_layer[owner] for owner, head in heads}
    else:
        kept = _by_cost(dropping, price, sizes, budget, curves, np.array(shares) * context)
    caches = list(plan.caches)
    for owner, spec in dropping.items():
        tokens_C = _merged([kept[owner, head] for head in range(spec.num_kv_heads)])
        caches[owner] = method.keep(spec, tokens_C, context)
    return dataclasses.replace(plan, caches=tuple(caches))


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
    return (asked - (everything - whole)) * plan.context_len


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
