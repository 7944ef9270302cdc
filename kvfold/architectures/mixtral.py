"""mixtral: as mistral, with experts that files keep one by one."""

from typing import ClassVar

from kvfold.architectures.mistral import Mistral


class Mixtral(Mistral):
    model_type = "mixtral"
    causal_lm = "MixtralForCausalLM"
    mlp_in = ()
    experts: ClassVar = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}

    def stored_name(self, current: str) -> str:
        return current.replace(".mlp.", ".block_sparse_moe.")
