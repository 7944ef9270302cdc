"""exaone4: as qwen3; beside windows in some layers, the others do not rotate."""

from typing import Any

from kvfold.architectures.base import Architecture


class Exaone4(Architecture):
    model_type = "exaone4"
    causal_lm = "Exaone4ForCausalLM"

    def rotary_dim(self, module: Any) -> int:
        return super().rotary_dim(module) if module.sliding_window is None or module.is_sliding else 0

    def window(self, module: Any) -> int | None:
        return module.sliding_window if module.is_sliding else None
