"""stablelm: as llama, with partial rotary."""

from __future__ import annotations

from typing import Any

from kvfold.architectures.base import Architecture, refuse_norms
from kvfold.plan.layer import AttentionLayer


class StableLm(Architecture):
    model_type = "stablelm"
    causal_lm = "StableLmForCausalLM"
    passes_keywords = False

    def facts(self, module: Any, index: int) -> AttentionLayer:
        refuse_norms(module, "qk_layernorm")
        return super().facts(module, index)
