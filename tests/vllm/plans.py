"""What the tests of vLLM fold, by name."""

CALIBRATION = {"data": "self", "num_samples": 8, "seq_len": 128}
PLANS = {
    "groups": {"preset": "served", "kv_budget": 1 / 3},
    "shared": {"preset": "mlkv", "depth": {"owners": 2}, "width": {"kv_heads": 2}},
    "norms_shared": {"model": "qwen3_norm_window", "preset": "mlkv", "depth": {"owners": 1}, "width": {"kv_heads": 2}},
    "mixed": {
        "model": "neox_partial",
        "runtime": "vllm",
        "width": {"method": "svd_a", "latent": "group", "v_latent": "group"},
        "keep_layers": [0],
        "allocate": "greedy",
        "kv_budget": 0.46,
    },
    "wide": {"preset": "fast", "runtime": "vllm", "kv_budget": 1 / 2},
    "odd_heads": {"model": "qwen2_sink", "preset": "served", "allocate": "uniform", "kv_budget": 1 / 2},
    "kivi": {"preset": "kivi"},
}
"""Of the packaged model: sizes that differ from layer to layer, layers that share a cache, one latent for all heads; and two
that vLLM cannot serve."""
JOINT = {
    "bits": {"method": "mixed", "multiple": 4},
    "allocate": "greedy",
    "kv_budget": 0.15,
    "length": {"method": "recent", "tokens": 16},
}
"""Latents of keys and values, of few numbers."""
PACKED = (
    {
        "auto": {"preset": "auto", "kv_budget": 1 / 8},
        "auto_speed": {"preset": "auto", "prefer": "speed", "kv_budget": 1 / 8},
        "int4": {"preset": "int4"},
        "fp8": {"preset": "fp8"},
        "small": {"preset": "small", "kv_budget": 1 / 4},
        "predicted": {"width": {"method": "mla", "multiple": 4, "leading": 6, "recent_leading": 10}} | JOINT,
        "joint_groups": {"width": {"method": "mla", "multiple": 4, "below": 0, "group_size": 2}} | JOINT,
        "shared_int4": {
            "preset": "mlkv",
            "depth": {"owners": 2},
            "width": {"kv_heads": 2},
            "bits": {"method": "integer", "k_bits": 4, "v_bits": 4},
        },
        "shared_recent": {"depth": {"method": "contiguous", "owners": 2}, "width": {"method": "logit"}} | JOINT,
        "kept": {"preset": "auto", "kv_budget": 1 / 4, "keep_layers": [3]},
        "unequal_groups": {
            "preset": "auto",
            "kv_budget": 1 / 8,
            "length": {"method": "identity"},
            "width": {"method": "fisher", "rope": "on_read", "latent": "group", "group_size": 3, "v_latent": "layer"},
        },
    }
    | {
        f"{family}_auto": {"model": family, "preset": "auto", "kv_budget": 1 / 6}
        for family in (
            "qwen3_norm_window",
            "gemma2_softcap",
            "gemma3_norm",
            "bloom_alibi",
            "neox_partial",
            "phi3_partial",
            "cohere2_nope",
            "glm_interleaved",
            "mixtral_experts",
        )
    }
    | {"qwen3_quarter": {"model": "qwen3_norm_window", "preset": "auto", "kv_budget": 1 / 4}}
    | {"mistral_window_int4": {"model": "mistral_window", "preset": "int4"}}
)
"""In pages of bytes: the default and its fast form, packed heads and float8, numbers as they are with keys rebuilt on read, a
layer that is kept, heads of keys unlike those of values, latents of groups of heads, and of keys and values apart; norms on
keys, windows, capped scores, alibi, neighbours that are rotated together, layers without rotation, experts, models of
transformers'."""
PLANS |= PACKED
CHANGES = {
    "odd_heads": {},
    "qwen2_sink": {"hidden_size": 96},
    "gpt2_conv": {"scale_attn_by_inverse_layer_idx": False},
    "norms_shared": {"layer_types": None, "use_sliding_window": False, "sliding_window": None},
    "qwen3_norm_window": {"layer_types": None, "use_sliding_window": False, "sliding_window": None},
}
"""What vLLM's own models of these families do not have; its Qwen2 has heads of hidden_size / num_attention_heads."""
