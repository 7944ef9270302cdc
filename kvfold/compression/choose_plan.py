"""Which plan a fold gets: by bytes or by KL, tokens beside numbers, the plain cache where that loses less."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.calibration.forgetting import SHARES
from kvfold.compression.allocate import allocate, expected_curves, smallest_under
from kvfold.compression.hulls import Curves
from kvfold.compression.prediction import Prediction
from kvfold.compression.probe import Probe
from kvfold.compression.recipe import Recipe
from kvfold.compression.request import Groups, Request
from kvfold.compression.share_tokens import Curves as TokenCurves
from kvfold.compression.share_tokens import (
    best_of_shares,
    leaves_open,
    lost_by_shapes,
    lost_by_tokens,
    of_shapes,
    share_tokens,
)
from kvfold.errors import BudgetError
from kvfold.methods.width.mla import LEAST_APART
from kvfold.plan.cache_spec import CacheSpec
from kvfold.plan.plan import CachePlan

PLAIN_BITS = {"method": "integer", "k_bits": 8, "v_bits": 8}


def choose_plan(
    recipe: Recipe,
    request: Request,
    groups: Groups,
    probe: Callable[[], Probe],
    forgotten_LCn: Tensor | None,
) -> CachePlan:
    """By bytes, or the smallest that stays under the KL that the recipe names."""

    @functools.cache
    def curves() -> Curves:
        return probe().curves() if recipe.allocate == "measured" else expected_curves(request, groups)

    def plan(kv_budget: float | None) -> CachePlan:
        length: Any = request.axes.length
        if not length.drops:
            return shaped(request, kv_budget)
        if not leaves_open(request):
            return dropping(shaped(*of_shapes(request, kv_budget)), length, kv_budget)
        assert kv_budget is not None and forgotten_LCn is not None, "check_tokens was asked"
        budget, nats_LCn = kv_budget, forgotten_LCn
        return best_of_shares(
            lambda kept: dropping(
                shaped(dataclasses.replace(request, kept=kept), budget), dataclasses.replace(length, kept=kept), None
            ),
            lambda made: lost_by_shapes(made, request.parts, curves()),
            lambda made: lost_by_tokens(made, _token_curves(made, nats_LCn), SHARES),
        )

    def dropping(made: CachePlan, length: Any, kv_budget: float | None) -> CachePlan:
        weighed = None if forgotten_LCn is None else _token_curves(made, forgotten_LCn)
        return share_tokens(made, length, kv_budget, weighed, SHARES)

    def shaped(request: Request, kv_budget: float | None) -> CachePlan:
        made = allocate(request, kv_budget=kv_budget, strategy=recipe.allocate, curves=curves)
        if recipe.allocate == "measured" or not made.predicts:
            return made
        left = functools.cache(lambda: expected_curves(request, Prediction(groups, made, request.axes.width).group))
        return allocate(request, kv_budget=kv_budget, strategy=recipe.allocate, curves=left)

    if recipe.target_kl is None:
        return plan(recipe.kv_budget)
    try:
        found = smallest_under(recipe.target_kl, plan, lambda made: probe().kl_of(made))
    except BudgetError as error:
        raise BudgetError(f"{error}{_better_from_a_quarter_on(recipe, request)}") from error
    if found.kv_budget >= LEAST_APART and (hint := _better_from_a_quarter_on(recipe, request)):
        warnings.warn(f"target_kl {recipe.target_kl:.3g} takes {found.kv_budget:.3g} of the bytes.{hint}", stacklevel=3)
    return found


def _better_from_a_quarter_on(recipe: Recipe, request: Request) -> str:
    """What to ask for instead, as a sentence: methods are chosen for few of the bytes where a KL is asked for."""
    other = request.axes.width.instead(request.layers, LEAST_APART, named=False)
    if other is None or {**recipe.width, **other} == recipe.width:
        return ""
    fields = " ".join(f"--set width.{name}={value}" for name, value in other.items())
    return f" With so much to spend less is lost by --preset {recipe.preset or 'auto'} {fields}."


def or_plain(
    recipe: Recipe, request: Request, plan: CachePlan, probe: Callable[[], Probe]
) -> tuple[Recipe, Request, CachePlan]:
    """The plain cache in 8 bits where bits are shared out by measured distortion, the budget allows it, and it loses less:
    with much to spend, what is left to lose is the rounding of folded weights, and its weights are the original ones."""
    shares = any(target is not None for target in request.targets)
    if recipe.allocate == "uniform" or not request.axes.bits.by_spectrum or recipe.kv_budget is None or shares:
        return recipe, request, plan
    plainly: dict[str, Any] = {"width": {"method": "identity"}, "bits": PLAIN_BITS, "length": {"method": "identity"}}
    simple = dataclasses.replace(recipe, **plainly, allocate="uniform", prefer=None)
    asked = dataclasses.replace(request, axes=simple.axes, kept=1.0)  # which drops no tokens
    try:
        plain = allocate(asked, kv_budget=recipe.kv_budget, strategy="uniform", curves=dict)
    except BudgetError:
        return recipe, request, plan
    measured, lost = probe().kl_of(plan), probe().kl_of(plain, asked.axes.width)
    if measured <= lost:
        return recipe, request, plan
    warnings.warn(
        f"the plain cache in 8 bits ({plain.kv_budget:.3g} of the bytes) loses less (KL {lost:.2g}) than what the recipe"
        f" makes of this budget ({measured:.2g}), and is taken instead.",
        stacklevel=3,
    )
    return simple, asked, plain


def warn_if_far_below(recipe: Recipe, plan: CachePlan) -> None:
    """Say where a method has no size near the budget."""
    if recipe.kv_budget is not None and plan.kv_budget < 0.95 * recipe.kv_budget:
        warnings.warn(
            f"kv_budget {recipe.kv_budget:.4g} was asked for and {plan.kv_budget:.4g} is used: the method"
            f" {recipe.width['method']!r} has no size in between with these fields."
            f" Others{'' if recipe.allocate == 'greedy' else ', or --set allocate=greedy,'} may come nearer.",
            stacklevel=3,
        )


def _token_curves(plan: CachePlan, nats_LCn: Tensor) -> TokenCurves:
    """What forgetting costs each stored head: in sum over the heads and layers that read it."""

    def curves(owner: int, spec: CacheSpec) -> Tensor:
        of_heads = torch.stack([nats_LCn[layer] for layer in plan.readers(owner)]).sum(0)
        return of_heads.unflatten(0, (spec.num_kv_heads, -1)).sum(1)

    return curves
