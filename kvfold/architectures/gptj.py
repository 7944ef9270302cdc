"""gptj (GPT-J): rotates neighbours in a part of each head, by tables that attention makes itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvfold.architectures._interleaved import Interleaved
from kvfold.errors import CheckpointError
from kvfold.plan.layer import AttentionLayer

BASE = 10000
SIZES = (("n_layer", "num_hidden_layers"), ("n_positions", "max_position_embeddings"), ("rotary_dim",))
"""By whichever name a config.json has them."""
MOST_IN_TABLES = 2**28


class Gptj(Interleaved):
    model_type = "gptj"
    causal_lm = "GPTJForCausalLM"
    not_in_vllm = "kvfold has not been tried in vLLM's own model of this family."
    layers = "transformer.h"
    attention = "attn"
    output = "out_proj"
    rotary = None
    dead = (r"\.attn\.(bias|masked_bias|embed_positions)$",)
    passes_keywords = False
    attn_implementation = "eager"
    in_gguf = False
    mlp_in = ()

    def check_sizes(self, config: Mapping[str, Any]) -> None:
        numbers = math.prod(next((config[name] for name in names if config.get(name)), 1) for names in SIZES)
        if numbers > MOST_IN_TABLES:
            raise CheckpointError(
                "config.json: n_layer, n_positions and rotary_dim ask for rotary tables of more than"
                f" {MOST_IN_TABLES:,} numbers."
            )

    def facts(self, module: Any, index: int) -> AttentionLayer:
        if not module.rotary_dim or module.rotary_dim > module.head_dim or module.rotary_dim % 2:
            raise CheckpointError(
                f"config.json: rotary_dim is {module.rotary_dim}; kvfold folds {self.model_type} models that rotate pairs of"
                f" the {module.head_dim} numbers of each head, so many of them."
            )
        return AttentionLayer(
            index=index,
            hidden_size=module.embed_dim,
            num_attention_heads=module.num_attention_heads,
            num_kv_heads=module.num_attention_heads,
            head_dim=module.head_dim,
            scaling=1 / module.scale_attn,
            rotary_dim=module.rotary_dim,
            rotary_speeds=_speeds(module.rotary_dim),
            interleaved=True,
            makes_tables=True,
            attention_dropout=module.attn_dropout.p,
            output_dropout=module.resid_dropout.p,
        )

    def observable(self, model: nn.Module) -> bool:
        modules: list[Any] = self.modules(model)
        for module in modules:
            module.num_key_value_groups = 1
            module._attn = functools.partial(_attend, module, model.config)
        return True

    def layer_output(self, hidden_BTD: Tensor) -> Any:
        return hidden_BTD, None


def _speeds(rotary_dim: int) -> tuple[float, ...]:
    """Radians per token of each pair, rounded as the family's own code rounds them."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu") / rotary_dim
    return tuple((1.0 / BASE**exponents).tolist())


def _attend(
    module: Any, config: PretrainedConfig, q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """[B, N, T, H]: scores and averages of the family's own attention, by transformers' AttentionInterface."""
    attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    out_BTNH, probs = attend(module, q_BNTH, k_BNSH, v_BNSH, mask, scaling=1 / module.scale_attn)
    return out_BTNH.transpose(1, 2), probs
