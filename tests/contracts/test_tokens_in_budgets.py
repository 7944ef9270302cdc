"""Budgets where some layers drop tokens and others keep all: what is asked for is not exceeded."""

from __future__ import annotations

import pytest

import kvfold
from kvfold.compression.recipe import make_recipe
from kvfold.errors import BudgetError, RecipeError

LATENTS = {"method": "fisher", "latent": "group", "v_latent": "group", "group_size": 1, "multiple": 2}
RECENCY = {"method": "recency", "sinks": 2, "newest": 3}


def budget(tiny_dir, tmp_path, model, **fields):
    recipe = {"model": str(tiny_dir / model), "out": str(tmp_path / "out"), "context_len": 40, **fields}
    recipe["calibration"] = {"data": "self", "num_samples": 4, "seq_len": 32}
    return kvfold.compress(make_recipe(recipe), device="cpu", overwrite=True).plan.kv_budget


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("gemma2_softcap", {"width": LATENTS, "length": RECENCY | {"sharing": "equal", "kept": 0.5}, "kv_budget": 0.4}),
        ("gemma2_softcap", {"width": LATENTS, "length": RECENCY | {"sharing": "measured"}, "kv_budget": 0.4}),
        (
            "llama_mha",
            {
                "width": LATENTS | {"method": "logit"},
                "length": RECENCY | {"kept": 0.5},
                "keep_layers": [0],
                "kv_budget": 0.5,
            },
        ),
    ],
)
def test_layers_that_drop_nothing_are_paid_in_full(tiny_dir, tmp_path, model, fields):
    assert budget(tiny_dir, tmp_path, model, allocate="greedy", **fields) <= fields["kv_budget"] + 0.005


def test_a_cache_that_is_plain_instead_keeps_all_tokens(tiny_dir, tmp_path):
    fields = {"width": LATENTS, "bits": {"method": "mixed"}, "length": RECENCY | {"kept": 0.5}, "kv_budget": 0.2}
    assert budget(tiny_dir, tmp_path, "llama_mha", allocate="greedy", **fields) <= 0.205


def test_models_in_which_every_layer_has_a_window(tiny_dir, tmp_path):
    """Nothing is dropped: all of it for a share of tokens, refused for a share of bytes."""
    assert budget(tiny_dir, tmp_path, "mistral_window", preset="streaming_llm", length={"kept": 0.5}) == 1
    with pytest.raises(BudgetError, match="no layer drops tokens"):
        budget(tiny_dir, tmp_path, "mistral_window", preset="streaming_llm", kv_budget=0.1)


@pytest.mark.parametrize("kv_budget", [0.3, 0.5])
def test_groups_of_heads_that_drop_tokens(tiny_dir, tmp_path, kv_budget):
    """Keys and values of a layer in equally many heads, whatever is chosen for each; unlike latents are refused at once."""
    fields = {"preset": "observed", "kv_budget": kv_budget}
    alike = {"method": "fisher", "latent": "group", "v_latent": "group"}
    found = budget(tiny_dir, tmp_path, "qwen2_bias_tied", width=alike, **fields)
    assert kv_budget / 2 < found <= kv_budget + 0.005
    with pytest.raises(RecipeError, match=r"set width.latent and width.v_latent to the same"):
        budget(tiny_dir, tmp_path, "qwen2_bias_tied", width=alike | {"v_latent": "layer"}, **fields)
