"""olmoe: as olmo2, with experts that files keep one by one."""

from __future__ import annotations

from typing import Any

from kvfold.architectures.base import refuse_clipping
from kvfold.architectures.olmo2 import Olmo2
from kvfold.architectures.qwen3_moe import EXPERTS
from kvfold.plan.layer import AttentionLayer


class Olmoe(Olmo2):
    model_type = "olmoe"
    causal_lm = "OlmoeForCausalLM"
    mlp_in = ()
    experts = EXPERTS

    def facts(self, module: Any, index: int) -> AttentionLayer:
        refuse_clipping(module)
        return super().facts(module, index)

    def window(self, module: Any) -> int | None:
        return getattr(module.config, "sliding_window", None)
