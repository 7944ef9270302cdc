"""smollm3: as llama; every fourth layer does not rotate."""

from typing import Any

from kvfold.architectures.base import Architecture


class SmolLM3(Architecture):
    model_type = "smollm3"
    causal_lm = "SmolLM3ForCausalLM"

    def rotary_dim(self, module: Any) -> int:
        return super().rotary_dim(module) if module.use_rope else 0
