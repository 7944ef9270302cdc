"""qwen3: as llama, with an RMSNorm on every query and key head before rotation, and an explicit head_dim."""

from kvfold.architectures.base import Architecture


class Qwen3(Architecture):
    model_type = "qwen3"
    causal_lm = "Qwen3ForCausalLM"
