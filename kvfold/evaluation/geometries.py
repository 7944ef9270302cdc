"""Published geometries, so that speed can be measured without the weights: a few layers, random numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from kvfold.architectures.base import Architecture, architecture, empty_model
from kvfold.compression.allocate import allocate, choose_layout
from kvfold.compression.hulls import Curves
from kvfold.compression.recipe import Recipe
from kvfold.compression.request import Request, limits_of
from kvfold.compression.suit_width import suited
from kvfold.errors import RecipeError
from kvfold.evaluation.published_shapes import SHAPES
from kvfold.plan.naming import CONFIG_KEY, MODEL_TYPE_PREFIX
from kvfold.plan.plan import CachePlan
from kvfold.registry import unknown
from kvfold.runtimes.transformers.modeling import folded_classes

VOCABULARY = 256
"""Few tokens: two layers must not be drowned by an output layer that serves thirty."""
POSITIONS = 1_000_000

FALL = 14.0
"""Of N numbers the n-th is taken to be worth e^(-FALL n / N): `auto` then stores about as many, in about as many bits, as of
the models that this project trained (at 1/4 seven in ten, of which a third take 8 bits)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A geometry with `layers` of its layers."""

    name: str
    layers: int

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise RecipeError(unknown("shape", self.name, SHAPES))
        if not 1 <= self.layers <= self.published_layers:
            raise RecipeError(f"{self.name} has {self.published_layers} layers; {self.layers} were asked for.")

    @property
    def published_layers(self) -> int:
        fields = SHAPES[self.name]
        return fields.get("num_hidden_layers") or fields["n_layer"]

    def facts(self) -> dict[str, Any]:
        """What a table says of it."""
        return {"shape": self.name, "layers": self.layers, "of_layers": self.published_layers}

    @property
    def arch(self) -> Architecture:
        return architecture(SHAPES[self.name]["model_type"])

    def config(self) -> Any:
        """Of the stock model."""
        fields = {name: value for name, value in SHAPES[self.name].items() if name != "model_type"}
        fields |= {"n_layer" if "n_layer" in fields else "num_hidden_layers": self.layers, "vocab_size": VOCABULARY}
        return self.arch.config_class(
            **fields | {"max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2}
        )

    def plan(self, recipe: Recipe, dtype: str) -> CachePlan:
        """Of a recipe, without calibration: equal shares of a budget, and for methods that go by the spectrum one that falls
        as FALL says."""
        layers = self.arch.describe(empty_model(self.arch, self.config()))
        recipe = suited(recipe, layers)
        axes = recipe.axes
        asked = Request(layers=layers, targets=(None,) * len(layers), axes=axes, dtype=dtype, limits=limits_of(recipe))
        targets = choose_layout(asked, kv_budget=recipe.kv_budget, sample=None)
        request = dataclasses.replace(asked, targets=targets)
        return allocate(request, kv_budget=recipe.kv_budget, strategy="uniform", curves=lambda: _curves(request))

    def stock(self, dtype: str, device: str) -> Any:
        """The stock model with random weights."""
        return self._made(self.arch.model_class, self.config(), dtype, device)

    def folded(self, plan: CachePlan, dtype: str, device: str) -> Any:
        """A folded model with random weights."""
        config_class, model_class = folded_classes(self.arch)
        fields = self.config().to_dict() | {CONFIG_KEY: plan.to_dict()}
        config = config_class.from_dict(fields | {"model_type": MODEL_TYPE_PREFIX + self.arch.model_type})
        return self._made(model_class, config, dtype, device)

    def _made(self, model_class: Any, config: Any, dtype: str, device: str) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                return model_class(config).eval()
        finally:
            torch.set_default_dtype(before)


def _curves(request: Request) -> Curves:
    """What could be stored if all numbers mattered as FALL says."""
    curves, layers = {}, {layer.index: layer for layer in request.owners}
    for (owner, side), options in request.options.items():
        if owner in request.limits.keep_layers:
            curves[owner, side] = [(shape, 0.0) for shape in options]
            continue
        shapes = request.allowed(layers[owner], request.shapes(layers[owner], side))
        spectrum = [math.exp(-FALL * n / shapes[-1].width) for n in range(shapes[-1].width)]
        curves[owner, side] = request.axes.bits.curve(shapes, spectrum, 1.0)
    return curves
