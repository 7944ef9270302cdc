"""llama4_text: layers that rotate and see chunks of positions, beside layers whose queries grow with their position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm

from kvfold.architectures._interleaved import Interleaved
from kvfold.errors import CheckpointError
from kvfold.plan.layer import AttentionLayer, AttentionWeights
from kvfold.plan.typed import shortened


class Llama4Text(Interleaved):
    """Its norm of queries and keys has no weights and stands behind the rotation, which leaves the length of a head as it is:
    here it stands before, with weights of one. A chunk is a mask of the family's own, and a cache keeps as many tokens for it
    as for a sliding window of its size."""

    model_type = "llama4_text"
    causal_lm = "Llama4ForCausalLM"
    base = "model"
    passes_keywords = False
    tells_positions = False
    keeps_documents_apart = False  # chunks begin with a row, not with a document in it
    not_in_vllm = "attention_chunk_size cuts positions into chunks, by masks that kvfold's layers for vLLM do not know."
    in_gguf = False
    mlp_in = ()

    def describe(self, model: nn.Module) -> list[AttentionLayer]:
        assert self.rotary is not None, "some layers rotate"
        layers, scale = super().describe(model), model.get_submodule(self.rotary).attention_scaling
        if scale != 1 and any(layer.qk_norm for layer in layers):
            raise CheckpointError(
                f"config.json: rope_parameters scale rotary tables by {scale}, which use_qk_norm, behind the rotation, takes"
                " back; kvfold normalises before it. It folds models of this family with rope_type default or llama3."
            )
        return layers

    def facts(self, module: Any, index: int) -> AttentionLayer:
        config, tuned = module.config, module.attn_temperature_tuning and not module.use_rope
        _check_lengths(config)
        return dataclasses.replace(
            super().facts(module, index),
            qk_norm=hasattr(module, "qk_norm"),
            temperature=(config.attn_scale, config.floor_scale) if tuned else None,
        )

    def rotary_dim(self, module: Any) -> int:
        return super().rotary_dim(module) if module.use_rope else 0

    def window(self, module: Any) -> int | None:
        config = module.config
        return config.attention_chunk_size if config.layer_types[module.layer_idx] == "chunked_attention" else None

    def norms(self, module: Any) -> tuple[nn.Module | None, nn.Module | None]:
        if not hasattr(module, "qk_norm"):
            return None, None
        sizes, like = (module.head_dim, module.config.rms_norm_eps), module.q_proj.weight
        return Llama4TextRMSNorm(*sizes).to(like), Llama4TextRMSNorm(*sizes).to(like)

    def weights(self, read: Callable[[str], Tensor], layer: AttentionLayer) -> AttentionWeights:
        ones_H = torch.ones(layer.head_dim, dtype=torch.float64)
        made = {f"{name}.weight": ones_H for name in self.norm_names}
        return super().weights(lambda name: made[name] if name in made else read(name), layer)


def _check_lengths(config: Any) -> None:
    """Raise CheckpointError where lengths by which masks and temperatures are made are none."""
    for name in ("attention_chunk_size", "floor_scale"):
        value = getattr(config, name)
        if value is None or value < 1:
            raise CheckpointError(
                f"config.json: {name} is {shortened(value)}, where transformers' own model needs a number of tokens. Beside"
                " one, layer_types of full_attention make no chunks, attn_temperature_tuning false no temperatures."
            )
