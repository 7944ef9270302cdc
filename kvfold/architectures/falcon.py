"""falcon: one fused projection of groups of queries with a key and a value each; rotary, in parallel with the MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from kvfold.architectures.base import Architecture
from kvfold.errors import CheckpointError
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class Falcon(Architecture):
    model_type = "falcon"
    causal_lm = "FalconForCausalLM"
    no_stock_gqa = "kvfold does not write its fused projection."
    not_in_vllm = "vLLM's own model adds the biases of attention and MLP later, and kvfold has not been tried in it."
    layers = "transformer.h"
    attention = "self_attention"
    output = "dense"
    rotary = "transformer.rotary_emb"
    keeps_documents_apart = False
    passes_keywords = False
    repeats_heads = True
    in_gguf = False  # its fused projection is stored there in another order
    mlp_in = ()

    def facts(self, module: Any, index: int) -> AttentionLayer:
        config = module.config
        if config.alibi:
            raise CheckpointError(
                "config.json: alibi is true. kvfold folds falcon models whose keys are rotated. Of ALiBi: bloom."
            )
        return AttentionLayer(
            index=index,
            hidden_size=module.hidden_size,
            num_attention_heads=module.num_heads,
            num_kv_heads=module.num_kv_heads,
            head_dim=module.head_dim,
            scaling=module.inv_norm_factor,
            rotary_dim=module.head_dim,
            qkv_bias=config.bias,
            o_bias=config.bias,
        )

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), _split(read("query_key_value.weight"), layer), strict=True))
        if layer.qkv_bias:
            biases = _split(read("query_key_value.bias"), layer)
            parts |= zip(("q_bias", "k_bias", "v_bias"), biases, strict=True)
            parts["o_bias"] = read("dense.bias")
        return AttentionWeights(o_proj=read("dense.weight"), **parts)

    def observable(self, model: nn.Module) -> bool:
        modules: list[Any] = self.modules(model)
        for module in modules:
            module.num_key_value_groups = module.num_heads // module.num_kv_heads
            module.forward = functools.partial(_attend, module)
        return True

    def layer_output(self, hidden_BTD: Tensor) -> Any:
        return hidden_BTD, None


def _attend(
    module: Any, hidden_BTD: Tensor, *, attention_mask: Any, position_embeddings: Any, **rest: Any
) -> tuple[Tensor, None]:
    """What the family's own attention does, by transformers' AttentionInterface."""
    q, k, v = (x.transpose(1, 2) for x in _split_heads(module.query_key_value(hidden_BTD), module))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out_BTNH, _ = attend(module, q, k, v, attention_mask, scaling=module.inv_norm_factor)
    return module.dense(out_BTNH.flatten(2)), None


def _split(fused: Tensor, layer: AttentionLayer) -> list[Tensor]:
    """q, k and v out of a weight or bias whose rows hold, group by group, its queries, its key and its value."""
    each = layer.num_attention_heads // layer.num_kv_heads
    grouped = fused.unflatten(0, (layer.num_kv_heads, each + 2, layer.head_dim))
    return [grouped[:, :each].flatten(0, 2), grouped[:, each].flatten(0, 1), grouped[:, each + 1].flatten(0, 1)]


def _split_heads(fused_BTF: Tensor, module: Any) -> list[Tensor]:
    """[B, T, heads, H] each."""
    each = module.num_heads // module.num_kv_heads
    grouped = fused_BTF.unflatten(2, (module.num_kv_heads, each + 2, module.head_dim))
    return [grouped[:, :, :, :each].flatten(2, 3), grouped[:, :, :, each], grouped[:, :, :, each + 1]]
