"""gemma3_text: as llama, with a norm of weight 1 + w on every query and key head; windows have a rotation of their own."""

import dataclasses
from typing import Any

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer


class Gemma3Text(Architecture):
    model_type = "gemma3_text"
    causal_lm = "Gemma3ForCausalLM"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        kind = module.config.layer_types[index]
        return dataclasses.replace(super().facts(module, index), norm_offset=1.0, rotary_kind=kind)

    def rotary_dim(self, module: Any) -> int:
        return module.head_dim  # rope_parameters are per kind of layer
