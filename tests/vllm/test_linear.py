"""Maps of packed layers, multiplied as vLLM multiplies its own."""

import pytest
import torch

from kvfold.runtimes.transformers import projections
from kvfold.runtimes.vllm.linear import GroupedLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_map_of_all_heads_is_packed_beside_its_weight(bias, dtype):
    made = GroupedLinear(1, 64, 48, bias=bias, dtype=dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    made.quant_method.process_weights_after_loading(made)
    x = torch.randn(1, 1, 7, 64, dtype=dtype)
    wanted = projections.GroupedLinear.forward(made, x)
    with torch.no_grad():
        assert torch.allclose(made(x), wanted, atol=1e-5 if dtype == torch.float32 else 0.2)
        assert torch.equal(made(x[..., :32]), projections.GroupedLinear.forward(made, x[..., :32]))
    assert made.packed is not None and made.weight.shape == (1, 48, 64)
    # kernels may take a bias in a dtype of their own and turn the one that belongs to the packed weight
    assert (made.packed.bias is None) is not bias and (not bias or made.packed.bias is not made.bias)


def test_maps_of_several_heads_are_not():
    made = GroupedLinear(2, 16, 16)
    torch.nn.init.normal_(made.weight)
    made.quant_method.process_weights_after_loading(made)
    x = torch.randn(1, 2, 3, 16)
    made.eval()  # as an engine does with a model it has loaded
    assert made.packed is None and torch.equal(made(x), projections.GroupedLinear.forward(made, x))
