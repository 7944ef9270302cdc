"""llama: separate projections, full rotary, optional biases on all four."""

from kvfold.architectures.base import Architecture


class Llama(Architecture):
    model_type = "llama"
    causal_lm = "LlamaForCausalLM"
