"""opt: learned positions, so that nothing stands between the projections of queries and keys; biases everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class Opt(Architecture):
    model_type = "opt"
    causal_lm = "OPTForCausalLM"
    no_stock_gqa = "no stock class with learned positions shares key/value heads between some query heads."
    layers = "model.decoder.layers"
    output = "out_proj"
    rotary = None
    keeps_documents_apart = False
    mlp_in = ()

    def current_name(self, stored: str) -> str:
        return f"model.{stored}" if stored.startswith("decoder.") else stored

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return AttentionLayer(
            index=index,
            hidden_size=module.embed_dim,
            num_attention_heads=module.num_heads,
            num_kv_heads=module.num_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
            rotary_dim=0,
            qkv_bias=module.enable_bias,
            o_bias=module.enable_bias,
            attention_dropout=module.dropout,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        return super().weights(lambda name: read(name.replace("o_proj", "out_proj")), layer)
