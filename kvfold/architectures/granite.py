"""granite: as llama, with a score scale from its config."""

from kvfold.architectures.base import Architecture


class Granite(Architecture):
    model_type = "granite"
    causal_lm = "GraniteForCausalLM"
