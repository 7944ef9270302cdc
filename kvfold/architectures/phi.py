"""phi (Phi-1, Phi-1.5, Phi-2): as llama, with partial rotary and biases, and another name for the output's projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvfold.architectures.base import Architecture, refuse_norms
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class Phi(Architecture):
    model_type = "phi"
    causal_lm = "PhiForCausalLM"
    output = "dense"
    mlp_in = ("mlp.fc1",)
    mlp_out = "mlp.fc2"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        refuse_norms(module, "qk_layernorm")
        config = module.config
        return AttentionLayer(
            index=index,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
            rotary_dim=module.rotary_ndims,
            qkv_bias=True,
            o_bias=True,
            attention_dropout=module.attention_dropout,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        return super().weights(lambda name: read(name.replace("o_proj", "dense")), layer)

    def stock_attention(self, folded: FoldedWeights) -> dict[str, Tensor]:
        return {name.replace("o_proj", "dense"): x for name, x in super().stock_attention(folded).items()}
