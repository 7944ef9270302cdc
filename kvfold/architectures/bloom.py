"""bloom: one fused projection that interleaves q, k and v per head, ALiBi, and a residual that attention itself adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.architectures.base import Architecture, split_interleaved
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class Bloom(Architecture):
    model_type = "bloom"
    causal_lm = "BloomForCausalLM"
    no_stock_gqa = (
        "its own has as many key/value heads as query heads, and Falcon, the stock class with ALiBi and grouped queries,"
        " scales ALiBi by 1/sqrt(head_dim)."
    )
    layers = "transformer.h"
    attention = "self_attention"
    output = "dense"
    rotary = None
    keeps_documents_apart = False
    passes_keywords = False
    attn_implementation = "eager"
    mlp_in = ()

    def current_name(self, stored: str) -> str:
        return stored if stored.startswith(("transformer.", "lm_head.")) else f"transformer.{stored}"

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return AttentionLayer(
            index=index,
            hidden_size=module.hidden_size,
            num_attention_heads=module.num_heads,
            num_kv_heads=module.num_heads,
            head_dim=module.head_dim,
            scaling=module.inv_norm_factor,
            rotary_dim=0,
            alibi=True,
            qkv_bias=True,
            o_bias=True,
            attention_dropout=module.attention_dropout.p,
            output_dropout=module.hidden_dropout,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        q, k, v = split_interleaved(read("query_key_value.weight"), layer)
        q_bias, k_bias, v_bias = split_interleaved(read("query_key_value.bias"), layer)
        return AttentionWeights(
            q_proj=q,
            k_proj=k,
            v_proj=v,
            o_proj=read("dense.weight"),
            q_bias=q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            o_bias=read("dense.bias"),
        )

    def watch(self, module: Any, observer: Callable[[Tensor, Tensor, Tensor], None]) -> Any:
        def hook(projection: Any, args: Any, out: Tensor) -> Tensor:
            heads = module._reshape(out)
            observer(*heads)
            # what attention goes on with is made of what was shown, so that gradients by that exist
            return torch.stack([x.transpose(1, 2) for x in heads], dim=3).flatten(2)

        return module.query_key_value.register_forward_hook(hook)

    def layer_output(self, hidden_BTD: Tensor) -> Any:
        return hidden_BTD, None

    def for_rows(self, call: dict[str, Any], rows: int) -> dict[str, Any]:
        return call | {"alibi": call["alibi"].repeat(rows, 1, 1)}
