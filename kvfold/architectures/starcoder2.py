"""starcoder2: as llama, with biases, one sliding window, and dropout behind attention's output."""

import dataclasses
from typing import Any

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer


class Starcoder2(Architecture):
    model_type = "starcoder2"
    causal_lm = "Starcoder2ForCausalLM"
    mlp_in = ("mlp.c_fc",)
    mlp_out = "mlp.c_proj"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return dataclasses.replace(super().facts(module, index), output_dropout=module.residual_dropout)

    def window(self, module: Any) -> int | None:
        return module.config.sliding_window
