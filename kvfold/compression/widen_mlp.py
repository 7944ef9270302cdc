"""Giving the parameters that a smaller cache saves back to the MLPs, without changing their function (arXiv 2406.09297)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.architectures.base import Architecture
from kvfold.errors import RecipeError

SIZE = "intermediate_size"
"""The field of config.json that holds the number of neurons."""


def widened_size(arch: Architecture, config: dict[str, int], layers: int, saved: int) -> int:
    """Neurons per MLP that take `saved` parameters, spread evenly over the layers (papers' count: biases are left out).

    Raises RecipeError for a family whose MLP has no width of its own.
    """
    if not arch.mlp_in or SIZE not in config:
        raise RecipeError(f"keep_parameters: the MLP of a {arch.model_type} model has no width of its own to enlarge.")
    return config[SIZE] + max(round(saved / layers / config["hidden_size"]) // (len(arch.mlp_in) + 1), 0)


def widen(arch: Architecture, name: str, tensor: Tensor, size: int) -> Tensor:
    """A tensor of the checkpoint with `size` neurons where it belongs to an MLP, else as it is.

    New neurons see what the first ones see, and nothing reads them yet: their output columns are zero. So the function
    is the same to the last bit, and training finds a use for them.
    """
    if any(f".{stem}." in name for stem in arch.mlp_in):
        return torch.cat([tensor, tensor[torch.arange(size - len(tensor)) % len(tensor)]])
    if f".{arch.mlp_out}.weight" in name:
        return torch.cat([tensor, tensor.new_zeros(len(tensor), size - tensor.shape[1])], dim=1)
    return tensor
