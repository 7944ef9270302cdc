"""olmo: as llama, with a norm that has no weights."""

from __future__ import annotations

from typing import Any

from kvfold.architectures.base import Architecture, refuse_clipping
from kvfold.plan.layer import AttentionLayer


class Olmo(Architecture):
    model_type = "olmo"
    causal_lm = "OlmoForCausalLM"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        refuse_clipping(module)
        return super().facts(module, index)
