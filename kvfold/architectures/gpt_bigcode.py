"""gpt_bigcode (StarCoder): as gpt2, with one key/value head for all query heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvfold.architectures.base import split_interleaved
from kvfold.architectures.gpt2 import Gpt2
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class GptBigCode(Gpt2):
    model_type = "gpt_bigcode"
    causal_lm = "GPTBigCodeForCausalLM"
    no_stock_gqa = "its own shares one key/value head between all or none."
    not_in_vllm = "vLLM 0.32 has no model of this family; starcoder2 is served."

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return AttentionLayer(
            index=index,
            hidden_size=module.embed_dim,
            num_attention_heads=module.num_heads,
            num_kv_heads=module.kv_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
            rotary_dim=0,
            qkv_bias=True,
            o_bias=True,
            attention_dropout=module.attn_pdrop,
            output_dropout=module.resid_dropout.p,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        q, k, v = _split(read("c_attn.weight"), layer)
        q_bias, k_bias, v_bias = _split(read("c_attn.bias"), layer)
        projections = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": read("c_proj.weight")}
        biases = {"q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias, "o_bias": read("c_proj.bias")}
        return AttentionWeights(**projections, **biases)


def _split(fused: Tensor, layer: AttentionLayer) -> list[Tensor]:
    """One key and one value head behind all queries, or q, k and v of one head after the other."""
    if layer.num_kv_heads > 1:
        return split_interleaved(fused, layer)
    H = layer.head_dim
    return list(fused.split([layer.num_attention_heads * H, H, H]))
