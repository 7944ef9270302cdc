"""mistral: as llama, with one sliding window for all layers that only the config knows."""

from typing import Any

from kvfold.architectures.base import Architecture


class Mistral(Architecture):
    model_type = "mistral"
    causal_lm = "MistralForCausalLM"

    def window(self, module: Any) -> int | None:
        return module.config.sliding_window
