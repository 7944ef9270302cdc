"""Families that people bring and kvfold does not fold: why, and what is nearest."""

LATENT = "its cache holds one small latent per token already."
STATES = "its layers keep states of one size, or a few layers of attention among such; their cache is small already."

REFUSED = {
    "gpt_neo": "every other layer attends to a band whose mask it makes itself; gpt_neox and gpt2 are folded.",
    "mllama": "it attends to images by layers of their own; llama (3.x) of text alone is folded.",
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "jamba", "rwkv", "recurrent_gemma", "zamba2", "qwen3_next"), STATES
    ),
    **dict.fromkeys(
        ("t5", "bart", "mbart", "pegasus", "whisper"), "it is no decoder alone; kvfold folds decoders of text."
    ),
    **dict.fromkeys(
        ("bert", "roberta", "modernbert", "deberta-v2"), "it has no KV cache: it reads whole texts at once."
    ),
}
"""model_type -> the reason."""
