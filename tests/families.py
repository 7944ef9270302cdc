"""Configs of tiny models of families that differ from others in what surrounds attention, or little: test_families.py."""

import transformers as tf

FAMILIES = {
    "starcoder2_bias": (tf.Starcoder2Config, {"sliding_window": None, "use_bias": True}),
    "phi_partial": (
        tf.PhiConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "stablelm_partial": (tf.StableLmConfig, {"use_qkv_bias": True}),
    "phi_norms": (tf.PhiConfig, {"qk_layernorm": True, "layer_norm_eps": 1e-6}),
    "stablelm_own_norms": (tf.StableLmConfig, {"qk_layernorm": True, "layer_norm_eps": 1e-6}),
    "smollm3_nope": (tf.SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "exaone4_nope": (tf.Exaone4Config, {"sliding_window": 9, "sliding_window_pattern": 2}),
    "olmo_plain": (tf.OlmoConfig, {}),
    "cohere_interleaved": (tf.CohereConfig, {}),
    "cohere_own_norms": (tf.CohereConfig, {"use_qk_norm": True, "layer_norm_eps": 1e-6}),
    "cohere2_nope": (tf.Cohere2Config, {"sliding_window": 9, "sliding_window_pattern": 3}),
    "glm_interleaved": (tf.GlmConfig, {"head_dim": 16, "attention_bias": True}),
    "glm4_interleaved": (tf.Glm4Config, {"head_dim": 16, "attention_bias": True}),
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES |= {
    "mixtral_experts": (tf.MixtralConfig, EXPERTS | {"sliding_window": None, "head_dim": 16}),
    "qwen3_moe_experts": (
        tf.Qwen3MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe_experts": (
        tf.Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "olmoe_experts": (tf.OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6}),
}
FAMILIES |= {
    "gpt_oss_experts": (
        tf.GptOssConfig,
        EXPERTS
        | {
            "head_dim": 16,
            "sliding_window": 9,
            "intermediate_size": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES |= {
    "bigcode_one_head": (
        tf.GPTBigCodeConfig,
        {"num_key_value_heads": 1, "num_attention_heads": 4, "n_head": 4, "n_layer": 3, "n_embd": 64},
    ),
    "falcon_one_head": (tf.FalconConfig, {"num_key_value_heads": 1, "num_attention_heads": 4, "bias": True}),
    "gptj_partial": (tf.GPTJConfig, {"num_attention_heads": 4, "num_key_value_heads": 4, "rotary_dim": 8}),
    "mpt_alibi": (tf.MptConfig, {"num_key_value_heads": 8, "max_seq_len": 512}),
    "codegen_partial": (tf.CodeGenConfig, {"num_key_value_heads": 8, "rotary_dim": 4}),
    "falcon_groups": (tf.FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 4}),
    "gemma3_beside_vision": (
        tf.Gemma3Config,
        {
            "text_config": {
                "head_dim": 16,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_id": 3,
        },
    ),
    "mistral3_beside_vision": (
        tf.Mistral3Config,
        {
            "text_config": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", "head_dim": 16} | VISION | {"image_size": 56},
            "image_token_id": 3,
            "image_token_index": 3,
        },
    ),
}
CHUNKS = {
    "attention_chunk_size": 9,
    "head_dim": 16,
    "intermediate_size_mlp": 80,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "no_rope_layers": [1, 0, 1],
    "floor_scale": 5,
    "attn_scale": 0.3,
    "rms_norm_eps": 1e-6,
}
FAMILIES |= {
    "llama4_chunks": (tf.Llama4TextConfig, CHUNKS),
    "llama4_no_norm": (
        tf.Llama4TextConfig,
        CHUNKS | {"use_qk_norm": False, "attention_bias": True, "attn_temperature_tuning": False},
    ),
    "llama4_beside_vision": (
        tf.Llama4Config,
        {
            "text_config": CHUNKS,
            "vision_config": VISION
            | {
                "intermediate_size": 128,
                "image_size": 56,
                "vision_output_dim": 24,
                "projector_input_dim": 24,
                "projector_output_dim": 24,
            },
            "image_token_index": 3,
        },
    ),
}
ALONG_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64, "hidden_size": 32}
QWEN_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
FAMILIES |= {
    "qwen2_vl_beside_vision": (
        tf.Qwen2VLConfig,
        {
            "text_config": {"rope_parameters": ALONG_AXES},
            "vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        }
        | QWEN_TOKENS,
    ),
    "qwen2_5_vl_beside_vision": (
        tf.Qwen2_5_VLConfig,
        {
            "text_config": {"rope_parameters": ALONG_AXES},
            "vision_config": QWEN_VISION | {"intermediate_size": 48, "fullatt_block_indexes": [1], "window_size": 56},
        }
        | QWEN_TOKENS,
    ),
    "qwen3_vl_beside_vision": (
        tf.Qwen3VLConfig,
        {
            "text_config": {"head_dim": 16, "rope_parameters": ALONG_AXES | {"mrope_section": [4, 2, 2]}},
            "vision_config": QWEN_VISION | {"intermediate_size": 48, "deepstack_visual_indexes": [0, 1]},
        }
        | QWEN_TOKENS,
    ),
}
