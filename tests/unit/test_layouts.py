"""Which layers may share a cache: lists that cannot be, windows, owners shared out."""

from __future__ import annotations

import dataclasses

import pytest

import kvfold
from kvfold.checkpoint.source import load_plan, open_source
from kvfold.compression.recipe import make_recipe
from kvfold.errors import PlanError, RecipeError
from kvfold.plan.plan import CachePlan


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        ("0,0,1", "layer 2 uses layer 1's cache; it must be its own or that of an EARLIER layer"),
        ("0,2,2", "layer 1 uses layer 2's cache"),
        ("0,0", "names 2 layers, the model has 3"),
        ("a,b,c", "is not a list such as"),
    ],
)
def test_layer_lists_that_cannot_be(tiny_dir, tmp_path, uses, message):
    recipe = {
        "model": str(tiny_dir / "llama_mha"),
        "out": str(tmp_path / "out"),
        "depth": {"method": "explicit", "uses": uses},
    }
    with pytest.raises(RecipeError, match=message):
        kvfold.compress(recipe, device="cpu")


def test_different_windows_cannot_share(tiny_dir, tmp_path):
    recipe = {"model": str(tiny_dir / "qwen3_norm_window"), "out": str(tmp_path / "out")}
    with pytest.raises(RecipeError, match="layers 0 and 1 have different sliding windows"):
        kvfold.compress(recipe | {"depth": {"method": "explicit", "uses": "0,0,2"}}, device="cpu")
    with pytest.raises(PlanError, match="different sliding windows"):
        plan = load_plan(tiny_dir / "qwen3_norm_window")[0]
        CachePlan(
            dtype=plan.dtype,
            source=plan.source,
            caches=(plan.caches[0], None, plan.caches[2]),
            kv_sharing_target_layer=(None, 0, None),
        )


def test_owners_are_shared_out_exactly_among_windows(tiny_dir):
    """Two kinds of window of three layers each: the layers asked for, whatever the rounding."""
    layers = open_source(tiny_dir / "llama_mha").layers
    mixed = [dataclasses.replace(layers[0], index=i, window=9 if i % 2 else None) for i in range(6)]
    for owners in range(2, 7):
        method = make_recipe({"model": "-", "out": "-", "depth": {"method": "contiguous", "owners": owners}}).method(
            "depth"
        )
        assert method.layouts(mixed, None)[0].count(None) == owners
    with pytest.raises(RecipeError, match="2 kinds of sliding window"):
        make_recipe({"model": "-", "out": "-", "depth": {"method": "contiguous", "owners": 1}}).method("depth").layouts(
            mixed, None
        )
    both = make_recipe({"model": "-", "out": "-", "depth": {"method": "cla", "factor": 2, "owners": 3}})
    with pytest.raises(RecipeError, match="factor = 2 and depth.owners = 3 both say"):
        both.method("depth").layouts(mixed, None)


def shared(folder, out, kv_budget, **fields):
    recipe = {"model": str(folder), "out": str(out), "preset": "shared", "kv_budget": kv_budget}
    return kvfold.compress(
        recipe | {"calibration": {"data": "self", "num_samples": 8, "seq_len": 32}} | fields, device="cpu"
    )


def test_no_even_layout_is_said(tiny_dir, tmp_path):
    """Three layers of two kinds of window: neither all nor one of them can be owners."""
    with pytest.raises(RecipeError, match="Name how many keep one: --owners"):
        shared(tiny_dir / "qwen3_norm_window", tmp_path / "out", 0.5)


def test_shared_finds_a_layout_for_mixed_windows(tiny_dir, tmp_path):
    folded = shared(tiny_dir / "gemma2_softcap", tmp_path / "out", 0.7, depth={"owners": 2})
    assert folded.plan.kv_sharing_target_layer.count(None) == 2
