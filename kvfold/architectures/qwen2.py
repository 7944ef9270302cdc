"""qwen2: as llama, with biases on queries, keys and values but not on the output, and windows per layer type."""

from kvfold.architectures.base import Architecture


class Qwen2(Architecture):
    model_type = "qwen2"
    causal_lm = "Qwen2ForCausalLM"
