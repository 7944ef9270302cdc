"""Maps of a packed layer, multiplied as vLLM multiplies those of its own layers: packed when the weights are there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from kvfold.runtimes.transformers import projections


class Linear(nn.Linear):
    """Takes the place of torch's; vLLM's `quant_method` packs the weight after loading, and may take it away for that."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.quant_method: Any = UnquantizedLinearMethod()

    def keep(self) -> None:
        """Leave the weight as it is: others read it."""
        self.quant_method = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same with another bias, or none."""
        if self.quant_method is None:
            return nn.functional.linear(x, self.weight, bias)
        return self.quant_method.apply(self, x, bias)


class GroupedLinear(projections.GroupedLinear):
    """Takes the place of ours; on a CPU one map of all heads is packed as well, beside the weight, which others read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.packed: nn.Module | None = None
        self.quant_method: Any = _PackedBeside()

    def forward(self, x: Tensor, *, heads: int | None = None, transposed: bool = False, last: bool = False) -> Tensor:
        part = heads is not None or transposed or x.shape[-1] != self.weight.shape[2]
        if self.packed is None or part:
            return super().forward(x, heads=heads, transposed=transposed, last=last)
        out: Tensor = self.quant_method.apply(self.packed, x, self.packed.bias)
        return out


class _PackedBeside(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        weight = layer.weight
        if len(weight) > 1 or weight.device.type != "cpu":
            return
        layer.packed = nn.Module()
        layer.packed.weight = nn.Parameter(weight[0].detach().clone(), requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias[0].detach().clone(), requires_grad=False)
        layer.packed.bias = bias  # its own: some kernels take it in float32, and turn it
        super().process_weights_after_loading(layer.packed)
