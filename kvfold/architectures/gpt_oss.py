"""gpt_oss: windows in every other layer, and a score in each head's softmax that no token goes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class GptOss(Architecture):
    model_type = "gpt_oss"
    causal_lm = "GptOssForCausalLM"
    not_in_vllm = "its softmax has a sink for every head, which kvfold's layers for vLLM do not know yet."
    in_gguf = False  # experts lie there in another order
    mlp_in = ()

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return dataclasses.replace(super().facts(module, index), sinks=True)

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        return dataclasses.replace(super().weights(read, layer), sinks=read("sinks"))
