"""Whether somebody watches what is done with tensors, which kernels that read their memory would hide."""

from __future__ import annotations

import torch
from torch import Tensor


def recorded(*tensors: Tensor) -> bool:
    """Whether somebody records or transforms what is done with these tensors, so that their memory means nothing."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    real = (Tensor, torch.nn.Parameter)
    return any(type(x) not in real or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def followed(*tensors: Tensor) -> bool:
    """Whether somebody wants gradients of what is done with these tensors, or a graph of it."""
    return recorded(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
