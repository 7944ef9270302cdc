"""DeepSeek-V3's config.json for a Llama-type model, and in what those who read it differ."""

from __future__ import annotations

from typing import Any

from kvfold import registry
from kvfold.architectures.base import empty_model, source_config
from kvfold.checkpoint.source import Source, source_dtype
from kvfold.errors import CheckpointError, RecipeError
from kvfold.plan.layer import AttentionLayer

EPSILONS = {"transformers": 1e-6}
"""Of the norm over a latent, in runtimes that do not take `rms_norm_eps` for it as vLLM does."""
PLAIN_ROTATION = {"vllm"}
"""Runtimes that read every other rope type of DeepSeek's class as YaRN's."""


def epsilon_of(source: Source, runtime: str | None) -> float:
    """Of the norm over the latent, as `runtime` has it. Raises RecipeError where there is no such runtime, or where they
    differ and none is named, CheckpointError where it would read the folder wrongly."""
    if runtime is not None:
        registry.load("runtimes", runtime)
    config = source_config(source.arch, source.checkpoint.config)
    theirs, rope = float(config.rms_norm_eps), config.rope_parameters["rope_type"]
    own, plain = EPSILONS["transformers"], rope == "default"
    differ = []
    if theirs != own:
        differ.append(
            f"rms_norm_eps is {theirs:g}; vLLM takes it for the norm over a latent as well, and transformers {own:g}"
        )
    if not plain:
        differ.append(f"vLLM reads rope_type {rope!r} of DeepSeek's class as YaRN's")
    found = "; ".join(differ)
    if runtime in PLAIN_ROTATION and not plain:
        raise CheckpointError(f"{source.checkpoint.path}: {found}. --runtime transformers is read rightly.")
    if runtime is None and found:
        raise RecipeError(
            f"{source.checkpoint.path}: {found}. Say which is to read it: --runtime transformers, or vllm."
        )
    return EPSILONS.get(runtime or "transformers", theirs)


def dtype_of(source: Source, layer: AttentionLayer) -> str:
    """Of what is made: float16 has no numbers that small."""
    dtype = source_dtype(source.checkpoint, source.arch, layer)
    return "bfloat16" if dtype == "float16" else dtype


def attention_scaling(source: Source) -> float:
    """By which the source's cosines and sines are longer (YaRN)."""
    stock = empty_model(source.arch, source_config(source.arch, source.checkpoint.config))
    return float(stock.get_submodule(source.arch.rotary).attention_scaling)


def deepseek_config(source: Source, rank: int, scaling: float) -> dict[str, Any]:
    """config.json: every MLP is dense, queries have no latent. scaling: `attention_scaling` of the source."""
    layer = source.layers[0]
    stock = source_config(source.arch, source.checkpoint.config).to_dict()
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
        "tie_word_embeddings", "attention_dropout", "rms_norm_eps",
    )  # fmt: skip
    rope = {name: value for name, value in stock["rope_parameters"].items() if not name.startswith("mscale")}
    if rope["rope_type"] == "yarn":  # of `mscale_all_dim` DeepSeek's class scales scores once more
        rope["attention_factor"] = scaling
    return {name: stock[name] for name in kept if name in stock} | {"rope_parameters": rope} | {
        "dtype": dtype_of(source, layer), "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": layer.num_attention_heads, "q_lora_rank": None, "kv_lora_rank": rank,
        "qk_nope_head_dim": layer.head_dim, "qk_rope_head_dim": layer.head_dim, "v_head_dim": layer.head_dim,
        "head_dim": layer.head_dim, "first_k_dense_replace": len(source.layers), "n_routed_experts": 8, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "attention_bias": False,
        "rope_interleave": True,
    }  # fmt: skip
