"""gemma2: as llama, with capped scores and windows in every other layer."""

import dataclasses
from typing import Any

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer


class Gemma2(Architecture):
    model_type = "gemma2"
    causal_lm = "Gemma2ForCausalLM"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return dataclasses.replace(super().facts(module, index), softcap=module.attn_logit_softcapping)
