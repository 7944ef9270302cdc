"""Experts of models of which only facts are read: they take no memory, not even while they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MAKERS = (torch.zeros, torch.empty)


class ExpertsOnMeta(TorchFunctionMode):
    """Numbers that are made by three sizes (expert, row, column) are on the meta device from the start. accelerate moves a
    parameter there when a module gets it, by when all experts of a layer, of Llama 4 dozens of gigabytes, were written."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
        if func in MAKERS and len(sizes) == 3 and options.get("device") is None:
            options = options | {"device": "meta"}
        return func(*args, **options)
