"""Sharing one budget over layers and sides."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from kvfold.compression.allocate import allocate, check_request, expected_curves, smallest_under
from kvfold.compression.hulls import lower_hull
from kvfold.compression.request import Axes, Limits, Request
from kvfold.errors import BudgetError, RecipeError
from kvfold.linalg.eigen import Moment
from kvfold.methods.bits.identity import Identity as Bits
from kvfold.methods.bits.mixed import Mixed
from kvfold.methods.depth.identity import Identity as Depth
from kvfold.methods.length.identity import Identity as Length
from kvfold.methods.width.base import LayerGroup
from kvfold.methods.width.mean_pool import MeanPool
from kvfold.methods.width.svd_a import SvdA
from kvfold.plan.codecs.base import NOISE, SIZES
from kvfold.plan.layer import AttentionLayer
from kvfold.plan.number_format import StoredShape


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


def axes(width, bits=None):
    return Axes(depth=Depth(), width=width, bits=bits or Bits(), length=Length())


def plan(layers, width, *, kv_budget, strategy, bits=None, **fields):
    request = Request(layers=layers, targets=(None,) * len(layers), axes=axes(width, bits), dtype="float32", **fields)
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
        curves.append(width.key_distortion(decaying(index), shapes))
        curves.append(width.value_distortion(decaying(index), shapes))
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
    assert {s.elements: (s.num_heads, s.width) for s in shapes} == {4: (1, 4), 8: (2, 4), 16: (4, 4), 32: (8, 4)}


def test_the_hull_leaves_out_what_no_budget_would_choose():
    shapes = [StoredShape(1, n) for n in (1, 2, 3, 4)]
    hull = lower_hull(list(zip(shapes, [1.0, 0.9, 0.2, 0.0], strict=True)), lambda shape: shape.elements)
    assert [s.width for s, _ in hull] == [1, 3, 4]


def test_mixed_bits_use_the_budget_and_lead():
    """Leading numbers get more bits; deeper layers, which lose energy faster, get fewer bytes; nothing is left over."""
    made = plan(
        [layer(0), layer(1)],
        SvdA(multiple=2, v_latent="layer"),
        kv_budget=0.2,
        strategy="greedy",
        bits=Mixed(multiple=2),
    )
    assert 0.17 < made.kv_budget <= 0.2
    for spec in made.owned:
        for side in spec.sides:
            bits = [b for _, b in side.format.tiers]
            assert bits == sorted(bits, reverse=True) and side.format.width == side.width
    first, second = (spec.bytes_per_token(4) for spec in made.owned)
    assert first > second


def test_mixed_bits_are_the_best_of_all_tiers():
    """Against brute force: at the price at which it was found no other choice of tiers has less distortion + price * bits."""
    spectrum = [2.0**-i for i in range(8)]
    method = Mixed(multiple=2, tiers=2)
    curve = method.curve([StoredShape(1, 2), StoredShape(1, 8)], spectrum, 1.0)
    options = []
    for ends in itertools.combinations_with_replacement(range(0, 9, 2), 2):
        for bits in itertools.product(range(1, 9), repeat=2):
            tiers = [(end - start, b) for start, end, b in zip((0, ends[0]), ends, bits, strict=True) if end > start]
            sides = [spectrum[start:end] for start, end in zip((0, ends[0]), ends, strict=True) if end > start]
            energies = [sum(map(math.sqrt, side)) ** 2 / len(side) for side in sides]
            noise = sum(e * np.interp(n, SIZES, NOISE[b]) for (n, b), e in zip(tiers, energies, strict=True))
            options.append((sum(n * b + 8 for n, b in tiers), noise + sum(spectrum[ends[1] :])))
    for shape, distortion in curve:
        spent = sum(n * b + 8 for n, b in shape.format.tiers)
        assert not [bits for bits, lost in options if bits <= spent and lost < distortion - 1e-9], shape


def test_noise_that_costs_more_buys_more_bits_and_fewer_numbers():
    spectrum = [2.0 ** (-i / 8) for i in range(64)]
    shapes = [StoredShape(1, 8), StoredShape(1, 64)]
    cheap, dear = (dict(Mixed().curve(shapes, spectrum, noise)) for noise in (0.2, 5.0))
    near = [min(points, key=lambda shape: abs(shape.bytes_per_token(2) - 20)) for points in (cheap, dear)]
    assert near[0].width > near[1].width and min(b for _, b in near[0].format.tiers) < min(
        b for _, b in near[1].format.tiers
    )


def test_layers_that_are_kept_and_least_widths():
    layers, width = [layer(0), layer(1), layer(2)], SvdA(multiple=2, v_latent="layer")
    kept = plan(
        layers, width, kv_budget=0.5, strategy="greedy", bits=Mixed(multiple=2), limits=Limits(keep_layers=(1,))
    )
    assert kept.caches[1].k_bits is None and kept.caches[1].elements_per_token == 32
    assert kept.caches[0].k_bits is not None and kept.kv_budget <= 0.5
    wide = plan(layers, width, kv_budget=0.15, strategy="greedy", bits=Mixed(multiple=2), limits=Limits(min_width=0.75))
    assert min(side.elements for spec in wide.owned for side in spec.sides) >= 12
    with pytest.raises(RecipeError, match=r"keep_layers names \[7\]; layers that own a cache are 0 to 2"):
        plan(layers, width, kv_budget=0.5, strategy="greedy", limits=Limits(keep_layers=(7,)))
    with pytest.raises(BudgetError, match="out of reach"):
        plan(layers, width, kv_budget=0.3, strategy="greedy", limits=Limits(keep_layers=(0, 1)))


def test_the_smallest_cache_under_a_kl():
    layers, width = [layer(0), layer(1)], SvdA(multiple=2, v_latent="layer")

    def at(budget):
        return plan(layers, width, kv_budget=budget, strategy="greedy", bits=Mixed(multiple=2))

    found = smallest_under(0.01, at, lambda made: 0.001 / made.kv_budget)
    assert 0.001 / found.kv_budget <= 0.01 and found.kv_budget < 0.12
    with pytest.raises(BudgetError, match="target_kl 1e-06 is out of reach"):
        smallest_under(1e-6, at, lambda made: 0.001 / made.kv_budget)
