"""Sharing one budget over layers and sides."""

import dataclasses
import itertools

import pytest
import torch

from kvfold.allocate import Axes, Request, allocate, check_request, expected_curves, lower_hull
from kvfold.attention import AttentionLayer
from kvfold.bits.identity import Identity as Bits
from kvfold.depth.identity import Identity as Depth
from kvfold.errors import BudgetError, RecipeError
from kvfold.length.identity import Identity as Length
from kvfold.linalg import Moment
from kvfold.number_format import StoredShape
from kvfold.width.base import LayerGroup
from kvfold.width.mean_pool import MeanPool
from kvfold.width.svd_a import SvdA


def layer(index, kv_heads=4, head_dim=4):
    return AttentionLayer(
        index=index,
        hidden_size=32,
        num_attention_heads=8,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=0.5,
        rotary_dim=head_dim,
    )


def axes(width):
    return Axes(depth=Depth(), width=width, bits=Bits(), length=Length())


def plan(layers, width, *, kv_budget, strategy, **fields):
    request = Request(layers=layers, targets=(None,) * len(layers), axes=axes(width), dtype="float32", **fields)
    check_request(request, kv_budget)
    return allocate(request, kv_budget=kv_budget, strategy=strategy, curves=lambda: expected_curves(request, decaying))


def decaying(index):
    """Keys and values of layer i lose energy faster the deeper the layer."""
    moments = {}
    for side, name in enumerate(("keys", "values")):
        values = (1.0 + index + side) ** -torch.arange(16.0, dtype=torch.float64)
        moments[name] = Moment(torch.zeros(16), torch.diag(values), 1)
    return LayerGroup(
        layers=(layer(index),),
        weights=lambda i: None,
        moments=lambda i: moments,
        cross=lambda i: {name: moment.second_FF for name, moment in moments.items()},
    )


def share(plan):
    return [(s.head_dim, s.num_v_heads * s.v_head_dim) for s in plan.owned]


def test_uniform_gives_every_layer_the_same_share():
    width = SvdA(multiple=2, v_latent="layer")
    assert share(plan([layer(0), layer(1)], width, kv_budget=0.5, strategy="uniform")) == [(8, 8), (8, 8)]


def test_greedy_is_the_best_of_all_choices():
    """Against brute force over every choice of widths within the budget."""
    layers, width = [layer(0), layer(1)], SvdA(multiple=4, v_latent="layer")
    made = plan(layers, width, kv_budget=0.5, strategy="greedy")
    curves = []
    for index in (0, 1):
        shapes = width.key_shapes(layers[index])
        curves.append(width.key_damage(decaying(index), shapes))
        curves.append(width.value_damage(decaying(index), shapes))
    choices = [c for c in itertools.product(range(4), repeat=4) if sum(4 * (i + 1) for i in c) <= 32]
    best = min(sum(curve[i] for curve, i in zip(curves, c, strict=True)) for c in choices)
    widths = [n for pair in share(made) for n in pair]
    assert sum(widths) <= 32 and widths[0] > widths[3]
    assert sum(curve[n // 4 - 1] for curve, n in zip(curves, widths, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("strategy", ["uniform", "greedy"])
def test_a_budget_out_of_reach_names_the_smallest(strategy):
    with pytest.raises(BudgetError, match=r"0\.1 is out of reach: .* keeps 0\.125"):
        plan([layer(0)], SvdA(multiple=2, v_latent="layer"), kv_budget=0.1, strategy=strategy)


def test_heads_that_do_not_divide():
    with pytest.raises(
        RecipeError, match=r"does not divide the 4 key/value heads of layer 0; choose one of \[1, 2, 4\]"
    ):
        plan([layer(0)], MeanPool(kv_heads=3), kv_budget=None, strategy="uniform")


def test_a_method_with_several_sizes_needs_a_budget():
    with pytest.raises(RecipeError, match="--kv-budget"):
        plan([layer(0)], MeanPool(), kv_budget=None, strategy="uniform")


def test_group_shapes_are_the_papers_points():
    """At h/t heads: groups of t heads, one head wide each (arXiv 2406.07056, section 2.2)."""
    shapes = SvdA(latent="group", multiple=4).key_shapes(dataclasses.replace(layer(0), num_kv_heads=8))
    assert {s.numbers: (s.num_heads, s.width) for s in shapes} == {4: (1, 4), 8: (2, 4), 16: (4, 4), 32: (8, 4)}


def test_the_hull_leaves_out_what_no_budget_would_choose():
    shapes = [StoredShape(1, n) for n in (1, 2, 3, 4)]
    hull = lower_hull(list(zip(shapes, [1.0, 0.9, 0.2, 0.0], strict=True)), lambda shape: shape.numbers)
    assert [s.width for s, _ in hull] == [1, 3, 4]
