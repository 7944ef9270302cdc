"""glm (GLM-4): as llama, with half of each head rotated, interleaved, and gate and up projections in one."""

from kvfold.architectures._interleaved import Interleaved


class Glm(Interleaved):
    model_type = "glm"
    causal_lm = "GlmForCausalLM"
    mlp_in = ()
