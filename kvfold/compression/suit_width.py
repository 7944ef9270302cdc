"""Which method of width takes the place of a recipe's own, for a model's layers and so many of the bytes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

from kvfold.compression.presets import find_preset
from kvfold.compression.recipe import FOR_SPEED, Recipe
from kvfold.methods.width.base import groups_of
from kvfold.plan.layer import AttentionLayer
from kvfold.runtimes.base import runtime

LITTLE = 1 / 8
"""Share of the bytes that a method is chosen for where a KL is asked for instead of one."""


def suited(recipe: Recipe, layers: Sequence[AttentionLayer]) -> Recipe:
    """The recipe with the width method that takes the place of its own for such layers, and without a finer form of recent
    tokens where they have none."""
    partial = any(0 < layer.rotary_dim < layer.head_dim for layer in layers)
    if recipe.prefer == "speed" and partial and recipe.length["method"] != "identity":
        warnings.warn(
            "keys that are rotated in part have no finer form after rotation: recent tokens stay as all others."
        )
        recipe = dataclasses.replace(recipe, length={"method": "identity"})
    if recipe.prefer == "speed" and recipe.width == FOR_SPEED:
        return dataclasses.replace(recipe, width={**recipe.width, **groups_of(layers)})
    named = recipe.preset is None or find_preset(recipe.preset).fragment.get("width") != recipe.width
    named |= recipe.method("length").drops  # which asks for one latent per layer
    predicts, budget = runtime(recipe.runtime).predicts, recipe.kv_budget or LITTLE
    other = recipe.method("width").instead(layers, budget, named=named, predicts=predicts)
    return recipe if other is None else dataclasses.replace(recipe, width=other)
