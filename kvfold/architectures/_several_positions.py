"""Language models whose tokens stand at a time, a row and a column at once (M-RoPE, arXiv 2409.12191), beside a tower."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvfold.architectures._wrapped import Wrapped
from kvfold.plan.layer import AttentionLayer


class SeveralPositions(Wrapped):
    passes_keywords = False
    tells_positions = False
    keeps_documents_apart = False
    beside = ("model.visual.",)
    renamed = {  # noqa: RUF012  of files that were written before transformers moved the language model
        "visual.": "model.visual.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.layers.": "model.language_model.layers.",
        "model.norm.": "model.language_model.norm.",
    }

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return dataclasses.replace(super().facts(module, index), position_axes=3)
