"""stablelm: as llama, with partial rotary; StableLM 2 12B has norms of its own for every head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.architectures._own_norms import OwnNorms
from kvfold.plan.folded_weights import FoldedWeights


class StableLm(OwnNorms):
    model_type = "stablelm"
    causal_lm = "StableLmForCausalLM"
    passes_keywords = False
    norm_field = "qk_layernorm"
    norm_names = ("q_layernorm", "k_layernorm")

    def norm_weight(self, read: Callable[[str], Tensor], norm: str, heads: int) -> Tensor:
        return torch.cat([read(f"{norm}.norms.{head}.weight") for head in range(heads)])

    def stock_attention(self, folded: FoldedWeights, head_dim: int) -> dict[str, Tensor]:
        tensors = super().stock_attention(folded, head_dim)
        flat = {norm: tensors.pop(f"{norm}.weight", None) for norm in self.norm_names}
        parts = {norm: weight.split(head_dim) for norm, weight in flat.items() if weight is not None}
        return tensors | {
            f"{norm}.norms.{head}.weight": part for norm, heads in parts.items() for head, part in enumerate(heads)
        }
