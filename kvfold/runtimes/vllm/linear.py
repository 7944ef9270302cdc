"""Maps of a folded layer, multiplied as vLLM multiplies those of its own layers: packed when the weights are there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod


class Multiplied(nn.Module):
    """A module whose weight [out, in] vLLM's `quant_method` packs after loading, and may take away for that."""

    weight: Any
    bias: Any
    quant_method: Any

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same with another bias, or none."""
        if not hasattr(self, "quant_method"):
            return nn.functional.linear(x, self.weight, bias)
        return self.quant_method.apply(self, x, bias)


class Linear(Multiplied, nn.Linear):
    """Takes the place of torch's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.quant_method = UnquantizedLinearMethod()
