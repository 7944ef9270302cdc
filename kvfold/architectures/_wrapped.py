"""Language models that sit inside a larger one beside a vision tower, whose weights are copied and never run here."""

from __future__ import annotations

from typing import ClassVar

from kvfold.architectures.base import Architecture


class Wrapped(Architecture):
    """`renamed`: beginnings of names in files -> in the current model."""

    no_stock_gqa = "kvfold exports models of text alone."
    not_in_vllm = "kvfold serves models of text alone in vLLM; generate() takes images and text."
    layers = "model.language_model.layers"
    rotary = "model.language_model.rotary_emb"
    beside: ClassVar[tuple[str, ...]] = ("model.vision_tower.", "model.multi_modal_projector.")
    mlp_in = ()
    renamed: ClassVar[dict[str, str]] = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }

    def current_name(self, stored: str) -> str:
        for old, new in self.renamed.items():
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return stored
