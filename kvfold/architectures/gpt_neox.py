"""gpt_neox (Pythia): one fused projection that interleaves q, k and v per head, partial rotary, parallel residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvfold.architectures.base import Architecture, split_interleaved
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class GPTNeoX(Architecture):
    model_type = "gpt_neox"
    causal_lm = "GPTNeoXForCausalLM"
    no_stock_gqa = "its own has as many key/value heads as query heads."
    layers = "gpt_neox.layers"
    attention = "attention"
    output = "dense"
    rotary = "gpt_neox.rotary_emb"
    mlp_in = ("mlp.dense_h_to_4h",)
    mlp_out = "mlp.dense_4h_to_h"

    def current_name(self, stored: str) -> str:
        return "lm_head.weight" if stored == "embed_out.weight" else stored

    def facts(self, module: Any, index: int) -> AttentionLayer:
        config = module.config
        return AttentionLayer(
            index=index,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=module.head_size,
            scaling=module.scaling,
            rotary_dim=module.rotary_ndims,
            qkv_bias=module.query_key_value.bias is not None,
            o_bias=module.dense.bias is not None,
            attention_dropout=module.attention_dropout,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        parts = split_interleaved(read("query_key_value.weight"), layer)
        tensors = dict(zip(("q_proj", "k_proj", "v_proj"), parts, strict=True))
        if layer.qkv_bias:
            parts = split_interleaved(read("query_key_value.bias"), layer)
            tensors |= zip(("q_bias", "k_bias", "v_bias"), parts, strict=True)
        if layer.o_bias:
            tensors["o_bias"] = read("dense.bias")
        return AttentionWeights(o_proj=read("dense.weight"), **tensors)
