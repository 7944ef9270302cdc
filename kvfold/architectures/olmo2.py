"""olmo2: as llama, with one norm over all query heads and one over all key heads of a token."""

import dataclasses
from typing import Any

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer


class Olmo2(Architecture):
    model_type = "olmo2"
    causal_lm = "Olmo2ForCausalLM"
    no_stock_gqa = "its norm runs over all key heads of a token at once."

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return dataclasses.replace(super().facts(module, index), flat_norm=True)
