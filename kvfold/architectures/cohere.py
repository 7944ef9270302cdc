"""cohere (Command R): as llama, with interleaved rotation; in larger ones (Command R+) with norms of each head."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvfold.architectures._interleaved import Interleaved
from kvfold.plan.layer import AttentionLayer


class Cohere(Interleaved):
    model_type = "cohere"
    causal_lm = "CohereForCausalLM"
    tables_interleaved = True
    sums_late = True

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return dataclasses.replace(super().facts(module, index), head_norms=module.use_qk_norm)
