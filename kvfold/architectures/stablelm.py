"""stablelm: as llama, with partial rotary; in larger ones with norms of each head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.architectures.base import Architecture
from kvfold.plan.folded_weights import FoldedWeights
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class StableLm(Architecture):
    model_type = "stablelm"
    causal_lm = "StableLmForCausalLM"
    passes_keywords = False

    def facts(self, module: Any, index: int) -> AttentionLayer:
        has = bool(module.qk_layernorm)
        return dataclasses.replace(super().facts(module, index), qk_norm=has, head_norms=has)

    def norms(self, module: Any) -> tuple[nn.Module | None, nn.Module | None]:
        if not module.qk_layernorm:
            return None, None
        return HeadNorms(module.q_layernorm.norms), HeadNorms(module.k_layernorm.norms)

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        found = super().weights(read, dataclasses.replace(layer, qk_norm=False))
        if not layer.qk_norm:
            return found
        heads = {"q": layer.num_attention_heads, "k": layer.num_kv_heads}
        norms = {
            f"{side}_norm": torch.stack([read(f"{side}_layernorm.norms.{head}.weight") for head in range(count)])
            for side, count in heads.items()
        }
        return dataclasses.replace(found, **norms)

    def stock_attention(self, folded: FoldedWeights) -> dict[str, Tensor]:
        tensors = super().stock_attention(folded)
        for side in "qk":
            for head, weight_H in enumerate(tensors.pop(f"{side}_norm.weight", ())):
                tensors[f"{side}_layernorm.norms.{head}.weight"] = weight_H
        return tensors


class HeadNorms(nn.Module):
    """LayerNorms of the heads of [B, T, heads, H] as one module. weight [heads, H]."""

    def __init__(self, norms: nn.ModuleList) -> None:
        super().__init__()
        each: list[Any] = list(norms)
        self.eps = each[0].eps
        self.weight = nn.Parameter(torch.stack([norm.weight.detach() for norm in each]))

    def forward(self, x_BTNH: Tensor) -> Tensor:
        return nn.functional.layer_norm(x_BTNH, x_BTNH.shape[-1:], eps=self.eps) * self.weight
