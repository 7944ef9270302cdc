"""glm4 (GLM-4-0414): as glm, with norms behind attention and MLP as well."""

from kvfold.architectures.glm import Glm


class Glm4(Glm):
    model_type = "glm4"
    causal_lm = "Glm4ForCausalLM"
