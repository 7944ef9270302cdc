"""qwen3_moe: as qwen3, with experts that files keep one by one."""

from kvfold.architectures.base import Architecture

EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Qwen3Moe(Architecture):
    model_type = "qwen3_moe"
    causal_lm = "Qwen3MoeForCausalLM"
    mlp_in = ()
    experts = EXPERTS
