"""codegen: as gptj, with q, v and k of a quarter of the heads after the other in one projection."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvfold.architectures.gptj import Gptj
from kvfold.plan.layer import AttentionLayer, AttentionWeights

QUARTERS = 4
"""The family's projection is laid out for four devices, whatever it runs on."""


class CodeGen(Gptj):
    model_type = "codegen"
    causal_lm = "CodeGenForCausalLM"
    not_in_vllm = "vLLM 0.32 has no model of this family; starcoder2 is served."
    dead = (r"\.attn\.(causal_mask|embed_positions)$",)

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        fused = read("qkv_proj.weight").unflatten(0, (QUARTERS, 3, -1)).unbind(1)
        parts = {f"{side}_proj.weight": part.flatten(0, 1) for side, part in zip("qvk", fused, strict=True)}
        return super().weights(lambda name: parts[name] if name in parts else read(name), layer)
