"""gpt2: learned positions; q, k and v stacked in one projection that is stored transposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class Gpt2(Architecture):
    model_type = "gpt2"
    causal_lm = "GPT2LMHeadModel"
    no_stock_gqa = "GPTBigCode, the stock class of its arithmetic, shares one key/value head between all or none."
    layers = "transformer.h"
    attention = "attn"
    output = "c_proj"
    rotary = None
    mlp_in = ()

    def current_name(self, stored: str) -> str:
        return stored if stored.startswith(("transformer.", "lm_head.")) else f"transformer.{stored}"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return AttentionLayer(
            index=index,
            hidden_size=module.embed_dim,
            num_attention_heads=module.num_heads,
            num_kv_heads=module.num_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
            rotary_dim=0,
            qkv_bias=True,
            o_bias=True,
            attention_dropout=module.attn_dropout.p,
            output_dropout=module.resid_dropout.p,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        q, k, v = read("c_attn.weight").T.chunk(3)
        q_bias, k_bias, v_bias = read("c_attn.bias").chunk(3)
        return AttentionWeights(
            q_proj=q,
            k_proj=k,
            v_proj=v,
            o_proj=read("c_proj.weight").T,
            q_bias=q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            o_bias=read("c_proj.bias"),
        )
