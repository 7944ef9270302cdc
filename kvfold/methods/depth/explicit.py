"""explicit: the recipe says for every layer whose cache it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.errors import RecipeError
from kvfold.methods.depth.base import DepthMethod, Sample, Targets, targets_of
from kvfold.plan.layer import AttentionLayer


@dataclass(frozen=True, kw_only=True)
class Explicit(DepthMethod):
    """`uses`: one layer index per layer, its own or an earlier owner's: 0,0,2,2 is CLA2 of four layers."""

    uses: str

    def layouts(self, layers: Sequence[AttentionLayer], sample: Sample | None) -> list[Targets]:
        try:
            uses = [int(entry) for entry in self.uses.split(",")]
        except ValueError as error:
            raise RecipeError(f"depth.uses = {self.uses!r} is not a list such as 0,0,2,2.") from error
        if len(uses) != len(layers):
            raise RecipeError(f"depth.uses names {len(uses)} layers, the model has {len(layers)}.")
        for layer, owner in enumerate(uses):
            if not 0 <= owner <= layer or uses[owner] != owner:
                raise RecipeError(
                    f"depth.uses: layer {layer} uses layer {owner}'s cache; it must be its own or that of an EARLIER layer"
                    " that uses its own."
                )
            if layers[owner].window != layers[layer].window:
                raise RecipeError(f"depth.uses: layers {owner} and {layer} have different sliding windows.")
        return [targets_of(dict(enumerate(uses)))]
