"""`--runtime vllm` makes plans that vLLM's paged cache holds, and says before any work what it cannot hold."""

import dataclasses

import pytest
from tiny import make_tiny, save_tiny
from typer.testing import CliRunner

import kvfold
from kvfold.architectures.base import empty_model
from kvfold.cli.main import app
from kvfold.compression.recipe import make_recipe, preset_recipe
from kvfold.compression.request import Request, limits_of
from kvfold.errors import BudgetError, PlanError, RecipeError
from kvfold.evaluation.demo import MODEL
from kvfold.evaluation.geometries import Shape
from kvfold.runtimes.base import servable_by
from kvfold.runtimes.transformers.runtime import Transformers
from kvfold.runtimes.vllm.runtime import WIDTHS, is_packed

GROUPS = {"method": "svd_w", "latent": "group", "v_latent": "group"}


def compress(tmp_path, **recipe):
    made = kvfold.compress(
        {"model": str(MODEL), "out": str(tmp_path / "out"), "runtime": "vllm", **recipe}, device="cpu"
    )
    return made.plan


@pytest.mark.parametrize("allocate", ["uniform", "greedy"])
@pytest.mark.parametrize(
    ("width", "kv_budget"),
    [(GROUPS, 1 / 2), (GROUPS, 1 / 4), ({**GROUPS, "latent": "layer", "v_latent": "layer"}, 1 / 2)],
)
def test_keys_and_values_of_a_layer_have_one_shape(tmp_path, allocate, width, kv_budget):
    plan = compress(tmp_path, width=width, allocate=allocate, kv_budget=kv_budget)
    assert servable_by(plan) == {"transformers": None, "vllm": None}
    assert 0.6 * kv_budget < plan.kv_budget <= kv_budget
    assert f"vllm serve {tmp_path / 'out'}" in (tmp_path / "out" / "README.md").read_text()
    for spec in plan.owned:
        assert (spec.num_kv_heads, spec.head_dim) == (spec.num_v_heads, spec.v_head_dim)
        assert spec.head_dim in WIDTHS


def test_its_default_is_that_of_all():
    where = {"model": "m", "out": "o"}
    recipe = make_recipe(where | {"runtime": "vllm"})
    assert (recipe.preset, recipe.runtime) == ("auto", "vllm")
    assert make_recipe(where, ["runtime=vllm"]).preset == "auto"
    assert make_recipe(where | {"preset": "served"}).runtime == "vllm"
    assert make_recipe(where).preset == "auto"


@pytest.mark.parametrize("allocate", ["uniform", "greedy"])
def test_layers_that_are_kept_keep_everything(tmp_path, allocate):
    plan = compress(tmp_path, width=GROUPS, kv_budget=1 / 2, keep_layers=[0], allocate=allocate)
    assert all((spec.num_kv_heads, spec.head_dim) == (spec.num_v_heads, spec.v_head_dim) for spec in plan.owned)
    assert plan.owned[0].bytes_per_token(1) == plan.source[0].elements_per_token
    assert servable_by(plan)["vllm"] is None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"preset": "kivi"}, "layer 0's block = 32: tokens that are packed together, .*; the nearest plan"),
        ({"preset": "xkv", "kv_budget": 1 / 4}, "joint = True"),
        ({"preset": "svd_a", "kv_budget": 1 / 4, "width": {"group_size": 2}}, "keys and values in one shape"),
        ({"runtime": "vlm"}, "Did you mean 'vllm'"),
    ],
)  # fmt: skip
def test_what_it_cannot_serve_is_refused_before_calibration(tmp_path, recipe, message):
    with pytest.raises((RecipeError, PlanError), match=message):
        compress(tmp_path, **{"calibration": {"data": "/no/such/text"}} | recipe)


def test_damage_is_measured_beside_an_untouched_side():
    """One wide latent of Llama-2-7B's heads is no width that vLLM has, and still what the other side is measured with."""
    shape = Shape(name="llama2-7b", layers=1)
    layers = shape.arch.describe(empty_model(shape.arch, shape.config()))
    recipe = preset_recipe("fast", {"model": "m", "out": "o", "runtime": "vllm"})
    axes = recipe.axes
    request = Request(layers=layers, targets=(None,), axes=axes, dtype="bfloat16", limits=limits_of(recipe))
    assert request.shapes(layers[0], "keys")[-1].width == 256 and request.widest(layers[0], "keys").width == 4096


def test_padding_is_said(tmp_path):
    with pytest.warns(UserWarning, match="stored heads of 8 numbers are padded"):
        compress(
            tmp_path, model=str(save_tiny(make_tiny("llama_mha"), tmp_path / "tiny")), preset="gqa", kv_budget=1 / 2
        )


def test_a_budget_below_the_narrowest_head_is_refused(tmp_path):
    with pytest.raises(BudgetError, match="the smallest cache of this method keeps 0.16"):
        compress(tmp_path, width=GROUPS, kv_budget=1 / 16)


@pytest.mark.parametrize("recipe", [{"preset": "int8"}, {"preset": "small", "kv_budget": 1 / 4}, {"preset": "auto"}])
def test_what_vllms_own_pages_cannot_hold_goes_into_packed_ones_unpaired(tmp_path, recipe):
    """Keys and values may differ, and heads have any width."""
    material = {"data": "self", "num_samples": 8, "seq_len": 128}
    plan = compress(
        tmp_path, **{"kv_budget": 1 / 3 if "int8" not in recipe["preset"] else None, "calibration": material} | recipe
    )
    assert is_packed(plan) and servable_by(plan)["vllm"] is None
    assert any(spec.head_dim not in WIDTHS for spec in plan.owned) or recipe["preset"] == "int8"


def test_a_bias_on_what_is_stored_needs_packed_pages(tmp_path):
    plan = compress(tmp_path, width=GROUPS, kv_budget=1 / 2)
    first = dataclasses.replace(plan.caches[0], stored_bias=True)
    assert not is_packed(plan) and is_packed(dataclasses.replace(plan, caches=(first, *plan.caches[1:])))


def test_a_runtime_that_nothing_measures_is_not_benched_as_another(monkeypatch):
    monkeypatch.setattr(Transformers, "measured_by", "")
    with pytest.raises(RecipeError, match="says no way to be measured"):
        CliRunner().invoke(app, ["bench", str(MODEL), "--against", str(MODEL)], catch_exceptions=False)
