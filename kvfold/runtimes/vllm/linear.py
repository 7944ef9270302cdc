"""Maps of a packed layer, multiplied as vLLM multiplies those of its own layers: packed when the weights are there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod


class Linear(nn.Linear):
    """Takes the place of torch's; vLLM's `quant_method` packs the weight after loading, and may take it away for that."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.quant_method: Any = UnquantizedLinearMethod()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same with another bias, or none."""
        return self.quant_method.apply(self, x, bias)
