"""mpt: one projection for q, k and v, ALiBi as a bias of positions beside masks of what is not seen; no biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.errors import CheckpointError
from kvfold.plan.layer import AttentionLayer, AttentionWeights

USUAL = {
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "qk_ln": False,
    "prefix_lm": False,
    "alibi": True,
    "alibi_bias_max": 8,
}
"""Fields of attn_config -> what kvfold folds; transformers' own code looks at no other of them than clip_qkv."""


class Mpt(Architecture):
    model_type = "mpt"
    causal_lm = "MptForCausalLM"
    no_stock_gqa = "its own has as many key/value heads as query heads."
    not_in_vllm = "vLLM 0.32 has no model of this family; bloom is served."
    layers = "transformer.blocks"
    attention = "attn"
    output = "out_proj"
    rotary = None
    keeps_documents_apart = False
    passes_keywords = False
    attn_implementation = "eager"
    mlp_in = ()

    def facts(self, module: Any, index: int) -> AttentionLayer:
        return AttentionLayer(
            index=index,
            hidden_size=module.hidden_size,
            num_attention_heads=module.n_heads,
            num_kv_heads=module.n_heads,
            head_dim=module.head_dim,
            scaling=module.softmax_scale,
            rotary_dim=0,
            alibi=True,
            attention_dropout=module.attn_dropout_p,
        )

    def describe(self, model: Any) -> list[AttentionLayer]:
        for field, usual in USUAL.items():
            if (found := getattr(model.config.attn_config, field)) != usual:
                raise CheckpointError(
                    f"config.json: attn_config.{field} is {found}; kvfold folds mpt models where it is {usual}."
                )
        return super().describe(model)

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        q, k, v = read("Wqkv.weight").chunk(3)
        return AttentionWeights(q_proj=q, k_proj=k, v_proj=v, o_proj=read("out_proj.weight"))

    def watch(self, module: Any, observer: Callable[[Tensor, Tensor, Tensor], None]) -> Any:
        def hook(projection: Any, args: Any, out: Tensor) -> Tensor:
            heads = [part.unflatten(2, (module.n_heads, -1)).transpose(1, 2) for part in out.chunk(3, dim=2)]
            observer(*heads)
            # what attention goes on with is made of what was shown, so that gradients by that exist
            return torch.cat([x.transpose(1, 2).flatten(2) for x in heads], dim=2)

        return module.Wqkv.register_forward_hook(hook)

    def layer_output(self, hidden_BTD: Tensor) -> Any:
        return hidden_BTD, None
