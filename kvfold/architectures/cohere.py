"""cohere (Command R): as llama, with interleaved rotation."""

from __future__ import annotations

from typing import Any

from kvfold.architectures._interleaved import Interleaved
from kvfold.architectures.base import refuse_norms
from kvfold.plan.layer import AttentionLayer


class Cohere(Interleaved):
    model_type = "cohere"
    causal_lm = "CohereForCausalLM"
    tables_interleaved = True
    sums_late = True

    def facts(self, module: Any, index: int) -> AttentionLayer:
        refuse_norms(module, "use_qk_norm")
        return super().facts(module, index)
