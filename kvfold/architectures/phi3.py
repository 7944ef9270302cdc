"""phi3 (Phi-3, Phi-4-mini): q, k and v stacked in one projection, full or partial rotary, one sliding window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class Phi3(Architecture):
    model_type = "phi3"
    causal_lm = "Phi3ForCausalLM"
    mlp_in = ()

    def facts(self, module: Any, index: int) -> AttentionLayer:
        config = module.config
        return AttentionLayer(
            index=index,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
            rotary_dim=self.rotary_dim(module),
            window=config.sliding_window,
            attention_dropout=module.attention_dropout,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        heads = (layer.num_attention_heads, layer.num_kv_heads, layer.num_kv_heads)
        q, k, v = read("qkv_proj.weight").split([count * layer.head_dim for count in heads])
        return AttentionWeights(q_proj=q, k_proj=k, v_proj=v, o_proj=read("o_proj.weight"))

    def stock_attention(self, folded: FoldedWeights, head_dim: int) -> dict[str, Tensor]:
        assert folded.k_proj is not None and folded.v_proj is not None, (
            "no layer of a stock model reads another's cache"
        )
        stacked = torch.cat([folded.q_proj, folded.k_proj, folded.v_proj])
        return {"qkv_proj.weight": stacked, "o_proj.weight": folded.o_proj}
