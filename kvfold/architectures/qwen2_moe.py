"""qwen2_moe: as qwen2, with experts that files keep one by one, and one that all tokens share."""

from kvfold.architectures.base import Architecture
from kvfold.architectures.qwen3_moe import EXPERTS


class Qwen2Moe(Architecture):
    model_type = "qwen2_moe"
    causal_lm = "Qwen2MoeForCausalLM"
    mlp_in = ()
    experts = EXPERTS
