"""phi (Phi-1, Phi-1.5, Phi-2): as llama, with partial rotary and biases, and another name for the output's projection."""

from __future__ import annotations

from typing import Any

from kvfold.architectures.base import Architecture, refuse_norms
from kvfold.plan.layer import AttentionLayer


class Phi(Architecture):
    model_type = "phi"
    causal_lm = "PhiForCausalLM"
    output = "dense"
    mlp_in = ("mlp.fc1",)
    mlp_out = "mlp.fc2"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        refuse_norms(module, "qk_layernorm")
        return super().facts(module, index)
