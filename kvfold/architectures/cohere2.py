"""cohere2 (Command R7B): as cohere; layers with a window rotate, the others do not."""

from typing import Any

from kvfold.architectures._interleaved import Interleaved


class Cohere2(Interleaved):
    model_type = "cohere2"
    causal_lm = "Cohere2ForCausalLM"
    tables_interleaved = True
    sums_late = True

    def rotary_dim(self, module: Any) -> int:
        return 0 if module.sliding_window is None else super().rotary_dim(module)
