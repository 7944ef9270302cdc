"""phi (Phi-1, Phi-1.5, Phi-2): as llama, with partial rotary and biases, and another name for the output's projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer


class Phi(Architecture):
    model_type = "phi"
    causal_lm = "PhiForCausalLM"
    output = "dense"
    mlp_in = ("mlp.fc1",)
    mlp_out = "mlp.fc2"
    norm_names = ("q_layernorm", "k_layernorm")

    def facts(self, module: Any, index: int) -> AttentionLayer:
        found = super().facts(module, index)
        return dataclasses.replace(found, centred_norm=found.qk_norm, norm_bias=found.qk_norm)

    def not_served_by_vllm(self, config: Mapping[str, Any]) -> str | None:
        if config.get("qk_layernorm"):
            return "qk_layernorm is true: vLLM's own model of this family has no norms of queries and keys."
        return super().not_served_by_vllm(config)
