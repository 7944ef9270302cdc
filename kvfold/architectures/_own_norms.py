"""Families in which every head of queries and keys may have a norm of its own, as their config says.

A stock model may keep the weights of all heads in one module or one module per head; here they are one tensor, head after
head, and the norm works on all heads at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvfold.architectures.base import Architecture
from kvfold.plan.layer import AttentionLayer, AttentionWeights


class OwnNorms(Architecture):
    """`norm_field`: the field of config.json by which a model has them."""

    norm_field: ClassVar[str]

    def facts(self, module: Any, index: int) -> AttentionLayer:
        found = super().facts(module, index)
        return dataclasses.replace(found, own_norms=found.qk_norm, centred_norm=found.qk_norm)

    def norms(self, module: Any) -> tuple[nn.Module | None, nn.Module | None]:
        q_norm, k_norm = super().norms(module)
        eps = module.config.layer_norm_eps
        made = (None if norm is None else HeadNorm(norm, module.head_dim, eps) for norm in (q_norm, k_norm))
        return next(made), next(made)

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        norms = {f"{name}.weight": name for name in self.norm_names}
        heads = dict(zip(self.norm_names, (layer.num_attention_heads, layer.num_kv_heads), strict=True))

        def read_flat(name: str) -> Tensor:
            norm = norms.get(name)
            return read(name) if norm is None else self.norm_weight(read, norm, heads[norm])

        return super().weights(read_flat, layer)

    def norm_weight(self, read: Callable[[str], Tensor], norm: str, heads: int) -> Tensor:
        """[heads*H] of one norm, whose stock module has [heads, H]."""
        return read(f"{norm}.weight").flatten()

    def not_served_by_vllm(self, config: Mapping[str, Any]) -> str | None:
        if config.get(self.norm_field):
            return f"{self.norm_field} is true: every head has a norm of its own, which kvfold does not do there."
        return super().not_served_by_vllm(config)


class HeadNorm(nn.Module):
    """LayerNorm of each head of [..., heads, H] with weights of its own, without biases. weight [heads*H]."""

    def __init__(self, stock: nn.Module, head_dim: int, eps: float) -> None:
        super().__init__()
        weights = [parameter.detach().flatten() for parameter in stock.parameters()]
        self.weight = nn.Parameter(torch.cat(weights).clone())
        self.head_dim, self.eps = head_dim, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normalised = nn.functional.layer_norm(x.to(wide), (self.head_dim,), eps=self.eps)
        return (normalised * self.weight.to(wide).view(-1, self.head_dim)).to(x.dtype)
