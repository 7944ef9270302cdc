"""Decode attention over packed numbers on a GPU: by Triton's kernels (triton_kernels.py) where they agree with torch."""

from __future__ import annotations

import functools
import logging
import math
import os
from typing import Any

import torch
from torch import Tensor

from kvfold.plan.number_format import NumberFormat
from kvfold.runtimes.kernels.codec import pack, unpack
from kvfold.runtimes.kernels.packed_tokens import PackedTokens, Stored, recorded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRIALS = (NumberFormat(tiers=((24, 8), (40, 5), (33, 3))), NumberFormat(tiers=((65, 8),), scales="float8"))
QUERIES = (1, 20)
"""Per stored head: a small tile, and a larger one with more warps."""
TOLERANCE = 2e-2
"""Of products, relative to the largest."""


def serves(q: Tensor, z: Stored, y: Stored) -> bool:
    """Whether the kernels take these tensors, and nobody wants gradients or a graph of it."""
    if not (isinstance(z, PackedTokens) and isinstance(y, PackedTokens)) or recorded(q, z.rows, y.rows):
        return False
    known = all(x.format.codec.fused and x.rows.stride(-1) == 1 and x.device == q.device for x in (z, y))
    return known and not (torch.is_grad_enabled() and q.requires_grad) and works_for(q)


def works_for(x: Tensor) -> bool:
    """Whether the kernels can be used with numbers of this dtype where they are."""
    return x.device.type == "cuda" and x.dtype in DTYPES and works(x.device, x.dtype)


@functools.cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled here, and give what torch's operations give; if not, one line in the log says so.

    KVFOLD_NATIVE=0 leaves them out.
    """
    if os.environ.get("KVFOLD_NATIVE") == "0":
        return False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            errors = [
                error for format in TRIALS for count in QUERIES for error in _errors(format, count, device, dtype)
            ]
        detail = f"they are off by {max(errors, key=lambda error: (math.isnan(error), error)):.2g}"
    except Exception as problem:
        # no triton, no compiler for it, a device that it does not know: torch serves all of them
        errors, detail = [math.inf], f"{type(problem).__name__}: {problem}".splitlines()[0]
    if all(error < TOLERANCE for error in errors):  # what is no number is not
        return True
    logging.getLogger(__name__).warning(
        "packed caches on %s are read by torch's operations, not by kvfold's Triton kernels (%s)", device, detail
    )
    return False


def _errors(format: NumberFormat, queries: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Of both products on a small case, relative to the largest number; and how much more packing loses."""
    from kvfold.runtimes.kernels import triton_kernels as kernels

    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
    x, q = torch.randn(2, 3, 1100, format.width, **options), torch.randn(2, 3 * queries, 1, format.width, **options)
    packed = PackedTokens(pack(x, format).to(device), format, dtype)
    stored = unpack(packed.rows, format, torch.float32)
    elements, q = stored.repeat_interleave(queries, dim=1), q.to(device, dtype)
    wanted = q.float() @ elements.transpose(2, 3)
    weights = wanted.softmax(-1)
    pairs = [(kernels.scores(q, packed), wanted), (kernels.weighted(weights, packed, dtype), weights @ elements)]
    errors = [float((found - sought).abs().max() / sought.abs().max()) for found, sought in pairs]
    if format.scales == "exponent":
        some = x[:, :, :9].to(device)
        again = unpack(kernels.pack(some, format), format, torch.float32)
        errors.append(float((again - some).square().sum() / (stored[:, :, :9] - some).square().sum()) - 1)
    return errors
